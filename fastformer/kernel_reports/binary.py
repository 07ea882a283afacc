"""The contents of a compiled kernel: its resources, its instructions by the pipe that executes them, its inner loop.

A cubin is read with the disassemblers that come with triton (cuobjdump, nvdisasm), an hsaco through the assembly that
it was made from. Names of instructions: CUDA Binary Utilities, "Instruction Set Reference"; AMD CDNA3 instruction set
architecture.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from math import prod

import triton

from fastformer.kernel_reports.stand_in import LaunchedKernel

PIPES = ("tensor", "float", "integer", "special", "shared", "global", "scalar", "control")
"""The pipes that execute instructions. tensor: matrix products. float: float32 and float16 arithmetic. integer:
integers, logic, comparison, moves. special: transcendentals and conversions. shared: shared memory, shuffles, tensor
memory, spills (through L1). global: global memory. scalar: computations that are done once for a warp. control:
branches, barriers, waits."""


@dataclass(frozen=True)
class Instruction:
    """An instruction: its name with all suffixes and, for a branch, the label of its target."""

    name: str
    target: str | None


@dataclass(frozen=True)
class Resources:
    """The registers of a thread, and its spills.

    Attributes:
        registers: registers of one thread, accumulators included.
        spill_bytes: bytes that each thread writes to local memory because registers are full.
    """

    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and the loop that it spends its time in.

    Attributes:
        instructions: all instructions of the kernel.
        loop: the innermost loop with the most matrix products, or else with the most memory traffic. If several are
            equal, the shortest one, which has no border tests. Without an epilogue that only some iterations reach. The
            whole kernel if it has no loop.
        has_loop: whether the kernel has a loop.
    """

    instructions: list[Instruction]
    loop: list[Instruction]
    has_loop: bool


def read_kernel(kernel: LaunchedKernel) -> tuple[Resources, Code]:
    """Read the resources and the code of a compiled kernel."""
    if kernel.metadata.target.backend == "hip":
        assembly = kernel.text("amdgcn")
        return _amd_resources(assembly), _code(assembly, _AMD_LINE, _AMD_LABEL)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.binary)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _code(_run("nvdisasm", "-c", file.name), _NVIDIA_LINE, _NVIDIA_LABEL)
    spills = sum(bytes_of(i.name) for i in code.instructions if i.name.startswith("STL"))
    return Resources(int(_search(r"REG:(\d+)", usage)), spills), code


