"""The results of studies, kept in one JSON file."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastformer.benchmarking.environment import Environment
from fastformer.benchmarking.measurement import Measurement, Metric
from fastformer.files import atomic_file
from fastformer.lines import json_file


@dataclass
class Results:
    """The measurements of a run on a machine.

    Attributes:
        environment: the environment of the whole run.
        quick: whether sizes were small. If so, the figures mean nothing.
        studies: the measurements of each finished study.
        seconds: the duration of each study.
    """

    environment: Environment
    quick: bool = False
    studies: dict[str, list[Measurement]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the results to `path` atomically, one line for each measurement."""
        head = {"environment": asdict(self.environment), "quick": self.quick, "seconds": self.seconds}
        studies = [f"{json.dumps(name)}: {_lines(each)}" for name, each in self.studies.items()]
        text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "studies": {\n' + ",\n".join(studies) + "\n }\n}\n"
        with atomic_file(path) as file:
            file.write(text.encode())


def load_results(path: Path) -> Results:
    """Load the results that `Results.save` wrote.

    Raises:
        ValueError: the file contains something else.
    """
    try:
        found = json_file(path)
        return Results(
            environment=Environment(**found["environment"]),
            quick=found["quick"],
            studies={name: [_measurement(name, each) for each in study] for name, study in found["studies"].items()},
            seconds=found["seconds"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no results of `fastformer bench`: {error}") from error


def _lines(measurements: list[Measurement]) -> str:
    """A JSON list with one line for each measurement."""
    return "[\n" + ",\n".join(map(_line, measurements)) + "\n]"


def _line(measurement: Measurement) -> str:
    """The measurement as one line of JSON, without the name of its study, which is the key of its list."""
    found = {**_fields_not_default(measurement), "metric": _fields_not_default(measurement.metric)}
    del found["study"]
    return json.dumps(found)


def _fields_not_default(instance: Measurement | Metric) -> dict[str, Any]:
    """The fields of a dataclass whose values differ from their defaults."""
    found = {}
    for each in fields(instance):
        value = getattr(instance, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if value != default:
            found[each.name] = value
    return found


def _measurement(study: str, found: dict[str, Any]) -> Measurement:
    return Measurement(**{**found, "study": study, "metric": Metric(**found["metric"])})
