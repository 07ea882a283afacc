"""The choice of a GPU's attention for transformers models: our operator, or PyTorch's where it was measured faster."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.backends import HAS_TRITON, selected_backend
from fastformer.integrations.attention.mask import MaskStructure
from fastformer.integrations.attention.sdpa import Sdpa, sdpa_call


def choose(
    structure: MaskStructure | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> Sdpa | None:
    """Return SDPA's call if `fastformer tune` found SDPA faster on this GPU for such calls; else None, our operator.

    What was measured is self-attention without padding, window, bias or dropout, causal or full. For everything else
    our operator runs: SDPA would need a dense mask, or draw other random numbers.

    Args:
        structure: who may attend to whom; None if only a dense mask says it.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv_heads, keys, head_dim).
        bias: added to the scores, or None.
        dropout_p: the probability with which a weight is dropped.
    """
    if not _leaves_choice(query) or structure is None or bias is not None or dropout_p:
        return None
    if structure.is_packed or structure.key_mask is not None or structure.key_lengths is not None:
        return None
    call = sdpa_call(structure, query.shape[2], key.shape[2])
    if call is None or query.shape[2:] != key.shape[2:] or key.shape != value.shape:
        return None
    from fastformer_kernels.attention.plan import attention_plan

    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    plan = attention_plan(query, key, causal=call.causal, trained=trained)
    return None if plan.fastformer else call._replace(cudnn=plan.cudnn)


def _leaves_choice(query: Tensor) -> bool:
    """Whether a call runs by kernels on a GPU, no backend was chosen, and results may differ from run to run."""
    free = selected_backend() == "auto" and not torch.are_deterministic_algorithms_enabled()
    return free and _runs_on_gpu(query)


def _runs_on_gpu(query: Tensor) -> bool:
    return query.is_cuda and HAS_TRITON