def _run(tool: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in the disassembler's output: {text[:200]!r}")
    return match.group(1)


def _amd_resources(assembly: str) -> Resources:
    def count(name: str) -> int:
        return int(_search(rf"\.{name}:\s+(\d+)", assembly))

    # Scalar registers spill to lanes of vector registers, not to memory.
    return Resources(count("vgpr_count"), 4 * count("vgpr_spill_count"))


_NVIDIA_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?:.*`\((?P<target>\.L\w+)\))?"
)
_NVIDIA_LABEL = re.compile(r"^(\.L\w+):")
_AMD_LINE = re.compile(r"^\s+(?P<name>(?:v|s|ds|global|buffer|flat|scratch)_\w+)(?:\s+(?P<target>\.LBB\w+))?")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")


def _code(text: str, line: re.Pattern[str], label: re.Pattern[str]) -> Code:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for row in text.splitlines():
        if match := label.match(row):
            labels[match.group(1)] = len(instructions)
        elif match := line.match(row):
            instructions.append(Instruction(match["name"], match["target"]))
    loops = [
        (labels[instruction.target], end)
        for end, instruction in enumerate(instructions)
        # A branch to itself is padding after the kernel's end.
        if instruction.target in labels and labels[instruction.target] < end
    ]
    innermost = [
        _without_epilogue(instructions, labels, start, end)
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    loop = max(innermost, key=_weight, default=instructions)
    return Code(instructions, loop, bool(innermost))


def _without_epilogue(
    instructions: list[Instruction], labels: dict[str, int], start: int, end: int
) -> list[Instruction]:
    """Return the instructions of a loop, without those that a branch skips if they store results and make no product.

    A flattened loop has them: they follow the last product of a tile."""
    kept: list[Instruction] = []
    place = start
    while place <= end:
        kept.append(instructions[place])
        target = labels.get(instructions[place].target or "", 0)
        place += 1
        if place < target <= end and _is_epilogue(instructions[place:target]):
            place = target
    has_products = any(pipe_of(instruction.name) == "tensor" for instruction in kept)
    return kept if has_products else instructions[start : end + 1]


def _is_epilogue(skipped: list[Instruction]) -> bool:
    pipes = {pipe_of(instruction.name) for instruction in skipped}
    return "tensor" not in pipes and any(instruction.name.startswith(("STG", "UTMASTG")) for instruction in skipped)


def _weight(loop: list[Instruction]) -> tuple[int, int, int]:
    products = sum(pipe_of(i.name) == "tensor" for i in loop)
    traffic = sum(bytes_of(i.name) for i in loop if pipe_of(i.name) == "global")
    return products, traffic, -len(loop)


def pipe_of(name: str) -> str:
    """The pipe, one of `PIPES`, that executes the instruction."""
    return _amd_pipe(name) if name.islower() else _nvidia_pipe(name.split(".")[0])


_NVIDIA_PIPES = {
    "float": {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HMUL2", "HADD2", "IMAD", "FSWZADD"},
    "special": {"MUFU", "I2F", "F2I", "F2F", "I2FP", "FRND", "POPC", "FLO", "BREV"},
    "shared": {"LDS", "STS", "LDSM", "STSM", "ATOMS", "SHFL", "REDUX", "LDTM", "STTM", "MATCH"} | {"LDL", "STL"},
    "global": {"LDG", "STG", "LDGSTS", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "UTMALDG", "UTMASTG"}
    | {"UTMAREDG", "UBLKCP", "LDC", "CCTL"},
    "scalar": {"R2UR", "S2UR", "S2R", "CS2R", "VOTEU", "ELECT"},
    "control": {
        "BRA",
        "EXIT",
        "BAR",
        "NOP",
        "BSSY",
        "BSYNC",
        "CALL",
        "RET",
        "WARPSYNC",
        "DEPBAR",
        "LDGDEPBAR",
        "MEMBAR",
    }
    | {"FENCE", "SYNCS", "WARPGROUP", "BPT", "NANOSLEEP", "BRX", "JMP", "ERRBAR", "ACQBULK", "UTMACMDFLUSH", "UTCBAR"}
    | {"UTCATOMSWS", "UVIRTCOUNT", "USETMAXREG", "ENDCOLLECTIVE", "PREEXIT", "ARRIVES"},
}
_NVIDIA_PIPE = {name: pipe for pipe, names in _NVIDIA_PIPES.items() for name in names}


def _nvidia_pipe(base: str) -> str:
    if base.endswith("MMA"):
        return "tensor"
    if base in _NVIDIA_PIPE:
        return _NVIDIA_PIPE[base]
    return "scalar" if base.startswith("U") else "integer"


def _amd_pipe(name: str) -> str:
    if name.startswith(("v_mfma", "v_smfmac")):
        return "tensor"
    if name.startswith(("ds_", "scratch_")):
        return "shared"
    if name.startswith(("global_", "buffer_", "flat_")):
        return "global"
    if name.startswith(
        ("s_cbranch", "s_branch", "s_waitcnt", "s_barrier", "s_nop", "s_endpgm", "s_sleep", "s_setprio")
    ):
        return "control"
    if name.startswith("s_"):
        return "scalar"
    if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos|mul_lo_u32|mul_hi_u32)", name):
        return "special"  # integer products run at a quarter of the rate, as these do
    return "float" if re.search(r"_(f16|f32|bf16)", name) and "cmp" not in name else "integer"


def bytes_of(name: str) -> int:
    """Bytes that a thread moves with a memory instruction; 0 for a bulk copy, whose name does not contain its size."""
    if name.startswith(("UTMA", "UBLKCP", "LDC", "CCTL")):
        return 0
    if not name.islower():
        parts = name.split(".")
        if parts[0] in ("LDSM", "STSM"):  # 8x8 matrices of 16-bit elements: each thread has 4 bytes of each matrix
            return 4 * int(parts[-1]) if parts[-1].isdigit() else 4
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "256": 32}
        return next((widths[part] for part in parts[1:] if part in widths), 4)
    if match := re.search(r"(?:dwordx|b)(\d+)", name):
        size = int(match.group(1)) * 4 if "dwordx" in name else int(match.group(1)) // 8
        return size * (2 if re.match(r"ds_(read|write)2", name) else 1)
    return 2 if re.search(r"short|16", name) else 1 if re.search(r"byte|8", name) else 4


def tensor_flops(name: str, blackwell_flops: float) -> tuple[float, str]:
    """Floating-point operations of a matrix product, for each warp that issues it, and the kind of its operands.

    Args:
        name: an instruction of the tensor pipe.
        blackwell_flops: the operations of sm_100's UTC*MMA, whose name does not contain its shape. It is issued once
            per CTA.
    """
    kind = "tf32" if "TF32" in name or "xf32" in name else "16"
    if name.startswith("UTC"):
        return blackwell_flops, kind
    if match := re.search(r"\.(\d+)x(\d+)x(\d+)", name):  # wgmma: the four warps of a group share the product
        return 2.0 * prod(map(int, match.groups())) / 4, kind
    if match := re.match(r"v_s?mfma\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_?(\w+)", name):
        rows, columns, depth, blocks, operand = match.groups()
        kind = "float32" if operand == "f32" else kind
        return 2.0 * int(rows) * int(columns) * int(depth) * int(blocks or 1), kind
    shape = re.search(r"\.(16)(8)(\d+)", name)  # mma.sync: 16816 is 16x8x16
    if shape is None:
        raise ValueError(f"unknown matrix product {name}")
    return 2.0 * prod(map(int, shape.groups())), kind


def blackwell_flops(kernel: LaunchedKernel, code: Code) -> float:
    """Mean operations of a tcgen05 matrix product: all operations in the kernel's IR divided by its instructions."""
    instructions = sum(i.name.startswith("UTC") and pipe_of(i.name) == "tensor" for i in code.instructions)
    if not instructions:
        return 0.0
    shapes = re.findall(
        r"ttng\.tc_gen5_mma .*?: !ttg\.memdesc<(\d+)x(\d+)x\w+,.*?!ttg\.memdesc<\d+x(\d+)x", kernel.text("ttgir")
    )
    return sum(2.0 * prod(map(int, shape)) for shape in shapes) / instructions


def bulk_bytes(kernel: LaunchedKernel, code: Code) -> float:
    """Mean bytes of a bulk (TMA) copy: all bulk-copied bytes in the kernel's IR divided by its instructions."""
    instructions = sum(i.name.startswith("UTMA") and i.name.split(".")[0] in _BULK for i in code.instructions)
    if not instructions:
        return 0.0
    tiles = re.findall(
        r"ttng\.async_tma_(?:copy_\w+|reduce) .*?!tt\.tensordesc<((?:\d+x)+)[a-z]+(\d+)", kernel.text("ttgir")
    )
    sizes = [prod(map(int, shape.split("x")[:-1])) * int(bits) // 8 for shape, bits in tiles]
    return sum(sizes) / instructions


def highlights(code: Code) -> dict[str, int]:
    """Count the instructions that show a kernel's quality: matrix products, copies by kind and width, spills."""
    counts: Counter[str] = Counter()
    for instruction in code.instructions:
        if key := _highlight(instruction.name):
            counts[key] += 1
    return dict(sorted(counts.items()))


_BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "LDSM", "STSM")
_COPIES = ("LDGSTS", "LDG", "STG", "RED", "REDG", "ATOMG", "LDL", "STL")


def _highlight(name: str) -> str | None:
    base = name.split(".")[0]
    if pipe_of(name) == "tensor":
        return re.sub(r"_e(32|64)$", "", name) if name.islower() else base
    if base in _BULK:
        return base
    if base in _COPIES:
        return f"{base}.{8 * bytes_of(name)}"
    if re.match(r"(global|buffer|scratch)_(load|store|atomic)", name):
        kind = "_".join(name.split("_")[:2])
        return f"{kind}{'_lds' if '_lds' in name else ''}.{8 * bytes_of(name)}"
    return None
