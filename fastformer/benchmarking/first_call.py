"""Time the first training step of a layer in this process, compilation included.

Run it as a module in a new process: ``python -m fastformer.benchmarking.first_call fastformer cuda``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn

from fastformer.benchmarking.calls import compiled

PEERS = ("fastformer", "torch.nn", "torch.compile(torch.nn)")


def step(peer: str, device: torch.device) -> Any:
    """Prepare a training step of one encoder layer without running it. On the device meta it only launches kernels."""
    import fastformer.nn

    width = 64 if device.type == "cpu" else 1024
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    library: Any = fastformer.nn if peer == "fastformer" else nn
    layer = library.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True, device=device, dtype=dtype)
    function = compiled(layer) if peer.startswith("torch.compile") else layer
    x = torch.randn(4, 128, width, device=device, dtype=dtype)

    def run() -> None:
        function(x).sum().backward()

    return run


def main(peer: str, device_name: str) -> None:
    """Print the seconds of the first step."""
    device = torch.device(device_name)
    run = step(peer, device)
    if device.type == "cuda":
        # The start of the device and of its matrix library is the same for every peer: it is not timed.
        square = torch.randn(64, 64, device=device)
        (square @ square).sum().item()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(time.perf_counter() - begin)


if __name__ == "__main__":
    main(*sys.argv[1:])
