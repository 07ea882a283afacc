"""The choice of a CPU's attention for transformers models: our operator if it skips work, or the model's own SDPA.

The choice is made for each call, by its tensors: a model may be accelerated before it moves to a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastformer.backends import selected_backend
from fastformer.integrations.attention.mask import MaskStructure, elements_of
from fastformer.integrations.attention.sdpa import Sdpa, only_causal, sdpa_call
from fastformer.ops.attention.flash import FLASH_ROWS

# Costs of our operator compared with SDPA, for a call and for each row computed alone. The unit is floating-point
# operations that a core does in this time: measured on a core of about 60 GFLOP/s.
OPERATOR_COST = 2e7
ROW_COST = 3e6
# The extra cost of a bias in our operator compared with SDPA: a share of the cost of all scores.
BIAS_COST = 0.25
# The number of scores for each core from which on SDPA, which stores all scores for a bias's gradient, is slower than
# our operator, which computes them again.
LEARNED_SCORES = 1 << 22
SDPA_KEYS = 512
"""The number of keys that PyTorch's flash attention on a CPU handles at a time, masked or not."""
Span = tuple[int, int]


def choose(
    structure: MaskStructure | None,
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> Sdpa | MaskStructure | None:
    """Choose between SDPA and our operator; return SDPA's call, or the structure that our operator takes.

    Args:
        structure: who may attend to whom; None if only a dense mask says it.
        mask: that mask.
        query, key, bias, dropout_p: see `operator_is_faster`.
    """
    if not leaves_choice(query) or (structure is not None and structure.is_packed):
        return structure
    if operator_is_faster(query, key, structure, bias, dropout_p):
        return without_padding(structure, query, key, bias)
    own = None if structure is None else sdpa_call(structure, query.shape[2], key.shape[2])
    if own is None and mask is not None:
        own = Sdpa(elements_of(mask), False)
    return structure if own is None else own


def leaves_choice(query: Tensor) -> bool:
    """Whether a call runs on a CPU and no backend was chosen."""
    return query.device.type == "cpu" and selected_backend() == "auto"


def operator_is_faster(
    query: Tensor, key: Tensor, structure: MaskStructure | None, bias: Tensor | None, dropout_p: float
) -> bool:
    """Whether our operator takes less time than SDPA with a mask.

    Args:
        query: (batch, heads, queries, head_dim). key: (batch, kv_heads, keys, head_dim).
        structure: who may attend to whom; None if only a dense mask says it.
        bias: (batch, heads, queries, keys) or broadcasting to it.
        dropout_p: with dropout SDPA is chosen, since it draws random numbers faster.
    """
    batch, heads, m, head_dim = query.shape
    n = key.shape[2]
    of_pair = 4 * heads * head_dim
    # torch.compile cannot ask for the number of threads.
    cores = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    if dropout_p or of_pair * batch * m * n < OPERATOR_COST * cores:
        return False
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if learned and batch * heads * m * n >= LEARNED_SCORES * cores:
        return True
    if structure is None or (structure.spans is None and m < 2 * FLASH_ROWS):
        return False
    queries, keys = _spans(structure, batch, m, n, bias)
    sizes = [(b - a, d - c) for (a, b), (c, d) in zip(queries, keys, strict=True)]
    pairs = sum(of_row * _keys_computed(of_row, keys_of_row, structure) for of_row, keys_of_row in sizes)
    skips_blocks = bias is None and only_causal(structure, m, n)
    in_sdpa = batch * m * (min(n, (m + SDPA_KEYS) / 2) if skips_blocks else n)
    cost = OPERATOR_COST + ROW_COST * (0 if structure.spans is None else batch)
    of_bias = 0.0 if bias is None else BIAS_COST * in_sdpa
    return of_pair * (in_sdpa - pairs - of_bias) > cost * cores


def _keys_computed(m: int, n: int, structure: MaskStructure) -> float:
    """The average number of n keys with which each of m queries is multiplied, by blocks of queries."""
    if m < 2 * FLASH_ROWS:
        return n
    left, right = structure.window
    causal = (m + FLASH_ROWS) / 2 if structure.causal and m == n else n
    after = 0 if structure.causal else right
    within = n if left is None or after is None else left + after + FLASH_ROWS
    chunk = n if structure.chunk is None else structure.chunk + FLASH_ROWS
    return min(n, causal, within, chunk)


def _spans(
    structure: MaskStructure, batch: int, m: int, n: int, bias: Tensor | None
) -> tuple[Sequence[Span], Sequence[Span]]:
    """The ranges of queries and of keys that our operator computes for each row."""
    whole = [(0, m)] * batch, [(0, n)] * batch
    if structure.spans is None:
        return whole
    if _can_pack(structure, m, n, bias):
        return structure.spans if structure.causal else whole[0], structure.spans
    return whole[0], structure.spans if structure.key_lengths is not None else whole[1]


def _can_pack(structure: MaskStructure, m: int, n: int, bias: Tensor | None) -> bool:
    """Whether rows can be computed as sequences without their padding.

    With a mask that is causal from the first key on, queries and keys must be the same tokens. A bias prevents it,
    since it is laid out with padding.
    """
    if structure.spans is None or structure.chunk is not None or bias is not None:
        return False
    own_tokens = structure.causal and structure.alignment == "top_left" and m == n
    return structure.ignores_positions or own_tokens


def without_padding(
    structure: MaskStructure | None, query: Tensor, key: Tensor, bias: Tensor | None
) -> MaskStructure | None:
    """Turn `structure` into boundaries of sequences over the tokens of all rows, where that removes padding.

    Each row becomes up to five packed segments: its real tokens, and the padding before and after. The padding is split
    so that padding keys meet no queries, and padding queries meet no keys (and give zeros).
    """
    batch, m, n = query.shape[0], query.shape[2], key.shape[2]
    if structure is None or not _can_pack(structure, m, n, bias):
        return structure
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    for (q_start, q_stop), (k_start, k_stop) in zip(*_spans(structure, batch, m, n, None), strict=True):
        q_lengths += [q_start, 0, q_stop - q_start, m - q_stop, 0]
        k_lengths += [0, k_start, k_stop - k_start, 0, n - k_stop]
    return MaskStructure(
        causal=structure.causal,
        window=structure.window,
        cu_seqlens_q=_boundaries(q_lengths),
        cu_seqlens_k=_boundaries(k_lengths),
        max_seqlen_q=m,
        max_seqlen_k=n,
    )


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([*itertools.accumulate(lengths, initial=0)], dtype=torch.int32)
