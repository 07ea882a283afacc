"""A program that runs a training step of the model in a folder, and prints the kernels that had to be compiled.

``python first_call.py FOLDER cuda``
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton

import fastformer
from fastformer.models import FastformerForMaskedLM


def main(folder: str, device: str) -> None:
    compiled: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            compiled.append(src.name)

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        _step(folder, device)
    print(json.dumps(compiled))


def _step(folder: str, device: str) -> None:
    model = FastformerForMaskedLM.from_pretrained(folder).to(device).train()
    lengths = torch.tensor([13, 2, 16, 7])
    total = int(lengths.sum())
    batch = {
        "input_ids": torch.randint(model.config.vocab_size, (total,), device=device),
        "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device),
        "max_seqlen": 16,
        "labels": torch.randint(model.config.vocab_size, (total,), device=device),
        "masked_positions": torch.arange(0, total, 5, device=device),
    }
    with fastformer.backend("triton"):
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    assert torch.isfinite(loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
