"""Acceleration of a model's layers by Fastformer's operators, recognised by what they compute; and restoration."""

from fastformer.integrations.acceleration.model import accelerate, restore
from fastformer.integrations.acceleration.report import Acceleration, Decision

__all__ = ["Acceleration", "Decision", "accelerate", "restore"]
