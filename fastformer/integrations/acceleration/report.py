"""What became of a model's modules."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Decision:
    """What became of one part of a model.

    Attributes:
        module: its name in the model, "" for the model itself.
        class_name: its class.
        part: what it was taken for: RMSNorm, feed-forward, attention, ...
        replaced: whether Fastformer now computes it.
        detail: by what, or why not.
    """

    module: str
    class_name: str
    part: str
    replaced: bool
    detail: str


@dataclass(frozen=True)
class Acceleration:
    """What `fastformer.accelerate` replaced in a model, what it left, and why, as printing it shows."""

    model: str
    decisions: list[Decision] = field(default_factory=list)

    @property
    def replaced(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.replaced]

    @property
    def left(self) -> list[Decision]:
        return [decision for decision in self.decisions if not decision.replaced]

    def to_json(self) -> str:
        """As JSON: `model` and `decisions`, each with the attributes of `Decision`."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{'replaced' if replaced else 'left'} {count} x {class_name} ({part}): {detail}"
            for (part, class_name, replaced, detail), count in self._kinds().items()
        ]
        return "\n".join([f"{self.model}: {len(self.replaced)} parts replaced, {len(self.left)} left", *lines])

    def _kinds(self) -> Counter[tuple[str, str, bool, str]]:
        """How many decisions are alike but for the module's name, in the order of the model."""
        return Counter((made.part, made.class_name, made.replaced, made.detail) for made in self.decisions)
