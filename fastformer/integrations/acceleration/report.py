"""A report on the acceleration of a model's modules."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Decision:
    """The result for one part of a model.

    Attributes:
        module: the part's name in the model, "" for the model itself.
        class_name: the part's class.
        part: the kind that it was recognised as: RMSNorm, feed-forward, attention, ...
        replaced: whether Fastformer now computes it.
        detail: what replaced it, or why it was not replaced.
    """

    module: str
    class_name: str
    part: str
    replaced: bool
    detail: str


@dataclass(frozen=True)
class Acceleration:
    """The parts of a model that `fastformer.accelerate` replaced, and the others with the reason; it can be printed."""

    model: str
    decisions: list[Decision] = field(default_factory=list)

    @property
    def replaced(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.replaced]

    @property
    def left(self) -> list[Decision]:
        return [decision for decision in self.decisions if not decision.replaced]

    def to_json(self) -> str:
        """Return JSON: `model` and `decisions`, each with the attributes of `Decision`."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{'replaced' if replaced else 'left'} {count} x {class_name} ({part}): {detail}"
            for (part, class_name, replaced, detail), count in self._kinds().items()
        ]
        return "\n".join([f"{self.model}: {len(self.replaced)} parts replaced, {len(self.left)} left", *lines])

    def _kinds(self) -> Counter[tuple[str, str, bool, str]]:
        """Count the decisions that differ only in the module's name, in the order of the model."""
        return Counter((made.part, made.class_name, made.replaced, made.detail) for made in self.decisions)
