"""Fastformer's attention inside Hugging Face models, `attn_implementation="fastformer"`.

`registration` tells transformers the name; `mask` is the mask function; `forward` is the attention function of each
layer; `on_cpu` and `on_gpu` choose PyTorch's attention where that is faster, by the call of it that `sdpa` finds;
`paged_cache` serves continuous batching.
"""
