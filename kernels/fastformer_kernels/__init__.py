"""Hand-written Triton kernels for the Transformer: tensors in, tensors out, no autograd and no modules."""
