"""The plan of a training run as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastformer.console import Table
from fastformer.planning.needs import Plan, Run, Setup
from fastformer.planning.quantities import duration, gibibytes, in_billions, with_prefix

_NOTE = (
    "Computed, not measured. Operations are the model's forward and backward, without recomputation. If communication "
    "takes nearly as long as a step, the given utilisation cannot be reached."
)


@dataclass(frozen=True)
class PlanReport:
    """A planned training run, and what it needs.

    Attributes:
        model: the name of the preset or of the model's folder.
        setup: the settings of the run.
        plan: what the run needs.
        run: the whole run; None if its length is not known.
        fits_with: changes with which it would fit, as options of the command; None if it fits or nothing helps.
    """

    model: str
    setup: Setup
    plan: Plan
    run: Run | None
    fits_with: str | None

    def as_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "model": self.model,
            "setup": asdict(self.setup),
            "plan": {**asdict(self.plan), "memory_total": self.plan.memory.total, "fits": self.plan.fits},
            "run": None if self.run is None else asdict(self.run),
            "fits_with": self.fits_with,
        }

    def as_text(self) -> str:
        """The report for people: what is planned, a table of memory and one of time."""
        setup, found = self.setup, self.plan
        parts = f", {setup.tensor_parallel}-way tensor-parallel" if setup.tensor_parallel > 1 else ""
        checkpointing = ", checkpointing" if setup.checkpointing else ""
        head = (
            f"{self.model}, {in_billions(found.parameters)} parameters, on {setup.devices} x {setup.gpu.name} "
            f"({setup.gpu.source})\n{setup.strategy}{parts}, {setup.precision}, {setup.optimizer}{checkpointing}"
        )
        tables = f"{head}\n\n{_memory_table(found)}\n\n{_time_table(setup, found, self.run)}"
        return f"{tables}\nit fits with {self.fits_with}" if self.fits_with else tables


def _memory_table(found: Plan) -> Table:
    rows = [(part, gibibytes(size)) for part, size in asdict(found.memory).items()]
    rows += [("total", gibibytes(found.memory.total)), ("usable", gibibytes(found.available))]
    rows.append(("", "fits" if found.fits else "does not fit"))
    return Table(("", ""), rows, "lr", title="memory of each device")


def _time_table(setup: Setup, found: Plan, run: Run | None) -> Table:
    accumulation = f" x {found.accumulation} batches" if found.accumulation > 1 else ""
    rows = {
        "examples per step": f"{found.batch_size} x {setup.copies} copies{accumulation}",
        "tokens per step": f"{found.tokens:,}",
        "operations per token": with_prefix(found.flops_per_token, "FLOP"),
        "  share of attention": f"{found.attention_share:.1%}",
        "operations per step": with_prefix(found.flops, "FLOP"),
        "tokens per second": f"{found.tokens_per_second:,.0f}",
        "time of a step": duration(found.seconds),
        "  communication, not overlapped": duration(found.communication),
    }
    if run is not None:
        rows |= {
            "tokens": in_billions(run.tokens),
            "steps": f"{run.steps:,}",
            "operations": f"{run.flops:.3g} FLOP",
            "time": duration(run.seconds),
            "GPU hours": f"{run.gpu_hours:,.0f}",
        }
        if run.price is not None:
            rows["price"] = f"{run.price:,.0f}"
    title = f"operations and time, at {setup.mfu:.0%} of the peak"
    return Table(("", ""), list(rows.items()), "lr", title=title, note=_NOTE)
