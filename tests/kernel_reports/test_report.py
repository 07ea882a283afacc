"""Figures from compiled code are right in cases worked by hand: parsing, residency, bracket and regression gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from processes import fastformer

from fastformer.commands import kernels as command
from fastformer.kernel_reports import binary
from fastformer.kernel_reports.bounds import bounds_of
from fastformer.kernel_reports.devices import DEVICES, resident_ctas
from fastformer.kernel_reports.gate import regressions, unwanted_spills
from fastformer.kernel_reports.recorded import read_figures, write_figures
from fastformer.kernel_reports.report import Figures, as_json, from_json

pytestmark = pytest.mark.cpu

# A kernel as nvdisasm prints it: a prologue, a loop with border tests and a shorter loop without them.
SASS = """
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   ISETP.GE.AND P1, PT, R1, R2, PT ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
        /*0090*/                   STL.64 [R1+0x8], R2 ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
"""


def code(text: str = SASS) -> binary.Code:
    return binary._code(text, binary._NVIDIA_LINE, binary._NVIDIA_LABEL)


def test_the_inner_loop_is_the_one_without_border_tests() -> None:
    parsed = code()
    assert [instruction.name.split(".")[0] for instruction in parsed.loop] == ["LDGSTS", "HMMA", "BRA"]
    assert len(parsed.instructions) == 14


def test_an_epilogue_within_a_loop_is_no_part_of_it() -> None:
    """In a flattened loop a branch skips the stores of a tile, unless the product before was the tile's last one."""
    flat = SASS.replace("BRA `(.L_x_0)", "NOP").replace(
        "              @!P1 BRA `(.L_x_1) ;",
        """               @P2 BRA `(.L_x_4) ;
        /*0081*/                   FADD R3, R3, R8 ;
        /*0082*/                   STG.E.128 desc[UR4][R2.64], R3 ;
.L_x_4:
        /*0083*/              @!P1 BRA `(.L_x_1) ;""",
    )
    assert [instruction.name.split(".")[0] for instruction in code(flat).loop] == ["LDGSTS", "HMMA", "BRA", "BRA"]


def test_a_kernel_without_a_loop_is_its_own_loop() -> None:
    parsed = code(SASS.replace("BRA `(.L_x_0)", "NOP").replace("BRA `(.L_x_1)", "NOP"))
    assert not parsed.has_loop
    assert parsed.loop == parsed.instructions


def test_highlights() -> None:
    assert binary.highlights(code()) == {"HMMA": 2, "LDGSTS.128": 2, "STG.128": 1, "STL.64": 1}


@pytest.mark.parametrize(
    ("name", "pipe", "size"),
    [
        ("LDG.E.U16", "global", 2),
        ("LDSM.16.M88.4", "shared", 16),
        ("STL", "shared", 4),
        ("UTCHMMA", "tensor", 4),
        ("HGMMA.64x128x16.F32.BF16", "tensor", 4),
        ("UIADD3", "scalar", 4),
        ("LDGDEPBAR", "control", 4),
        ("F2FP.BF16.F32.PACK_AB", "integer", 4),
        ("MUFU.EX2", "special", 4),
        ("buffer_load_dwordx4", "global", 16),
        ("buffer_load_ushort", "global", 2),
        ("ds_read2_b64", "shared", 16),
        ("v_mfma_f32_32x32x8_bf16", "tensor", 4),
        ("v_exp_f32_e32", "special", 4),
        ("v_pk_fma_f32", "float", 4),
        ("v_cmp_gt_f32_e64", "integer", 4),
        ("s_waitcnt", "control", 4),
        ("s_add_i32", "scalar", 4),
    ],
)
def test_instructions_are_known(name: str, pipe: str, size: int) -> None:
    assert binary.pipe_of(name) == pipe
    if pipe in ("global", "shared"):
        assert binary.bytes_of(name) == size


