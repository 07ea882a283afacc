"""The strategies and optimisers that a training run can be planned with, under Lightning's names."""

from __future__ import annotations

STRATEGIES = ("ddp", "fsdp", "zero-1", "zero-2", "zero-3")
"""PyTorch's DDP and FSDP2, and DeepSpeed's ZeRO, as Lightning runs them."""

OPTIMIZERS = {"adamw": 2, "sgd": 1}
"""Optimisers, and how many numbers each keeps for a parameter: AdamW two moments, SGD its momentum."""
