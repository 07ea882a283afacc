"""The paged cache of `generate_batch`, for releases of transformers whose attention function must update it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PagedKeys(NamedTuple):
    """The keys that the new tokens of several requests attend to: each request's cached ones, and the new ones.

    Attributes:
        key, value: (1, kv_heads, keys, head_dim), one request after the other.
        cu_seqlens: (requests + 1,), the boundaries of the requests.
        longest: the number of keys of the longest request.
    """

    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    longest: int


def updated_pages(module: torch.nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> PagedKeys:
    """Write a layer's new keys and values, (1, kv_heads, new tokens, head_dim), into its paged cache.

    Args:
        module: the layer.
        arguments: those that transformers passes to paged attention: `cache`, the places to read and write in it, and
            the boundaries and longest lengths of the keys, by type of layer if the model has several.

    Raises:
        ValueError: there is no cache.
    """
    cache = arguments.get("cache")
    if cache is None:
        raise ValueError(
            "max_seqlen_q and max_seqlen_k belong to continuous batching, which has a cache; a packed batch gives its "
            "longest lengths as max_length_q and max_length_k"
        )
    layer = module.layer_idx
    if "max_seqlen_k" in arguments:  # before transformers 5.19
        key, value = cache.update(key, value, layer, arguments["read_index"], arguments["write_index"])
        key, value = (each.transpose(0, 1).unsqueeze(0) for each in (key, value))
        lengths = arguments["cu_seq_lens_k"], arguments["max_seqlen_k"]
        if isinstance(lengths[0], dict):
            kind = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
            lengths = lengths[0][kind], lengths[1][kind]
        return PagedKeys(key, value, *lengths)
    arguments = dict(arguments)
    key, value = cache.update(key, value, layer, arguments)
    return PagedKeys(key, value, arguments["cu_seq_lens_k"], arguments["max_length_k"])
