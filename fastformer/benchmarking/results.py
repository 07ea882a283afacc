"""The results of studies, kept in one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastformer.benchmarking.environment import Environment
from fastformer.benchmarking.measurement import Measurement, Metric
from fastformer.data.files import atomic_file
from fastformer.data.lines import json_file


@dataclass
class Results:
    """What was measured on a machine.

    Attributes:
        environment: of the whole run.
        quick: whether sizes were small: then the figures say nothing.
        studies: each finished study's measurements.
        seconds: what each study took.
    """

    environment: Environment
    quick: bool = False
    studies: dict[str, list[Measurement]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write them to `path`, whole or not at all."""
        with atomic_file(path) as file:
            file.write(json.dumps(asdict(self), indent=1).encode() + b"\n")


def load_results(path: Path) -> Results:
    """What `Results.save` wrote.

    Raises:
        ValueError: the file has something else.
    """
    try:
        found = json_file(path)
        return Results(
            environment=Environment(**found["environment"]),
            quick=found["quick"],
            studies={name: [_measurement(each) for each in study] for name, study in found["studies"].items()},
            seconds=found["seconds"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no results of `fastformer bench`: {error}") from error


def _measurement(fields: dict[str, Any]) -> Measurement:
    return Measurement(**{**fields, "metric": Metric(**fields["metric"])})
