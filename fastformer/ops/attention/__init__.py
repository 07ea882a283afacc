"""The attention operators and their implementations in PyTorch.

`attention` has the public operator, its arguments and its checks. It calls a kernel or `torch_backend`.
`torch_backend` uses PyTorch's fused attention (`flash`) or plain matrix products (`explicit`). It handles the sequences
of a packed call one by one (`segments`).
`decode`, `cache` and `merge` serve generation. `scaled_dot_product_attention` has PyTorch's signature.
"""
