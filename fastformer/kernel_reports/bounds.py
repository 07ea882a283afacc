"""A simple model of how fast a kernel's inner loop can run: a bracket, not a prediction.

Each iteration of the loop needs so many clocks of each resource of a multiprocessor: matrix products over the tensor
peak, instructions over the lanes of their pipe, bytes over the bandwidth of memory and of shared memory, instructions
over the schedulers. If all resources overlapped perfectly, the loop would take the largest of these; with no overlap,
their sum. The true speed lies between if the model's assumptions hold:

- the loop is what takes the time, and enough CTAs are resident: no latency, no tail, no launch, no prologue;
- clocks are boost clocks, every access is free of bank conflicts and coalesced;
- in a loop with matrix products bytes come from L2 at 64 bytes per clock and multiprocessor, elsewhere from memory at
  its peak; a bulk (TMA) copy counts as the kernel's mean one;
- every warp of the CTA executes the loop, which a warp-specialised kernel's do not: there it is the loop of the warps
  that multiply, and what the other warps do meanwhile is left out.

What it is good for: which resource bounds a kernel, and how much of the peak a perfect schedule could reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastformer.kernel_reports.binary import Instruction, bytes_of, pipe_of, tensor_flops
from fastformer.kernel_reports.devices import Device

L2_BYTES_PER_CLOCK = 64  # of one multiprocessor; NVIDIA A100 whitepaper, "A100 L2 cache", 5120 bytes/clk over 80


@dataclass(frozen=True)
class Bounds:
    """The bracket of one iteration of a CTA's loop.

    Attributes:
        clocks: by resource.
        roof: the resource whose peak is the yardstick: tensor if there are matrix products, else float or memory.
        low, high: the fraction of that peak with no and with perfect overlap.
        limited_by: the resource that takes the most clocks.
        flops, bytes: of the loop.
    """

    clocks: dict[str, float]
    roof: str
    low: float
    high: float
    limited_by: str
    flops: float
    bytes: float


def bounds_of(loop: list[Instruction], warps: int, device: Device, blackwell: float, bulk: float) -> Bounds:
    """The bracket for a loop that all `warps` of a CTA execute.

    Args:
        blackwell, bulk: operations of a UTC*MMA and bytes of a bulk copy, which their instructions do not tell.
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
            # An integer multiply-add takes the float pipe for twice as long.
            clocks[pipe] += threads * (2 if name.startswith("IMAD") else 1) / device.lanes[pipe]
            if pipe == "float" and not name.startswith("IMAD"):
                flops += threads * (2 if "FMA" in name.upper() else 1) * (2 if "2" in name or "pk" in name else 1)
        elif pipe == "shared":
            clocks["shared"] += threads * bytes_of(name) / device.shared_bandwidth
        elif pipe == "global":
            moved += bulk if name.startswith("UTMA") else threads * bytes_of(name)
    # Only then is it known whether the loop multiplies matrices.
    rate = L2_BYTES_PER_CLOCK if clocks["tensor"] else _per_clock(device, device.bandwidth)
    clocks["memory"] = moved / rate
    if device.warp_size == 64:  # one vector unit does both
        clocks["float"], clocks["integer"] = clocks["float"] + clocks["integer"], 0.0
    issue = len(loop) * warps / device.schedulers
    slowest = max(clocks, key=clocks.__getitem__)
    together, apart = max(clocks[slowest], issue), max(sum(clocks.values()), issue)
    roof = "tensor" if clocks["tensor"] else max(("float", "memory"), key=clocks.__getitem__)
    limited_by = "issue" if issue > clocks[slowest] else slowest
    return Bounds(clocks, roof, clocks[roof] / apart, clocks[roof] / together, limited_by, flops, moved)


def _per_clock(device: Device, per_second: float) -> float:
    return per_second / device.multiprocessors / device.clock
