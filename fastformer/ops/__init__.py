"""Operators: one file each, with the public function, its checks, registration, backward and PyTorch implementation."""

from fastformer.ops.softmax import softmax

__all__ = ["softmax"]
