"""The pretraining module on its own; whole runs are in test_cli.py."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from fastformer.data import PretrainingDataModule
from fastformer.training.pretraining import MaskedLanguageModeling, _masked_metrics

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
        MaskedLanguageModeling(**arguments)


def test_model_fits_the_data_and_overrides_win(data: PretrainingDataModule) -> None:
    module = MaskedLanguageModeling("bert-tiny", overrides={**TINY, "max_position_embeddings": 64})
    trainer().fit(module, datamodule=data)
    config = module.model.config
    assert (config.vocab_size, config.pad_token_id) == (len(data.tokenizer), data.tokenizer.pad_token_id)
    assert (config.hidden_size, config.max_position_embeddings) == (16, 64)


def test_checkpoint_loads_without_data_or_trainer(data: PretrainingDataModule, tmp_path: Path) -> None:
    module = MaskedLanguageModeling("bert-tiny", overrides=TINY, learning_rate=0.002)
    fitted = trainer()
    fitted.fit(module, datamodule=data)
    fitted.save_checkpoint(tmp_path / "module.ckpt")
    loaded = MaskedLanguageModeling.load_from_checkpoint(tmp_path / "module.ckpt", weights_only=True)
    assert loaded.learning_rate == 0.002
    assert loaded.model.config.max_position_embeddings == 40
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(("given", "steps"), [(0.5, 10), (5, 5), (0, 0)])
def test_warmup_is_a_share_or_a_number_of_steps(given: float, steps: int, data: PretrainingDataModule) -> None:
    module = MaskedLanguageModeling("bert-tiny", overrides=TINY, learning_rate=1.0, warmup_steps=given)
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
