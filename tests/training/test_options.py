"""One option language: what `pretrain` and `finetune` both have is spelt alike and means the same in both."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastformer import cli
from fastformer.extras import require

pytestmark = pytest.mark.quick

TASKS = ("classify", "tag", "qa", "summarize", "translate", "generate", "embed")
FORMER = {
    "model.learning_rate": "optimizer.learning_rate",
    "model.weight_decay": "optimizer.weight_decay",
    "model.betas": "optimizer.betas",
    "model.eps": "optimizer.eps",
    "model.warmup_steps": "optimizer.warmup_steps",
    "model.schedule": "optimizer.schedule",
    "model.overrides": "overrides",
    "model.overrides.hidden_size": "overrides.hidden_size",
    "corpus.vocab_size": "vocab_size",
    "corpus.max_length": "max_length",
    "corpus.tokens_per_batch": "tokens_per_batch",
    "corpus.num_workers": "num_workers",
    "corpus.cache_dir": "cache_dir",
    "text.max_length": "max_length",
    "trainer.max_epochs": "epochs",
    "privacy-epsilon": "privacy_epsilon",
}


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    require("jsonargparse")
    from fastformer.commands import finetune, pretrain

    return {"pretrain": pretrain.build_parser(), **{task: finetune.build_parser(task) for task in TASKS}}


def options(parser: Any) -> dict[str, dict[str, Any]]:
    """What there is to compare of each option that can be given; those that others determine cannot."""
    return {
        action.dest: {
            "spelt": action.option_strings,
            "type": getattr(action, "_typehint", action.type),
            "choices": action.choices,
            "help": action.help,
            "metavar": action.metavar,
            "takes": action.nargs,
        }
        for action in parser._actions
        if action.option_strings and " --> " not in action.option_strings[0]
    }


@pytest.mark.parametrize("task", TASKS)
def test_what_both_commands_have_is_the_same(task: str, parsers: dict[str, Any]) -> None:
    from fastformer.training.optimization import Optimization

    ours, theirs = options(parsers["pretrain"]), options(parsers[task])
    both = (ours.keys() & theirs.keys()) - {"data"}  # which is text to one, and labelled examples to the other
    expected = {
        *(f"optimizer.{field.name}" for field in fields(Optimization)),
        *("preset", "overrides", "vocab_size", "max_length", "tokens_per_batch", "epochs", "max_steps"),
        *("evaluate_every", "seed", "num_workers", "cache_dir", "activation_checkpointing", "accumulate"),
        *("precision", "devices", "trainer.gradient_clip_val", "output", "resume", "config"),
    }
    assert expected <= both
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}


def test_each_option_has_one_place(parsers: dict[str, Any]) -> None:
    """None is at the top level of one command and within a group of the other, nor within two groups."""
    groups = ("model", "corpus", "text", "optimizer", "")
    ours, theirs = ({*options(parsers[name])} for name in ("pretrain", "classify"))
    for option in ours | theirs:
        group, _, name = option.rpartition(".")
        if group in groups and name:
            assert [each for each in groups if f"{each}.{name}".lstrip(".") in ours | theirs] == [group]


def test_no_option_has_a_second_spelling(parsers: dict[str, Any]) -> None:
    for parser in parsers.values():
        for option in options(parser).values():
            if option["spelt"] != ["-h", "--help"]:
                (spelt,) = (name for name in option["spelt"] if not name.endswith("+"))  # which adds to a list
                assert "-" not in spelt.removeprefix("--")


COMMANDS = (["pretrain"], ["finetune", "classify"])


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of error that a command line ends with, of status 2."""
    require("jsonargparse")
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    return line


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("old", FORMER)
def test_a_former_spelling_ends_with_the_new_one(
    old: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = ["--output", str(tmp_path / "run")]
    for given in ([f"--{old}=1"], [f"--{old}", "1"], [f"--{old}", "1", "--print_config"]):
        line = fails(capsys, *command, *output, *given)
        assert line == f"fastformer {command[0]}: error: --{old} is now spelt --{FORMER[old]}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("way", ["--config", "--resume", "--elastic"])
@pytest.mark.parametrize("old", FORMER)
def test_a_former_spelling_in_a_file(
    old: str, way: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of options, or of those of an older run."""
    group, _, name = old.partition(".")
    file = tmp_path / "config.yaml"
    given = [way, str(file)] if way == "--config" else [way, "--output", str(tmp_path)]
    for content in ({old: 1}, {group: {name: 1}} if name else {old: 1}):
        file.write_text(yaml.safe_dump(content))
        line = fails(capsys, *command, *given)
        assert line == f"fastformer {command[0]}: error: {file}: {old} is now spelt {FORMER[old]}"


@pytest.mark.parametrize(
    ("command", "group", "name"), [("pretrain", "corpus", "max_length"), ("finetune classify", "text", "max_length")]
)
def test_a_former_spelling_within_a_group(
    command: str, group: str, name: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "group.yaml").write_text(f"{name}: 5\n")
    for value in (f'{{"{name}": 5}}', str(tmp_path / "group.yaml")):
        line = fails(capsys, *command.split(), f"--{group}", value)
        assert line == f"fastformer {command}: error: --{group}.{name} is now spelt --{name}"
