"""Training steps recorded as CUDA graphs, here on a CPU, give the same weights.

Where graphs are impossible, there is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from recorded_graphs import FakeRecorder, Seen
from training.tasks import command, scratch

from fastformer import cli
from fastformer.extras import require
from fastformer.training import cuda_graphs
from fastformer.training.callbacks import StepSeed
from fastformer.training.cuda_graphs import RecordSteps
from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.pretraining import MODULES, PretrainingModule
from fastformer.training.progress import Throughput

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    """Return the recorders that runs make: as on a GPU, each records the steps of its run."""
    made: list[FakeRecorder] = []

    def recorder(device: torch.device) -> FakeRecorder:
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "CudaRecorder", recorder)
    monkeypatch.setattr(cuda_graphs, "why_no_graph", lambda model, device: None)
    return made


class Changes(Callback):
    """A callback that freezes a weight, and moves another one to other memory, in the middle of a run."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            layer = pl_module.model.model.layers[0]
            layer.feed_forward.up.weight.requires_grad_(False)
            layer.feed_forward.down.weight.data = layer.feed_forward.down.weight.data * 0.5


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PretrainingModule, Throughput]]:
    """Return a function that pretrains for a dozen steps, with dropout."""
    folder = tmp_path_factory.mktemp("data")
    documents = [" ".join(f"Number {i} is {n} more than {i - n}." for n in range(1, 9)) for i in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents))

    def fit(
        objective: str, few_shapes: bool, recorded: bool, dropout: float = 0.1, freezes: bool = False, **options: Any
    ) -> tuple[PretrainingModule, Throughput]:
        data = PretrainingDataModule(
            data=[str(folder / "text.txt")],
            objective=objective,
            vocab_size=400,
            max_length=40,
            tokens_per_batch=400,
            cache_dir=str(folder),
            few_shapes=few_shapes,
        )
        torch.manual_seed(0)
        module = MODULES[objective](overrides={**TINY, "hidden_dropout_prob": dropout})
        throughput = Throughput()
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[
                StepSeed(0),
                throughput,
                *([RecordSteps()] if recorded else []),
                *([Changes()] if freezes else []),
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_steps": 12, "gradient_clip_val": 0.5, **options},
        )
        trainer.fit(module, datamodule=data)
        return module, throughput

    return fit


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("mlm", {}),
        ("mlm", {"accumulate_grad_batches": 3, "max_steps": 6}),
        ("clm", {"precision": "bf16-mixed"}),
        ("span-corruption", {"accumulate_grad_batches": 2, "max_steps": 6}),
        ("denoising", {}),
        ("clm", {"freezes": True}),
    ],
)
def test_the_same_weights(objective: str, options: dict, fit: Callable, recorders: list[FakeRecorder]) -> None:
    """The weights are the same bit by bit, with dropout too: what is recorded is what would run."""
    with Seen():
        expected, _ = fit(objective, few_shapes=True, recorded=False, **options)
    found, _ = fit(objective, few_shapes=True, recorded=True, **options)
    assert len(recorders) == 1 and recorders[0].recordings
    for (name, weight), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert expected.trainer.callback_metrics.keys() == found.trainer.callback_metrics.keys()
    for name in ("train/loss", "val/loss", "train/learning_rate"):
        assert torch.equal(*(each.trainer.callback_metrics.get(name, torch.zeros(1)) for each in (expected, found)))
    assert found.recorded is None


@pytest.mark.parametrize("objective", MODULES)
def test_padding_counts_for_nothing(objective: str, fit: Callable) -> None:
    """Losses, weights and the counted tokens are those of batches without padding, up to the order of sums."""
    (expected, plain), (found, padded) = (
        fit(objective, few_shapes, False, dropout=0.0) for few_shapes in (False, True)
    )
    assert padded.tokens == plain.tokens
    for name in ("train/loss", "train/mlm_loss", "train/nsp_loss"):
        if name in expected.trainer.callback_metrics:
            torch.testing.assert_close(
                found.trainer.callback_metrics[name], expected.trainer.callback_metrics[name], rtol=1e-4, atol=1e-5
            )
    for (name, weight), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        # Adam divides even the smallest gradients by their size.
        assert (weight - other).abs().mean() < 2e-5, name


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classify", ["--class_weights", "[1.0, 2.0]"]),
        ("tag", []),
        ("qa", ["--lora"]),
        ("summarize", ["--accumulate", "2"]),
        ("generate", []),
    ],
)
def test_finetuning(
    task: str, options: list[str], data: Path, base: dict[str, Path], tmp_path: Path, recorders: list[FakeRecorder]
) -> None:
    require("jsonargparse")
    start = ["--model", str(base["ours"])] if "--lora" in options else scratch("--overrides.hidden_dropout_prob=0")
    found = []
    for number, graphs in enumerate(([], ["--cuda_graphs"])):
        output = tmp_path / str(number)
        assert cli.main([*command(task, data, output), *start, *options, *graphs]) == 0
        found.append(json.loads((output / "metrics.json").read_text()))
    assert recorders[0].recordings
    assert found[1]["tokens"] == found[0]["tokens"]
    assert found[1]["end"]["loss"] == pytest.approx(found[0]["end"]["loss"], rel=2e-3)


def test_where_there_are_none(
    data: Path, base: dict[str, Path], tmp_path: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where CUDA graphs are impossible, the command is refused before anything is trained or measured."""

    def refused(arguments: list[str], message: str) -> None:
        capsys.readouterr()
        assert cli.main([*arguments, "--cuda_graphs"]) == 2
        error = capsys.readouterr().err
        assert f"--cuda_graphs is impossible here, because {message}" in error

    pretrain = [*tiny_run, "--output", str(tmp_path / "pretrain")]
    finetune = [*command("classify", data, tmp_path / "finetune"), "--model", str(base["ours"])]
    refused(pretrain, "the model is on cpu")
    refused([*pretrain, "--strategy", "ddp"], "graphs are for one device, but the strategy is for several")
    refused([*pretrain, "--activation_checkpointing"], "--activation_checkpointing keeps the state of random numbers")
    refused([*pretrain, "--compile"], "--compile makes its own graphs")
    refused([*finetune, "--adversarial", "fgm"], "adversarial training has a backward inside its forward")
    refused([*finetune, "--privacy_epsilon", "8"], "differential privacy takes one example at a time")
    theirs = [*command("classify", data, tmp_path / "finetune"), "--model", str(base["bert"])]
    refused(theirs, "only Fastformer's own models take packed batches")
    embed = [*command("embed", data, tmp_path / "embed"), *scratch()]
    refused(embed, "embeddings are compared with all sequences of a batch")
