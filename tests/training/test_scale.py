"""Several processes train as one does. A run continues with another number of processes, or with another strategy."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.processes import finish, start
from training.tasks import command, scratch

STEPS = 6
ONE = ("--devices", "1", "--strategy", "auto", "--accumulate", "2")
TWO = {name: ("--devices", "2", "--strategy", name, "--accumulate", "1") for name in ("ddp", "fsdp2")}
TENSOR_PARALLEL = ("--devices", "2", "--strategy", "fsdp2", "--tensor_parallel", "2", "--accumulate", "2")
KILL = ("--trainer.callbacks", '[{"class_path": "training.killing.Kill", "init_args": {"step": 5}}]')

# The task of each fine-tuning run, the model that it starts from, and its options.
FINE_TUNING: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "classify": ("classify", "scratch", ("--class_weights", "balanced", "--optimizer.layer_decay", "0.8")),
    "qa": ("qa", "scratch", ()),
    "summarize": ("summarize", "scratch", ("--activation_checkpointing",)),
    "adversarial": ("classify", "ours", ("--adversarial", "fgm", "--adversary.epsilon", "0.05")),
    "lora": ("tag", "bert", ("--lora",)),
    "embed": ("embed", "bert", ()),
}

Options = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def options(tiny_run: list[str], data: Path, base: dict[str, Path]) -> Options:
    """Return a function that gives the command line of a run by name.

    The runs have no dropout, because its draws depend on the rank. A large addend to Adam's denominator makes the steps
    depend on the scale of the gradients.
    """

    def of(name: str) -> list[str]:
        if name == "pretrain":
            sensitive = ("--optimizer.eps", "1", "--optimizer.learning_rate", "1")
            return [*tiny_run, "--max_steps", str(STEPS), "--overrides.hidden_dropout_prob", "0", *sensitive]
        task, origin, more = FINE_TUNING[name]
        model = scratch("--overrides.hidden_dropout_prob=0") if origin == "scratch" else ["--model", str(base[origin])]
        often = ("--max_steps", str(STEPS), "--evaluate_every", "2", "--trainer.log_every_n_steps", "1")
        sensitive = ("--optimizer.eps=1", "--optimizer.learning_rate=1")
        return [*command(task, data, Path("absent")), *model, *often, *sensitive, "--tokens_per_batch", "128", *more]

    return of


@pytest.fixture(scope="module")
def one(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the output folder of a run in one process."""
    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("one") / "output"
            finish(start([*options(name), *ONE, "--output", str(folders[name])]))
            assert len(curve(folders[name])) == STEPS
        return folders[name]

    return of


def curve(output: Path) -> list[float]:
    """Return the loss of each optimizer step. If a resumed run repeats a step, the later loss counts."""
    losses: dict[int, float] = {}
    for version in sorted(output.glob("logs/csv/*")):
        with (version / "metrics.csv").open() as file:
            losses |= {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    return [losses[step] for step in sorted(losses)]


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def predictions(output: Path) -> list[Any]:
    """Return the predictions in order, or an empty list for a pretraining run."""
    if not (output / "predictions.jsonl").exists():
        return []
    return [json.loads(line).get("prediction") for line in (output / "predictions.jsonl").read_text().splitlines()]


def assert_same_run(output: Path, one: Path) -> None:
    """Check that two runs are the same, up to the rounding of sums in another order."""
    assert curve(output) == pytest.approx(curve(one), rel=1e-5)
    found, expected = metrics(output), metrics(one)
    assert found["end"] == pytest.approx(expected["end"], rel=1e-5)
    assert (found["steps"], found["tokens"]) == (expected["steps"], expected["tokens"])
    assert predictions(output) == predictions(one)
    assert found.get("test", {}) == pytest.approx(expected.get("test", {}), rel=1e-4)
    weights, others = (load_file(folder / "model/model.safetensors") for folder in (output, one))
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in others.items()
    }


