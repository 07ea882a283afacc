"""The peaks and limits of each architecture's best-known GPU, for the report's model. Every number has its source.

Peaks are the vendors' figures without sparsity, at boost clock, with float32 accumulation. A real card sustains less.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Device:
    """A GPU's peaks and the limits that decide how many CTAs share a multiprocessor.

    Attributes:
        name: the product.
        source: the document that its numbers are from.
        multiprocessors: the number of SMs, or of compute units (of one die, if software sees each die as a GPU).
        clock: boost clock in hertz.
        bandwidth: memory bandwidth in bytes per second.
        tensor_flops: peak operations per second by operand: "16" (float16 and bfloat16), "tf32", and "float32" if
            tensor cores multiply it.
        shared_memory: bytes of shared memory of a multiprocessor.
        threads, ctas: the most threads and CTAs that are resident on a multiprocessor.
        lanes: the number of threads whose instruction of a kind a multiprocessor completes per clock.
        registers: 32-bit registers of a multiprocessor.
        register_unit: the unit in which registers are allocated to a warp.
        shared_reserved: bytes of shared memory that the system reserves in each CTA.
        warp_size: threads of a warp.
    """

    name: str
    source: str
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor_flops: dict[str, float]
    shared_memory: int
    threads: int
    ctas: int
    lanes: dict[str, int]
    registers: int = 65536
    register_unit: int = 256
    shared_reserved: int = 1024
    warp_size: int = 32
    shared_bandwidth: int = 128  # bytes per clock and multiprocessor
    schedulers: int = 4  # warp instructions issued per clock and multiprocessor


# Source: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", results per clock and
# multiprocessor: float32 add, multiply, multiply-add 128 (sm_80: 64), integer add, compare, logic 64, transcendental
# and conversion 16.
_NVIDIA = {"float": 128, "integer": 64, "special": 16}
_SM_80 = {**_NVIDIA, "float": 64}
# Source: AMD CDNA3 instruction set guide: four 16-lane SIMDs; transcendentals at a quarter of that.
_CDNA = {"float": 64, "integer": 64, "special": 16}

# Residency (registers, shared memory, threads, CTAs): CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; for AMD 8 waves on each of 4 SIMDs with 512 registers a lane (CDNA2, CDNA3, CDNA4 guides).
DEVICES = {
    "sm_80": Device(
        name="A100 SXM 80GB",
        source="NVIDIA A100 datasheet",
        multiprocessors=108,
        clock=1.410e9,
        bandwidth=2.039e12,
        tensor_flops={"16": 312e12, "tf32": 156e12},
        shared_memory=164 * KIB,
        threads=2048,
        ctas=32,
        lanes=_SM_80,
    ),
    "sm_86": Device(
        name="RTX 3090",
        source="NVIDIA GA102 whitepaper, appendix A",
        multiprocessors=82,
        clock=1.695e9,
        bandwidth=0.936e12,
        tensor_flops={"16": 71e12, "tf32": 35.6e12},
        shared_memory=100 * KIB,
        threads=1536,
        ctas=16,
        lanes=_NVIDIA,
    ),
    "sm_89": Device(
        name="L40S",
        source="NVIDIA L40S datasheet",
        multiprocessors=142,
        clock=2.520e9,
        bandwidth=0.864e12,
        tensor_flops={"16": 362e12, "tf32": 183e12},
        shared_memory=100 * KIB,
        threads=1536,
        ctas=24,
        lanes=_NVIDIA,
    ),
    "sm_90": Device(
        name="H100 SXM",
        source="NVIDIA H100 whitepaper, table 2",
        multiprocessors=132,
        clock=1.830e9,
        bandwidth=3.352e12,
        tensor_flops={"16": 989.4e12, "tf32": 494.7e12},
        shared_memory=228 * KIB,
        threads=2048,
        ctas=32,
        lanes=_NVIDIA,
    ),
    "sm_100": Device(
        name="B200",
        source="NVIDIA Blackwell datasheet (HGX B200, one GPU)",
        multiprocessors=148,
        clock=1.850e9,
        bandwidth=8.0e12,
        tensor_flops={"16": 2250e12, "tf32": 1100e12},
        shared_memory=228 * KIB,
        threads=2048,
        ctas=32,
        lanes=_NVIDIA,
    ),
    "sm_120": Device(
        name="RTX 5090",
        source="NVIDIA RTX Blackwell whitepaper, appendix A",
        multiprocessors=170,
        clock=2.407e9,
        bandwidth=1.792e12,
        tensor_flops={"16": 209.5e12, "tf32": 104.8e12},
        shared_memory=100 * KIB,
        threads=1536,
        ctas=24,
        lanes=_NVIDIA,
    ),
    "gfx90a": Device(
        name="MI250X, one die",
        source="AMD Instinct MI250X datasheet, halved",
        multiprocessors=110,
        clock=1.700e9,
        bandwidth=1.638e12,
        tensor_flops={"16": 191.5e12, "float32": 47.9e12},
        shared_memory=64 * KIB,
        threads=2048,
        ctas=32,
        lanes=_CDNA,
        registers=4 * 512 * 64,
        register_unit=8 * 64,
        shared_reserved=0,
        warp_size=64,
    ),
    "gfx942": Device(
        name="MI300X",
        source="AMD Instinct MI300X datasheet",
        multiprocessors=304,
        clock=2.100e9,
        bandwidth=5.3e12,
        tensor_flops={"16": 1307.4e12, "tf32": 653.7e12, "float32": 163.4e12},
        shared_memory=64 * KIB,
        threads=2048,
        ctas=32,
        lanes=_CDNA,
        registers=4 * 512 * 64,
        register_unit=8 * 64,
        shared_reserved=0,
        warp_size=64,
    ),
    "gfx950": Device(
        name="MI355X",
        source="AMD Instinct MI355X datasheet",
        multiprocessors=256,
        clock=2.400e9,
        bandwidth=8.0e12,
        tensor_flops={"16": 2516.6e12, "float32": 157.3e12},
        shared_memory=160 * KIB,
        threads=2048,
        ctas=32,
        lanes=_CDNA,
        registers=4 * 512 * 64,
        register_unit=8 * 64,
        shared_reserved=0,
        warp_size=64,
    ),
}


def resident_ctas(device: Device, warps: int, registers: int, shared: int, tensor_columns: int) -> tuple[int, str]:
    """The number of CTAs that a multiprocessor holds at once, and the name of the limit that decides it.

    Args:
        device: the GPU.
        warps: warps of a CTA.
        registers: registers of a thread.
        shared: bytes of shared memory of a CTA.
        tensor_columns: columns of tensor memory (of 512) of a CTA.
    """
    unit = device.register_unit
    registers_of_warp = -(-max(registers, 1) * device.warp_size // unit) * unit
    warps_by_registers = device.registers // registers_of_warp // device.schedulers * device.schedulers
    limits = {
        "threads": device.threads // (warps * device.warp_size),
        "CTAs": device.ctas,
        "registers": warps_by_registers // warps,
        "shared memory": device.shared_memory // (shared + device.shared_reserved)
        if shared + device.shared_reserved
        else device.ctas,
    }
    if tensor_columns:
        limits["tensor memory"] = 512 // tensor_columns
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit
