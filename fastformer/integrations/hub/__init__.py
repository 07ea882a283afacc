"""Export of layers as a kernel that Hugging Face's `kernels` package loads."""