@pytest.mark.parametrize("strategy", TWO)
@pytest.mark.parametrize("name", ["pretrain", *FINE_TUNING])
def test_two_processes_have_the_loss_curve_of_one(
    name: str, strategy: str, options: Options, one: Callable[[str], Path], tmp_path: Path
) -> None:
    finish(start([*options(name), *TWO[strategy], "--output", str(tmp_path / "output")], ranks=2))
    assert_same_run(tmp_path / "output", one(name))


@pytest.mark.parametrize("objective", ["mlm", "clm", "span-corruption", "denoising"])
def test_tensor_parallel_processes_have_the_loss_curve_of_one(objective: str, options: Options, tmp_path: Path) -> None:
    started = [*options("pretrain"), "--objective", objective, "--overrides.num_attention_heads", "4"]
    if objective == "clm":
        started += ["--overrides.num_key_value_heads", "2", "--overrides.position_embedding", "alibi"]
    finish(start([*started, *ONE, "--output", str(tmp_path / "one")]))
    ranks, more = 2, TENSOR_PARALLEL
    if objective == "denoising":
        started += ["--activation_checkpointing"]
    if objective == "mlm":  # two pairs of processes
        ranks, more = 4, (*TENSOR_PARALLEL, "--devices", "4", "--accumulate", "1")
    finish(start([*started, *more, "--output", str(tmp_path / "parallel")], ranks=ranks))
    assert_same_run(tmp_path / "parallel", tmp_path / "one")


@pytest.mark.parametrize("strategy", TWO)
def test_processes_stop_together_with_the_best_weights(strategy: str, options: Options, tmp_path: Path) -> None:
    """Processes stop together with the best weights.

    With a small learning rate, the accuracy does not change after the first step.
    """
    stopping = ("--patience", "1", "--monitor", "accuracy", "--optimizer.learning_rate=1e-3", "--evaluate_every", "1")
    started = [*options("classify"), *stopping]
    finish(start([*started, *ONE, "--output", str(tmp_path / "one")]))
    finish(start([*started, *TWO[strategy], "--output", str(tmp_path / "two")], ranks=2))
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert metrics(tmp_path / "two")["steps"] == 2
    best = torch.load(tmp_path / "two/best.pt", weights_only=True)["weights"]
    last = torch.load(tmp_path / "two/checkpoints/step-0000002.ckpt", weights_only=True)["state_dict"]
    saved = load_file(tmp_path / "two/model/model.safetensors")
    assert all(torch.equal(saved[name], best[f"model.{name}"]) for name in saved)
    assert not any(torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("pretrain", (2, TWO["fsdp2"]), (1, ONE)),
        ("pretrain", (1, ONE), (2, TWO["fsdp2"])),
        ("pretrain", (2, TWO["ddp"]), (1, ONE)),
        ("pretrain", (2, TENSOR_PARALLEL), (2, (*TWO["ddp"], "--tensor_parallel", "1"))),
        ("pretrain", (2, TWO["fsdp2"]), (2, TENSOR_PARALLEL)),
        ("classify", (2, TWO["fsdp2"]), (1, ONE)),
        ("classify", (1, ONE), (2, TWO["ddp"])),
        ("lora", (2, TWO["ddp"]), (2, TWO["fsdp2"])),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes_or_strategy(
    name: str,
    before: tuple[int, Sequence[str]],
    after: tuple[int, Sequence[str]],
    options: Options,
    one: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "output"
    started = [*options(name), *before[1], *KILL, "--output", str(output)]
    for process in (killed := start(started, ranks=before[0])):
        process.join(120)
    assert all(process.exitcode for process in killed)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-0000002.ckpt",
        "step-0000004.ckpt",
    ]
    command = started[: 1 if name == "pretrain" else 2]
    resume = [*command, "--resume", "--output", str(output), *after[1], "--trainer.callbacks", "null"]
    finish(start(resume, ranks=after[0]))
    assert_same_run(output, one(name))
