"""What a training run can be planned with, named as Lightning names it."""

from __future__ import annotations

STRATEGIES = ("ddp", "fsdp", "zero-1", "zero-2", "zero-3")
"""PyTorch's DDP and FSDP2, and DeepSpeed's ZeRO, as Lightning runs them."""

OPTIMIZERS = {"adamw": 2, "sgd": 1}
"""Optimisers, and the numbers that each keeps for a parameter: two moments; momentum."""
