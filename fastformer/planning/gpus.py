"""GPUs that training is planned for. Every number has its source; peaks are the vendors' figures without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from fastformer.kernel_reports.devices import DEVICES, Device

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """The figures of a GPU that a training run depends on.

    Attributes:
        name: the product.
        source: the document that its numbers are from.
        memory: the size of its memory in bytes.
        flops: peak operations per second by the bits of the operands: 16 (float16 and bfloat16, accumulated in
            float32) and 32 (float32 without TF32).
        bandwidth: memory bandwidth in bytes per second.
        link: bandwidth to the other GPUs of its node (NVLink, Infinity Fabric or PCIe), in bytes per second and
            direction.
    """

    name: str
    source: str
    memory: float
    flops: dict[int, float]
    bandwidth: float
    link: float


def _gpu(device: Device, memory_gib: float, link: float, **changes: object) -> Gpu:
    """A GPU with the peaks of the kernel report. A float32 multiply-add counts as two operations per lane and clock."""
    vector = 2 * device.lanes["float"] * device.multiprocessors * device.clock
    known = {
        "name": device.name,
        "source": device.source,
        "memory": memory_gib * GIB,
        "flops": {16: device.tensor_flops["16"], 32: device.tensor_flops.get("float32", vector)},
        "bandwidth": device.bandwidth,
        "link": link,
    }
    return Gpu(**{**known, **changes})  # type: ignore[arg-type]


# Links are given for one direction. Both directions together: NVLink 3, 4 and 5 have 600, 900 and 1,800 GB/s (NVIDIA
# A100, H100, Blackwell datasheets), MI300X seven links of 128 GB/s (AMD's datasheet), and PCIe 4 and 5 with 16 lanes
# 64 and 128 GB/s.
GPUS = {
    "a100": _gpu(DEVICES["sm_80"], 80, 300e9),
    "h100": _gpu(DEVICES["sm_90"], 80, 450e9),
    "h200": _gpu(DEVICES["sm_90"], 141, 450e9, name="H200 SXM", source="NVIDIA H200 datasheet", bandwidth=4.8e12),
    "b200": _gpu(DEVICES["sm_100"], 180, 900e9),
    "l40s": _gpu(DEVICES["sm_89"], 48, 32e9),
    "rtx-4090": Gpu(
        name="RTX 4090",
        source="NVIDIA Ada whitepaper, appendix A",
        memory=24 * GIB,
        flops={16: 165.2e12, 32: 82.6e12},
        bandwidth=1.008e12,
        link=32e9,
    ),
    "rtx-5090": _gpu(DEVICES["sm_120"], 32, 64e9),
    "mi300x": _gpu(DEVICES["gfx942"], 192, 448e9),
}
