"""Attention and what belongs to it.

`attention` has the public operator, its arguments and its checks, and calls a kernel or `torch_backend`, which chooses
between PyTorch's fused attention (`flash`) and plain products (`explicit`), for packed sequences one by one
(`segments`).
`decode`, `cache` and `merge` serve generation. `scaled_dot_product_attention` has PyTorch's signature.
"""
