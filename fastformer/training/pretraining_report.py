"""The report of a pretraining run: Markdown with its losses, their picture and a sample of the model's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastformer import markdown
from fastformer.console import Table

_HEADINGS = ("on held-out text", "before", "after")


class PretrainingReport:
    """The report of a run.

    Args:
        objective: the objective of the run.
        metrics: the content of metrics.json.
    """

    def __init__(self, objective: str, metrics: dict[str, Any]) -> None:
        self.objective = objective
        self.metrics = metrics

    def table(self) -> Table | None:
        """Return the losses before and after training as a table for a terminal; None if no text was held out."""
        return Table(_HEADINGS, self._rows(), "lrr", self._caption()) if self.metrics["end"] else None

    def write(self, path: Path, curve: Path) -> None:
        """Write the report to `path`; `curve` is the picture of the losses, in the same folder."""
        parts = []
        if self.metrics["end"]:
            table = markdown.table(_HEADINGS, "lrr", self._rows())
            parts = [f"{self._caption()}:", table, markdown.picture("loss in training and on held-out text", curve)]
        sample = self.metrics["sample"]
        parts += [
            self._facts(),
            "## What it says",
            markdown.block(sample["given"]),
            "becomes",
            markdown.block(sample["answer"]),
        ]
        markdown.write_report(path, f"Pretraining: {self.objective}", parts)

    def _facts(self) -> str:
        metrics = self.metrics
        return markdown.facts(
            {
                "steps": f"{metrics['steps']:,}",
                "parameters": f"{metrics['parameters']:,}",
                "tokens": f"{metrics['tokens']:,}, at {metrics['tokens_per_second']:,.0f} tokens/s",
                "device": f"{metrics['devices']} x {metrics['device']}, {metrics['precision']}",
                "peak memory": f"{(metrics['peak_memory'] or float('nan')) / 1e9:.2f} GB",
                "model": f"{markdown.code(metrics['model'])}, in Hugging Face's format",
            }
        )

    def _caption(self) -> str:
        end = self.metrics["end"]
        if "masked_tokens" in end:
            return f"{end['masked_tokens']:,.0f} masked tokens and {end['sentence_pairs']:,.0f} pairs of held-out text"
        return f"{end['tokens']:,.0f} predicted tokens of held-out text"

    def _rows(self) -> list[tuple[str, str, str]]:
        start, end = self.metrics["start"], self.metrics["end"]
        name, label = ("mlm_loss", "masked-LM loss (nats)") if "mlm_loss" in end else ("loss", "loss (nats)")
        rows = [
            (label, f"{start[name]:.3f}", f"{end[name]:.3f}"),
            ("  change", "", f"{end[name] - start[name]:+.3f}"),
            ("perplexity", f"{start['perplexity']:,.1f}", f"{end['perplexity']:,.1f}"),
        ]
        if "nsp_accuracy" in end:
            before, after = (f"{at['nsp_accuracy']:.1%} ± {at['nsp_standard_error']:.1%}" for at in (start, end))
            rows.append(("next-sentence accuracy ± standard error", before, after))
            before, after = (f"{at['nsp_chance']:.1%}" for at in (start, end))
            rows.append(("  chance: always the commoner answer", before, after))
        return rows
