"""Attention of new tokens to a cache compared with its peers: the speed at which keys and values are read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from fastformer.benchmarking.decode_peers import Decode, exact_of_some, of_some, peers
from fastformer.benchmarking.gpu.rates import FORWARD, Case, launches, rates
from fastformer.benchmarking.gpu.step import Record, Setting, Step
from fastformer.benchmarking.operations import Work

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16


def cases(device: torch.device, dry: bool) -> list[Case]:
    """The cases, in order of importance."""
    batches, lengths = ((1, 2), (32,)) if dry else ((8, 1, 64), (4096, 32768))
    return [
        _case(batch, keys, page, device, dry)
        for keys, page, batch in product(lengths, (None, 4 if dry else PAGE), batches)
    ]


def _case(batch: int, keys: int, page: int | None, device: torch.device, dry: bool) -> Case:
    heads, kv_heads, head_dim = (4, 2, 16) if dry else (HEADS, KV_HEADS, HEAD_DIM)
    dtype = torch.float32 if dry else torch.bfloat16
    call = Decode(batch, heads, kv_heads, head_dim, keys, dtype, device, page)
    layout = "contiguous" if page is None else f"pages of {page}"
    return Case(
        f"{layout}, batch {batch}, {keys:,} keys",
        peers(call),
        Work("bytes", call.nbytes),
        partial(exact_of_some, call),
        partial(of_some, call),
        phases=(FORWARD,),
    )


def run(setting: Setting) -> Iterator[Record]:
    """Yield the rates of all peers in all cases."""
    return rates(cases(setting.device, setting.dry), setting)


STEP = Step(
    name="decode",
    title="attention of a new token to a cache, compared with its peers: GB/s of keys and values",
    seconds=30,
    run=run,
    launches=lambda: launches(cases(torch.device("meta"), dry=False)),
)
