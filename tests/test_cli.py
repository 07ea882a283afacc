"""The command: its help, its errors, and pretraining, from the arguments to a model that transformers can use."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastformer import cli
from fastformer.extras import require
from fastformer.stopping import STATUS

pytestmark = pytest.mark.cpu

TESTS = Path(__file__).parent
needs_jsonargparse = pytest.mark.skipif(
    find_spec("jsonargparse") is None, reason="`fastformer pretrain` needs jsonargparse"
)
SUBJECTS, VERBS, OBJECTS = ("cat", "dog", "bird", "fish"), ("eats", "sees", "likes"), ("rice", "bread", "water", "milk")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of twelve sentences, each document about one kind of food."""
    chosen = random.Random(0)
    documents = []
    for _ in range(60):
        food = chosen.choice(OBJECTS)
        sentences = [f"Today the {chosen.choice(SUBJECTS)} {chosen.choice(VERBS)} the {food} here." for _ in range(12)]
        documents.append("\n".join(sentences))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="session")
def options(corpus: Path) -> list[str]:
    """The options of a run of two seconds that crosses epochs, with dropout everywhere."""
    require("jsonargparse")
    return [
        "pretrain",
        *("--data", str(corpus), "--preset", "bert-tiny", "--accelerator", "cpu", "--devices", "1"),
        *("--max_steps", "14", "--evaluate_every", "3", "--accumulate", "2", "--optimizer.learning_rate", "0.01"),
        *("--overrides.hidden_size", "32", "--overrides.intermediate_size", "64"),
        *("--overrides.attention_probs_dropout_prob", "0.1"),
        *("--cache_dir", str(corpus.parent / "cache"), "--vocab_size", "300"),
        *("--max_length", "48", "--tokens_per_batch", "1024", "--corpus.heldout_fraction", "0.2"),
        *("--trainer.log_every_n_steps", "2"),
    ]


@pytest.fixture(scope="session")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run without interruption."""
    output = tmp_path_factory.mktemp("run") / "output"
    assert cli.main([*options, "--output", str(output)]) == 0
    return output


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def python(*arguments: str, path: str = "") -> subprocess.CompletedProcess:
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [path, inherited]))}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run a command line that must fail, and return its one line of error."""
    assert cli.main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


# --- The command itself -----------------------------------------------------------------------------------------------


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fastformer.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)))"
    )
    shown = python("-c", code).stdout.splitlines()
    assert any(line.strip().startswith("pretrain ") for line in shown)
    assert shown[-1] == "[]"


@pytest.mark.quick
def test_unknown_command_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrian"])
    assert exit.value.code == 2
    assert "'pretrian' (choose from" in capsys.readouterr().err


@pytest.mark.quick
@needs_jsonargparse
def test_unknown_option_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "--max_stepps", "3"])
    assert exit.value.code == 2
    assert "max_stepps" in capsys.readouterr().err


@needs_jsonargparse
def test_unknown_precision_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "--precision", "12"])
    assert exit.value.code == 2
    assert "'12' (choose from" in capsys.readouterr().err


