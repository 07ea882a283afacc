"""Fastformer's attention inside Hugging Face models, `attn_implementation="fastformer"`.

`registration` tells transformers the name; `mask` is the mask function; `forward` is the attention function of each
layer; `on_cpu` chooses PyTorch's attention where that is faster; `paged_cache` serves continuous batching.
"""
