"""The report of a fine-tuning run: Markdown with its metrics, pictures and some predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastformer import markdown
from fastformer.console import Table
from fastformer.training.tasks import Recipe

_SHOWN = 8
_LONGEST = 160


class FineTuningReport:
    """The report of a run.

    Args:
        metrics: the content of metrics.json.
        recipe: the recipe of the task.
        examples: the test examples.
        lines: predictions for the test examples, with references.
    """

    def __init__(
        self,
        metrics: dict[str, Any],
        recipe: Recipe,
        examples: Sequence[Any],
        lines: Sequence[dict[str, Any]],
    ) -> None:
        self.metrics = metrics
        self.recipe = recipe
        self.examples = examples
        self.lines = lines

    def headings(self) -> list[str]:
        """Return the headings of the metric columns."""
        return ["before", "after", "test", *(f"test: {name}" for name in self.metrics["baselines"])]

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each metric.

        Its values are those before and after training on the validation examples, then those on the test examples, of
        the model and of each trivial baseline.
        """
        parts = [self.metrics[part] or {} for part in ("start", "end")]
        parts += [self.metrics["test"], *self.metrics["baselines"].values()]
        names = [name for name in dict.fromkeys(name for part in parts for name in part) if name != "step"]
        return [(name, *(_number(part.get(name)) for part in parts)) for name in names]

    def table(self) -> Table:
        """Return the metrics as a table for a terminal."""
        counts = self.metrics["examples"]
        title = f"{self.metrics['task']}: {counts['validation']:,} validation, {counts['test']:,} test examples"
        headings = self.headings()
        return Table(("metric", *headings), self.rows(), f"l{'r' * len(headings)}", title)

    def write(self, path: Path, curve: Path, confusion: Path) -> None:
        """Write the report to `path`, and for classes the confusion matrix to `confusion`, a PNG file.

        Both are in the folder of `curve`, the picture of the losses.
        """
        pictures = [markdown.picture("losses in training and on held-out examples", curve)]
        if self.metrics["test"] and self.recipe.draw_confusion(self.lines, confusion):
            pictures.append(markdown.picture("confusion matrix of the test examples", confusion))
        shown = zip(self.examples[:_SHOWN], self.lines, strict=False)
        parts = [
            self._facts(),
            "## Metrics",
            _table(("metric", *self.headings()), self.rows()),
            *pictures,
            "## Predictions",
            _table(
                ("example", "expected", "predicted"),
                [
                    (
                        _short(self.recipe.shown(example)),
                        _short(str(line.get("reference", line.get("references", "")))),
                        _short(str(line.get("prediction", line.get("similarity")))),
                    )
                    for example, line in shown
                ],
            ),
        ]
        markdown.write_report(path, f"Fine-tuning: {self.metrics['task']}", parts)

    def _facts(self) -> str:
        metrics = self.metrics
        facts = {
            "started from": markdown.text(metrics["started_from"]),
            "parameters": f"{metrics['parameters']:,}, of which {metrics['trained_parameters']:,} are trained",
            "attention": metrics["attention"],
            "examples": ", ".join(f"{count:,} {part}" for part, count in metrics["examples"].items()),
            "steps": f"{metrics['steps']:,}",
            "tokens": f"{metrics['tokens']:,} at {metrics['tokens_per_second']:,.0f} a second",
            "device": f"{metrics['devices']} x {metrics['device']}, {metrics['precision']}",
            "peak memory": f"{(metrics['peak_memory'] or float('nan')) / 1e9:.2f} GB",
            "time": f"{metrics['wall_seconds']:,.0f} s",
        }
        if "privacy" in metrics:
            facts["privacy"] = "epsilon {epsilon:.3f} at delta {delta:.1e}".format(**metrics["privacy"])
        return markdown.facts(facts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return markdown.text(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown.table(headings, "l" * len(headings), rows)
