"""Attention in which masked keys and values have no effect, even if they are infinite or NaN.

A masked key has a weight of zero, and zero times NaN is NaN. A CPU checks whether such elements exist. A GPU would have
to wait for the answer, so on a GPU three attention calls give the same result without that check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastformer_kernels.attention.arguments import AttentionArguments

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def attention_ignoring_masked_nan(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: AttentionArguments,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of ``attention(query, key, value, *arguments)``; gradients ignore masked elements too.

    Rows that see an infinite or NaN element get the result of the plain call. All other rows get the result
    computed without such elements.
    """
    strange_query, strange_key, strange_value = (~tensor.isfinite() for tensor in (query, key, value))
    finite = (
        query.masked_fill(strange_query, 0.0),
        key.masked_fill(strange_key, 0.0),
        value.masked_fill(strange_value, 0.0),
    )
    results = attention(*finite, *arguments)
    with torch.no_grad():
        strange = strange_value | strange_key.any(-1, keepdim=True)
        # All keys that a row sees get equal weights, so that none is too small to detect.
        nothing = torch.zeros_like(query), torch.zeros_like(key)
        seen = attention(*nothing, strange.to(value.dtype), *_who_sees_whom(arguments))[0] > 0.0
        seen |= strange_query.any(-1, keepdim=True)
        plain = attention(query, key, value, *arguments)
        row_sees = seen.any(-1)
        changes = (seen, row_sees if row_sees.shape == plain[1].shape else row_sees.transpose(0, 1))
    output, lse = (
        # The gradient is that of the finite part: a NaN gradient would reach keys that the row does not see.
        result + torch.where(changed, other - result.detach(), 0.0)
        for result, other, changed in zip(results, plain, changes, strict=True)
    )
    return output, lse


def _who_sees_whom(arguments: AttentionArguments) -> tuple[Any, ...]:
    """Return the same call without the options that change scores; of a bias only its -inf entries stay."""
    return arguments._replace(
        bias=_hidden(arguments.bias),
        relative_bias=_hidden(arguments.relative_bias),
        alibi_slopes=None,
        head_scales=None,
        sinks=None,
        softcap=0.0,
        score_mod=None,
        scale=1.0,
        dropout_p=0.0,
        seed=None,
    )


def _hidden(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else torch.zeros_like(bias).masked_fill(bias == float("-inf"), float("-inf"))
