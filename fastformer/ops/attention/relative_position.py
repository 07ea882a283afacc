"""Biases by relative position: T5's, from a learned table and a bucket function, and ALiBi's slopes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def relative_position_bias(table: Tensor, buckets: Callable[[Tensor], Tensor], max_distance: int) -> Tensor:
    """Return the `relative_bias` that `fastformer.attention` takes, differentiable in the table.

    Args:
        table: (num_buckets, heads).
        buckets: maps distances, key position - query position, int64, to rows of the table. It must be constant from
            `max_distance` on, in both directions.
        max_distance: the largest distance with a bucket for itself alone, in tokens.

    Returns:
        (heads, 2 * max_distance + 1), of the table's dtype.

    >>> bias = relative_position_bias(torch.randn(32, 8), t5_buckets(), max_distance=128)
    >>> fastformer.attention(q, k, v, relative_bias=bias, scale=1.0)
    """
    if table.dim() != 2:
        raise ValueError(f"table must have shape (num_buckets, heads); got {tuple(table.shape)}")
    if max_distance < 0:
        raise ValueError(f"max_distance must be 0 or more; got {max_distance}")
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device)
    return table[buckets(distance)].T


def alibi_slopes(heads: int) -> Tensor:
    """Return the slopes of ALiBi's heads for `fastformer.attention`: a geometric sequence from ``2 ** (-8 / heads)``.

    If `heads` is not a power of two, these are the slopes of the next lower power of two, then every other slope of
    the next higher one.

    Returns:
        (heads,) float32.

    Source: Press et al. 2022, https://arxiv.org/abs/2108.12409, section 3 and its code.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if heads < 1:
        raise ValueError(f"heads must be 1 or more; got {heads}")
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    between = [2.0 ** (-4.0 * head / power) for head in range(1, 2 * (heads - power), 2)]
    return torch.tensor(first + between)


def t5_buckets(
    num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Callable[[Tensor], Tensor]:
    """Return T5's bucket function.

    There is one bucket for each small distance, then logarithmically wider ones up to `max_distance` tokens.

    Args:
        num_buckets: the number of rows of the table; with `bidirectional`, half of them for each direction.
        bidirectional: True for encoders. False for decoders, where no key is later than the query: later keys get
            bucket 0.

    Source: Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1.
    """
    of_direction = num_buckets // 2 if bidirectional else num_buckets
    exact = of_direction // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"num_buckets must leave a bucket for distances below max_distance; got {num_buckets} and {max_distance}"
        )

    def buckets(distance: Tensor) -> Tensor:
        later = (distance > 0) * of_direction if bidirectional else torch.zeros_like(distance)
        magnitude = distance.abs() if bidirectional else (-distance).clamp(min=0)
        position = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
        wide = exact + (position * (of_direction - exact)).long()
        return later + torch.where(magnitude < exact, magnitude, wide.clamp(max=of_direction - 1))

    return buckets