@pytest.mark.parametrize(
    ("name", "flops", "kind"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16, "16"),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8, "tf32"),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 / 4, "16"),
        ("v_mfma_f32_32x32x8_bf16", 2 * 32 * 32 * 8, "16"),
        ("v_mfma_f32_32x32x2_f32", 2 * 32 * 32 * 2, "float32"),
        ("v_mfma_f32_4x4x4_16b_f16", 2 * 4 * 4 * 4 * 16, "16"),
    ],
)
def test_operations_of_a_matrix_product(name: str, flops: float, kind: str) -> None:
    assert binary.tensor_flops(name, 0.0) == (flops, kind)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "expected"),
    [
        # By NVIDIA's occupancy calculator, 255 registers are rounded to 256, and 8 warps fill the register file.
        ("sm_80", 4, 255, 0, (2, "registers")),
        ("sm_80", 4, 32, 80 * 1024, (2, "shared memory")),
        ("sm_80", 4, 32, 0, (16, "threads")),
        ("sm_86", 1, 32, 0, (16, "CTAs")),
        ("gfx942", 4, 128, 0, (4, "registers")),
        ("gfx942", 4, 64, 40 * 1024, (1, "shared memory")),
    ],
)
def test_residency(architecture: str, warps: int, registers: int, shared: int, expected: tuple[int, str]) -> None:
    assert resident_ctas(DEVICES[architecture], warps, registers, shared, 0) == expected


def test_the_bracket_of_a_loop_worked_by_hand() -> None:
    loop = [
        binary.Instruction("HMMA.16816.F32.BF16", None),
        *[binary.Instruction("MUFU.EX2", None)] * 4,
        *[binary.Instruction("FFMA", None)] * 8,
    ]
    bounds = bounds_of(loop, 4, DEVICES["sm_80"], blackwell=0.0, bulk=0.0)
    # sm_80 does 2048 operations, 16 exponentials and 64 multiply-adds in a clock.
    assert bounds.clocks["tensor"] == pytest.approx(4 * 4096 / 2048, rel=1e-2)
    assert bounds.clocks["special"] == 4 * 128 / 16
    assert bounds.clocks["float"] == 8 * 128 / 64
    assert bounds.limited_by == "special"
    assert bounds.high == pytest.approx(8 / 32, rel=1e-2)
    assert bounds.low == pytest.approx(8 / (8 + 32 + 16), rel=1e-2)


def test_a_bulk_copy_is_issued_once_and_moves_a_tile() -> None:
    loop = [binary.Instruction(name, None) for name in ("UTMALDG.2D", "UTMALDG.2D", "UTCHMMA", "LDG.E.128")]
    bounds = bounds_of(loop, 4, DEVICES["sm_100"], blackwell=2.0 * 128 * 128 * 16, bulk=16384.0)
    assert bounds.bytes == 2 * 16384 + 128 * 16
    assert bounds.flops == 2.0 * 128 * 128 * 16
    assert bounds.clocks["memory"] == bounds.bytes / 64


RECORDED = Path(__file__).parent / "kernel_figures"
FIGURES = Figures(
    work="attention/d64",
    kernel="_forward_kernel",
    architecture="sm_90",
    configuration={"BLOCK_M": 128, "num_warps": 4, "num_stages": 3},
    registers=200,
    spill_bytes=0,
    shared_memory=65536,
    shared_limit=232448,
    ctas=2,
    ctas_limit="registers",
    instructions=1000,
    highlights={"HGMMA": 32, "UTMALDG": 4},
    loop={"tensor": 16},
    roof="tensor",
    peak_low=0.4,
    peak_high=0.8,
    limited_by="special",
    flops=1.0,
    bytes=1.0,
    flops_low=1.0,
    flops_high=2.0,
)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"instructions": 1030, "registers": 255}, []),
        ({"highlights": {"UTCHMMA": 8, "UTMALDG": 4}}, []),
        ({"instructions": 1031}, ["instructions 1000 -> 1031 (+3.1%, at most +3%)"]),
        ({"spill_bytes": 4}, ["spills 0 -> 4 bytes per thread"]),
        ({"shared_memory": 232449}, ["needs 232449 bytes of shared memory; the limit is 232448"]),
        ({"highlights": {"HMMA": 64, "UTMALDG": 4}}, ["no longer has matrix products by HGMMA"]),
        ({"highlights": {"HGMMA": 32, "LDGSTS.128": 4}}, ["no longer has copies by UTMALDG or UBLKCP"]),
        ({"kernel": "_other"}, ["recorded, but no longer launched", "launched, but not recorded"]),
    ],
)
def test_the_gate_names_what_got_worse(change: dict, expected: list[str]) -> None:
    lines = regressions([FIGURES], [replace(FIGURES, **change)])
    assert [line.split(": ", 1)[1] for line in lines] == expected
    assert all(line.startswith("sm_90 attention/d64 _") for line in lines)


