"""A simple model of how fast a kernel's inner loop can run: it gives a lower and an upper bound, not a prediction.

Each iteration of the loop needs clocks of each resource of a multiprocessor. The clocks are: operations of matrix
products divided by the tensor peak, instructions divided by the lanes of their pipe, bytes divided by the bandwidth of
memory and of shared memory, and all instructions divided by the schedulers. With perfect overlap of all resources, the
loop takes the largest of these; with no overlap, their sum. The true speed lies between the two if the model's
assumptions hold:

- The loop takes all the time, and enough CTAs are resident: there is no latency, tail, launch or prologue.
- Clocks are boost clocks. Every access is coalesced and free of bank conflicts.
- In a loop with matrix products, bytes come from L2 at 64 bytes per clock and multiprocessor. In other loops they come
  from memory at its peak. A bulk (TMA) copy counts as the mean of the kernel's bulk copies.
- Every warp of the CTA executes the loop. In a warp-specialised kernel, only the warps that multiply execute it. The
  work of the other warps is left out.

The model shows which resource bounds a kernel, and how much of the peak a perfect schedule could reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastformer.kernel_reports.binary import Instruction, bytes_of, pipe_of, tensor_flops
from fastformer.kernel_reports.devices import Device

L2_BYTES_PER_CLOCK = 64  # of one multiprocessor; NVIDIA A100 whitepaper, "A100 L2 cache", 5120 bytes/clk over 80


@dataclass(frozen=True)
class Bounds:
    """The bounds of one iteration of a CTA's loop.

    Attributes:
        clocks: clocks by resource.
        roof: the resource whose peak is the reference: tensor if there are matrix products, else float or memory.
        low: the fraction of that peak without overlap.
        high: the fraction of that peak with perfect overlap.
        limited_by: the resource that takes the most clocks.
        flops, bytes: the operations and the bytes of one iteration.
    """

    clocks: dict[str, float]
    roof: str
    low: float
    high: float
    limited_by: str
    flops: float
    bytes: float


def bounds_of(loop: list[Instruction], warps: int, device: Device, blackwell: float, bulk: float) -> Bounds:
    """The bounds of a loop that all warps of a CTA execute.

    Args:
        loop: the loop's instructions.
        warps: the number of warps of a CTA.
        device: the GPU.
        blackwell: operations of a UTC*MMA instruction, whose name does not contain its shape.
        bulk: bytes of a bulk copy, whose name does not contain its size.
    """
    threads = warps * device.warp_size
    clocks = dict.fromkeys(("tensor", "float", "integer", "special", "shared", "memory"), 0.0)
    flops = moved = 0.0
    for instruction in loop:
        name, pipe = instruction.name, pipe_of(instruction.name)
        if pipe == "tensor":
            each, kind = tensor_flops(name, blackwell)
            products = each * (1 if name.startswith("UTC") else warps)
            flops += products
            clocks["tensor"] += products / _per_clock(device, device.tensor_flops[kind])
        elif pipe in device.lanes:
            # An integer multiply-add occupies the float pipe twice as long.
            clocks[pipe] += threads * (2 if name.startswith("IMAD") else 1) / device.lanes[pipe]
            if pipe == "float" and not name.startswith("IMAD"):
                flops += threads * (2 if "FMA" in name.upper() else 1) * (2 if "2" in name or "pk" in name else 1)
        elif pipe == "shared":
            clocks["shared"] += threads * bytes_of(name) / device.shared_bandwidth
        elif pipe == "global":
            moved += bulk if name.startswith("UTMA") else threads * bytes_of(name)
    # Only now is it known whether the loop multiplies matrices.
    rate = L2_BYTES_PER_CLOCK if clocks["tensor"] else _per_clock(device, device.bandwidth)
    clocks["memory"] = moved / rate
    if device.warp_size == 64:  # one vector unit executes both kinds
        clocks["float"], clocks["integer"] = clocks["float"] + clocks["integer"], 0.0
    issue = len(loop) * warps / device.schedulers
    slowest = max(clocks, key=clocks.__getitem__)
    together, apart = max(clocks[slowest], issue), max(sum(clocks.values()), issue)
    roof = "tensor" if clocks["tensor"] else max(("float", "memory"), key=clocks.__getitem__)
    limited_by = "issue" if issue > clocks[slowest] else slowest
    return Bounds(clocks, roof, clocks[roof] / apart, clocks[roof] / together, limited_by, flops, moved)


def _per_clock(device: Device, per_second: float) -> float:
    return per_second / device.multiprocessors / device.clock
