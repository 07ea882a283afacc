"""A model's layers, recognised by what they compute, on Fastformer's operators; and back."""

from fastformer.integrations.acceleration.model import accelerate, restore
from fastformer.integrations.acceleration.report import Acceleration, Decision

__all__ = ["Acceleration", "Decision", "accelerate", "restore"]