@needs_jsonargparse
def test_pretrain_help_has_examples(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "  fastformer pretrain --resume" in shown
    assert "--optimizer.learning_rate" in shown
    assert "--tokens_per_batch" in shown
    assert "--trainer.gradient_clip_val" in shown


def test_printed_config_is_accepted(capsys: pytest.CaptureFixture, options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main([*options, "--optimizer.schedule", "cosine", "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert capsys.readouterr().out == (tmp_path / "run.yaml").read_text()
    assert "schedule: cosine" in (tmp_path / "run.yaml").read_text()


# --- A whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_run_learns_and_says_so_honestly(run: Path) -> None:
    found = metrics(run)
    assert found["start"]["step"] == 0
    assert found["end"]["step"] == found["steps"] == 14
    assert found["end"]["mlm_loss"] < found["start"]["mlm_loss"] - 0.5
    assert found["start"]["masked_tokens"] == found["end"]["masked_tokens"] > 0
    pairs, accuracy = found["end"]["sentence_pairs"], found["end"]["nsp_accuracy"]
    assert found["end"]["nsp_standard_error"] == pytest.approx((accuracy * (1 - accuracy) / pairs) ** 0.5)
    assert 0.5 <= found["end"]["nsp_chance"] < 1
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["training_seconds"])


@pytest.mark.quick
def test_run_leaves_all_it_promises(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "checkpoints", "logs", "model", "loss.png", "metrics.json", "report.md"),
        *("manifest.json", ".lock"),
    }
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000012.ckpt", "step-0000014.ckpt"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("logs/tensorboard/*/events*"))
    (log,) = run.glob("logs/csv/*/metrics.csv")
    columns = log.read_text().splitlines()[0].split(",")
    assert {"train/mlm_loss", "train/nsp_loss", "train/learning_rate", "train/tokens_per_second"} <= set(columns)
    assert {"val/mlm_loss", "val/perplexity", "val/nsp_accuracy"} <= set(columns)


def test_saved_model_has_the_loss_that_was_reported(run: Path, corpus: Path) -> None:
    """The loss measured here again, from the folder alone and averaged over tokens, is the one that was reported."""
    from fastformer.models import FastformerForPreTraining
    from fastformer.training.loading.pretraining import PretrainingDataModule

    data = PretrainingDataModule(
        data=[str(corpus)],
        vocab_size=300,
        max_length=48,
        tokens_per_batch=1024,
        heldout_fraction=0.2,
        cache_dir=str(corpus.parent / "cache"),
    )
    data.setup()
    model = FastformerForPreTraining.from_pretrained(run / "model").eval()
    losses, correct, pairs = [], 0, 0
    for batch in data.val_dataloader():
        with torch.no_grad():
            output = model(**batch, return_logits=True)
        places = batch["masked_positions"]
        losses.append(
            torch.nn.functional.cross_entropy(
                output.prediction_logits[places], batch["labels"][places], reduction="none"
            )
        )
        correct += (output.seq_relationship_logits.argmax(-1) == batch["next_sentence_label"]).sum().item()
        pairs += len(batch["next_sentence_label"])
    end = metrics(run)["end"]
    assert end["mlm_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert end["masked_tokens"] == len(torch.cat(losses))
    assert (end["nsp_accuracy"], end["sentence_pairs"]) == (pytest.approx(correct / pairs), pairs)


def test_fill_mask_pipeline_runs_on_the_saved_folder(run: Path) -> None:
    from transformers import pipeline

    fill = pipeline("fill-mask", str(run / "model"))
    answers = fill("Today the dog eats the [MASK] here.")
    assert len(answers) == 5
    assert sum(answer["score"] for answer in answers) <= 1
    assert fill.tokenizer.model_max_length == fill.model.config.max_position_embeddings == 48


@pytest.mark.parametrize(
    "variant",
    [
        ["--precision", "bf16-mixed"],
        ["--corpus.next_sentence", "false", "--corpus.whole_word", "true"],
        ["--corpus.heldout_fraction", "0"],
        ["--optimizer.schedule", "cosine", "--optimizer.warmup_steps", "2", "--epochs", "1"],
    ],
)
def test_variants_run_to_their_end(
    variant: list[str], options: list[str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    assert cli.main([*options, "--max_steps", "6", "--output", str(output), *variant]) == 0
    found = metrics(output)
    if "--corpus.heldout_fraction" in variant:
        assert found["start"] is found["end"] is None
    else:
        assert found["end"]["mlm_loss"] < found["start"]["mlm_loss"]
        assert found["end"]["step"] == found["steps"]
    has_pairs = not {"--corpus.next_sentence", "--corpus.heldout_fraction"} & set(variant)
    assert ("next-sentence accuracy" in capsys.readouterr().out) == has_pairs
    assert (output / "checkpoints" / f"step-{found['steps']:07d}.ckpt").exists()
    assert load_file(output / "model" / "model.safetensors")


# --- Resuming ---------------------------------------------------------------------------------------------------------


def assert_same_run(output: Path, run: Path) -> None:
    """Fail unless weights are the same bit for bit, and measurements are the same."""
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (output, run))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert all(metrics(output)[name] == metrics(run)[name] for name in ("start", "end", "steps", "tokens"))


@pytest.mark.parametrize(
    ("kill", "left", "truncated"),
    [
        ({"step": 8}, ["step-0000003.ckpt", "step-0000006.ckpt"], "step-0000006.ckpt"),
        ({"step": 9, "while_writing": True}, ["step-0000003.ckpt", "step-0000006.ckpt"], None),
    ],
)
def test_killed_run_resumes_to_identical_weights(
    kill: dict, left: list[str], truncated: str | None, options: list[str], run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    callback = json.dumps([{"class_path": "training.killing.Kill", "init_args": kill}])
    arguments = [*options, "--output", str(output), "--trainer.callbacks", callback]
    killed = python("-m", "fastformer.cli", *arguments, path=str(TESTS))
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in (output / "checkpoints").glob("*.ckpt")) == left
    resume = ["pretrain", "--resume", "--output", str(output), "--trainer.callbacks", "null"]
    if truncated is None:
        assert cli.main(resume) == 0
    else:
        checkpoint = output / "checkpoints" / truncated
        os.truncate(checkpoint, checkpoint.stat().st_size // 2)
        with pytest.warns(UserWarning, match=f"{truncated} is truncated"):
            assert cli.main(resume) == 0
    assert_same_run(output, run)
    assert not list(output.rglob("*.tmp"))


def test_run_stopped_by_the_clock_resumes_to_identical_weights(options: list[str], run: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert cli.main([*options, "--output", str(output), "--max_minutes", "1e-9"]) == 0
    assert metrics(output)["steps"] == 1
    assert cli.main(["pretrain", "--resume", "--output", str(output), "--max_minutes", "null"]) == 0
    assert_same_run(output, run)


def test_resuming_a_finished_run_changes_nothing(options: list[str], run: Path) -> None:
    before = load_file(run / "model" / "model.safetensors")
    assert cli.main(["pretrain", "--resume", "--output", str(run)]) == 0
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert metrics(run)["steps"] == 14


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_output_with_a_run_is_refused_or_replaced(
    options: list[str], run: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert "holds a finished run" in fails(capsys, *options, "--output", str(run))
    assert "not both" in fails(capsys, *options, "--output", str(run), "--resume", "--overwrite")
    shutil.copytree(run, tmp_path / "output")
    before = set(run.rglob("*.ckpt"))
    assert cli.main([*options, "--output", str(tmp_path / "output"), "--max_minutes", "1e-9", "--overwrite"]) == 0
    assert metrics(tmp_path / "output")["steps"] == 1
    assert [path.name for path in (tmp_path / "output/checkpoints").iterdir()] == ["step-0000001.ckpt"]
    assert len(list(tmp_path.glob("output/logs/csv/*"))) == 1
    assert before == set(run.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "bad",
    [
        ["--data", "absent.txt"],
        ["--optimizer.learning_rate", "0"],
        ["--vocab_size", "10"],
        ["--overrides.num_attention_heads", "3"],
        ["--optimizer.warmup_steps", "14"],
        ["--devices", "none"],
    ],
)
def test_a_run_is_not_removed_for_one_that_cannot_begin(
    bad: list[str], options: list[str], run: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(run, output)
    fails(capsys, *options, "--output", str(output), "--overwrite", *bad)
    kept = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del kept[Path("manifest.json")]  # it names the last process
    assert all((output / name).read_bytes() == content for name, content in kept.items())


def test_output_with_other_things_is_never_touched(
    options: list[str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "thesis.tex" in fails(capsys, *options, "--output", str(tmp_path), "--overwrite")
    assert "is not a folder" in fails(capsys, *options, "--output", str(tmp_path / "thesis.tex"))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@needs_jsonargparse
def test_nothing_to_resume(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert "nothing to resume" in fails(capsys, "pretrain", "--resume", "--output", str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "bert-huge"], "there is no preset 'bert-huge'; there are bert-tiny"),
        (["--optimizer.learning_rate", "0"], "--optimizer.learning_rate must be above 0, and finite; got 0"),
        (["--overrides.hidden_sise", "32"], "'hidden_sise'"),
        (["--optimizer.warmup_steps", "14"], "warmup_steps must be .* below the run's 14 steps; got 14"),
        (["--max_minutes", "-1"], "max_minutes must be above 0"),
        (["--corpus.mask_probability", "1.5"], "mask_probability must be above 0 and below 1"),
        (["--devices", "none"], "--devices must be auto"),
    ],
)
def test_bad_values_end_in_one_clear_line(
    arguments: list[str], message: str, options: list[str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    error = fails(capsys, *options, "--output", str(output), *arguments)
    assert error.startswith("fastformer pretrain: error: ")
    assert re.search(message, error), error
    # A run that fails before its first step leaves nothing that would block the next run.
    assert not (output / "config.yaml").exists()


def test_bad_corpora_are_named(options: list[str], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in [("absent.txt", "absent.txt"), ("empty.txt", "corpus is empty")]:
        error = fails(capsys, *options, "--data", str(tmp_path / name), "--output", str(tmp_path / "output"))
        assert message in error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("8 TB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 TB"),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fastformer.commands.models.main", fail)
    assert cli.main(["models"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "not enough memory" in line and "8 TB" in line
    with pytest.raises(type(error)):
        cli.main(["--debug", "models"])
    other = RuntimeError("a fault of ours")
    monkeypatch.setattr("fastformer.commands.models.main", lambda *_: (_ for _ in ()).throw(other))
    with pytest.raises(RuntimeError, match="fault of ours"):
        cli.main(["models"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_that_an_import_makes_an_error_of_its_own(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during an import stops the command, even if the import raises its own error, as NumPy's modules do."""

    def imported(*_: object) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(getattr(signal, name))
        raise ImportError("PyCapsule_Import could not import module")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("fastformer.commands.models.main", imported)
    assert cli.main(["models"]) == STATUS[name]
    assert capsys.readouterr().err == f"fastformer models: stopped by {name}\n"
    assert signal.getsignal(signal.SIGINT) is before
