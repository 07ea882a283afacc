"""Tests of the pretraining module on its own; whole runs are in test_cli.py."""

import copy
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from fastformer.training.callbacks import StepSeed
from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.optimization import Optimization
from fastformer.training.pretraining import MaskedLanguageModeling, _masked_metrics

pytestmark = pytest.mark.quick

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PretrainingDataModule:
    folder = tmp_path_factory.mktemp("data")
    documents = [" ".join(f"Number {i} is {n} more than {i - n}." for n in range(1, 9)) for i in range(30)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return PretrainingDataModule(
        data=[str(folder / "text.txt")], vocab_size=300, max_length=40, tokens_per_batch=400, cache_dir=str(folder)
    )


def trainer(**arguments: object) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 3, **arguments},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0; got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0; got nan"),
        ({"eps": -1.0}, "eps must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0; got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\); got \(0.9, 1.0\)"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a whole number of steps or a share below 1; got 1.5"),
        ({"warmup_steps": -1}, "warmup_steps must be .* got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModeling(optimization=Optimization(**arguments))


def test_model_fits_the_data_and_overrides_win(data: PretrainingDataModule) -> None:
    module = MaskedLanguageModeling("bert-tiny", overrides={**TINY, "max_position_embeddings": 64})
    trainer().fit(module, datamodule=data)
    config = module.model.config
    assert (config.vocab_size, config.pad_token_id) == (len(data.tokenizer), data.tokenizer.pad_token_id)
    assert (config.hidden_size, config.max_position_embeddings) == (16, 64)


def test_checkpoint_loads_without_data_or_trainer(data: PretrainingDataModule, tmp_path: Path) -> None:
    module = MaskedLanguageModeling("bert-tiny", overrides=TINY, optimization=Optimization(0.002, betas=(0.5, 0.75)))
    fitted = trainer()
    fitted.fit(module, datamodule=data)
    fitted.save_checkpoint(tmp_path / "module.ckpt")
    loaded = MaskedLanguageModeling.load_from_checkpoint(tmp_path / "module.ckpt", weights_only=True)
    assert loaded.optimization == module.optimization
    assert loaded.model.config.max_position_embeddings == 40
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(("given", "steps"), [(0.5, 10), (5, 5), (0, 0)])
def test_warmup_is_a_share_or_a_number_of_steps(given: float, steps: int, data: PretrainingDataModule) -> None:
    module = MaskedLanguageModeling("bert-tiny", overrides=TINY, optimization=Optimization(1.0, warmup_steps=given))
    fitted = trainer(max_steps=20, limit_train_batches=0, limit_val_batches=0)
    fitted.fit(module, datamodule=data)
    module.trainer = fitted
    factor = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [step for step in range(20) if factor(step) == 1.0] == [steps]


def test_endless_training_is_refused(data: PretrainingDataModule) -> None:
    with pytest.raises(ValueError, match="give max_steps or max_epochs"):
        trainer(max_steps=-1, max_epochs=-1).fit(MaskedLanguageModeling("bert-tiny", overrides=TINY), datamodule=data)


def test_masked_metrics_by_hand() -> None:
    metrics = _masked_metrics(loss_sum=20.0, masked_tokens=10.0, pairs=100.0, correct=80.0, random=45.0)
    assert metrics == {
        "masked_tokens": 10.0,
        "sentence_pairs": 100.0,
        "mlm_loss": 2.0,
        "perplexity": pytest.approx(7.38905609893065),
        "nsp_accuracy": 0.8,
        "nsp_standard_error": pytest.approx(0.04),
        "nsp_chance": 0.55,
    }
    assert _masked_metrics(0.0, 0.0, 0.0, 0.0, 0.0) == {"masked_tokens": 0.0, "sentence_pairs": 0.0}


@pytest.mark.parametrize("next_sentence", [True, False])
def test_loss_and_gradient_of_a_step_are_those_of_all_its_labels(next_sentence: bool, tmp_path: Path) -> None:
    """Three batches with different numbers of masked tokens and pairs have the loss and gradient of one batch."""
    lengths = [3, 20, 7, 12, 30, 5] * 5
    documents = [". ".join(f"Number {n} of {i}" for n in range(length)) + "." for i, length in enumerate(lengths)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    data = PretrainingDataModule(
        data=[str(tmp_path / "text.txt")],
        vocab_size=300,
        max_length=40,
        tokens_per_batch=90,
        next_sentence=next_sentence,
        whole_word=True,
        mask_probability=0.3,
        heldout_fraction=0,
        cache_dir=str(tmp_path),
    )
    module = MaskedLanguageModeling(overrides={**TINY, "hidden_dropout_prob": 0.0})
    noticed = Noticed()
    fitted = trainer(max_steps=1, accumulate_grad_batches=3, callbacks=[noticed])
    fitted.fit(module, datamodule=data)

    model = noticed.model
    counts = [(len(batch["masked_positions"]), len(batch.get("next_sentence_label", ()))) for batch in noticed.batches]
    assert all(len(set(column)) > 1 for column in (zip(*counts, strict=True) if next_sentence else [counts]))
    parts = []
    for batch, (tokens, pairs) in zip(noticed.batches, counts, strict=True):
        output = model(**{name: value for name, value in batch.items() if name != "label_counts"})
        if next_sentence:
            parts.append(torch.stack([output.mlm_loss * tokens, output.nsp_loss * pairs]))
        else:
            parts.append((output.loss * tokens)[None])
    means = torch.stack(parts).sum(dim=0) / torch.tensor(counts).sum(dim=0)[: len(parts[0])]
    assert fitted.callback_metrics["train/mlm_loss"] == pytest.approx(means[0].item(), rel=1e-6)
    assert fitted.callback_metrics["train/loss"] == pytest.approx(means.sum().item(), rel=1e-6)
    expected = torch.autograd.grad(means.sum(), list(model.parameters()))
    for gradient, other in zip(noticed.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-7)


class Noticed(Callback):
    """A callback that notes the model before a step, and the step's batches and results."""

    def on_train_start(self, trainer: Trainer, pl_module: MaskedLanguageModeling) -> None:
        self.model = copy.deepcopy(pl_module.model)
        self.batches: list[dict] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: MaskedLanguageModeling, optimizer: object) -> None:
        self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters()]


def test_activation_checkpointing_changes_memory_alone(data: PretrainingDataModule) -> None:
    modules = [
        MaskedLanguageModeling(overrides={**TINY, "num_hidden_layers": 2}, activation_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    for module in modules:
        seed_everything(0, verbose=False)
        trainer(callbacks=[StepSeed(0)]).fit(module, datamodule=data)
        assert module.model.is_gradient_checkpointing == module.activation_checkpointing
    plain, checkpointed = (module.state_dict() for module in modules)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


class Rates(Callback):
    """A callback that notes the optimizer's learning rate at each optimizer step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.found.append(rate)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_of_every_step_of_a_run(schedule: str, data: PretrainingDataModule, tmp_path: Path) -> None:
    """The learning rate rises to the peak after the warm-up and falls to zero just after the last step.

    A resumed run continues in the same way.
    """
    shares = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    if schedule == "cosine":
        shares[2:] = [0.5 * (1 + math.cos(math.pi * (1 - share))) for share in shares[2:]]

    def run(steps: int, checkpoint: Path | None = None) -> list[float]:
        rates = Rates()
        optimization = Optimization(0.3, warmup_steps=2, schedule=schedule)
        module = MaskedLanguageModeling(overrides=TINY, optimization=optimization)
        fitted = trainer(max_steps=8, accumulate_grad_batches=2, callbacks=[rates, StopAt(steps)])
        fitted.fit(module, datamodule=data, ckpt_path=checkpoint)
        fitted.save_checkpoint(tmp_path / "last.ckpt")
        return rates.found

    wanted = [0.3 * share for share in shares]
    assert run(8) == pytest.approx(wanted)
    assert run(3) == pytest.approx(wanted[:3])
    assert run(8, tmp_path / "last.ckpt") == pytest.approx(wanted[3:])


class StopAt(Callback):
    """A callback that ends a run early, as a kill does. The schedule is that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step