@pytest.mark.parametrize(
    ("architecture", "work", "spill_bytes", "unwanted"),
    [
        ("sm_90", "attention/d64/bfloat16/aligned", 4, True),
        ("sm_90", "attention/d128-causal-grouped/float16/aligned", 4, True),
        ("sm_90", "attention/d128/bfloat16/aligned", 0, False),
        ("sm_90", "attention/d128/float32/aligned", 4, False),
        ("sm_90", "attention/d256-causal/bfloat16/aligned", 4, True),
        ("sm_90", "attention_weights/d64-causal/bfloat16/aligned", 4, False),
        ("sm_80", "attention/d64/bfloat16/aligned", 4, False),
    ],
)
def test_attention_may_not_spill_on_hopper(architecture: str, work: str, spill_bytes: int, unwanted: bool) -> None:
    lines = unwanted_spills([replace(FIGURES, architecture=architecture, work=work, spill_bytes=spill_bytes)])
    assert lines == ([f"{architecture} {work} _forward_kernel: spills 4 bytes per thread"] if unwanted else [])


def test_a_triton_without_recorded_figures_is_told_how_to_record_them(tmp_path: Path) -> None:
    done = fastformer("kernels", "check", "--figures", str(tmp_path))
    assert done.returncode == 2
    assert f"fastformer kernels check --figures {tmp_path} --update" in done.stderr


def test_recording_one_architecture_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"triton-{triton.__version__}.json"
    recorded = [replace(FIGURES, architecture=name, registers=100) for name in ("sm_80", "sm_90", "gfx942")]
    path.write_text(json.dumps(as_json(recorded)))
    found = replace(FIGURES, architecture="sm_90", registers=90)
    monkeypatch.setattr(command, "_figures", lambda *arguments: [found])
    command.main(["check", "--figures", str(tmp_path), "--arch", "sm_90", "--update"], 0.0)
    assert from_json(json.loads(path.read_text())) == [recorded[0], found, recorded[2]]


def test_each_kernel_is_one_line_of_a_file(tmp_path: Path) -> None:
    """This holds for a file that is written now, and for those of the repository."""
    written = tmp_path / "figures.json"
    write_figures([FIGURES, replace(FIGURES, kernel="other")], written)
    for path in (written, *RECORDED.glob("*.json")):
        first, *lines, last = path.read_text().splitlines()
        assert first.startswith('{"triton": ') and last == "]}"
        assert [Figures(**json.loads(line.removesuffix(","))) for line in lines] == read_figures(path)
    assert read_figures(written) == [FIGURES, replace(FIGURES, kernel="other")]


def test_report_of_compiled_kernels(tmp_path: Path) -> None:
    written, picture = tmp_path / "report.json", tmp_path / "report.png"
    options = ("--operators", "softmax", "--dtypes", "bfloat16", "--layouts", "aligned", "--processes", "1")
    outputs = ("--json", str(written), "--picture", str(picture))
    done = fastformer("kernels", "report", "--arch", "sm_80,gfx942", *options, *outputs)
    assert done.returncode == 0, done.stderr
    figures = from_json(json.loads(written.read_text()))
    assert {entry.architecture for entry in figures} == {"sm_80", "gfx942"}
    for entry in figures:
        assert 16 <= entry.registers <= 255 and entry.spill_bytes == 0 and entry.ctas >= 1
        assert entry.roof != "tensor" and 0 < entry.peak_low <= entry.peak_high <= 1
        wide = "LDG.128" if entry.architecture == "sm_80" else "buffer_load.128"
        assert entry.highlights[wide] >= 1
    assert picture.read_bytes().startswith(b"\x89PNG")
