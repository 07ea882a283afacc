"""`accelerate` puts a model's layers on Fastformer's operators, recognised by what they compute; `restore` undoes it."""

from fastformer.integrations.acceleration.model import accelerate, restore
from fastformer.integrations.acceleration.report import Acceleration, Decision

__all__ = ["Acceleration", "Decision", "accelerate", "restore"]
