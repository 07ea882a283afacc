"""What the training commands share: options, the output folder and what it may hold, the trainer, resuming."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers.utils import logging as transformers_logging

from fastformer.data.files import atomic_file
from fastformer.training.callbacks import LossCurve, Throughput
from fastformer.training.checkpoints import AtomicCheckpointIO
from fastformer.training.memory import peak_memory

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp", "fsdp2")

# What resume and report rely on, set by `build_trainer`, and what has no meaning here.
_TRAINER_ARGUMENTS_NOT_OFFERED = {
    "barebones",
    "check_val_every_n_epoch",
    "default_root_dir",
    "enable_autolog_hparams",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "limit_predict_batches",
    "limit_test_batches",
    "max_time",
    "model_registry",
    "num_sanity_val_steps",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "sync_batchnorm",
    "use_distributed_sampler",
}

_GRAPHS_HELP = (
    "have the kernels of a batch's forward and backward launched together, as recorded: for models so small that a GPU "
    "waits for Python. On one GPU; batches are padded to few shapes"
)

_UNIMPORTANT_WARNINGS = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*deprecated.*",
    "Total length of `list` across ranks is zero.*",  # nothing held out, as was asked
)


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a training command.

    Attributes:
        path: the folder.
        kind: of run, for errors.
        others: names of files and folders that this command writes besides those of every run.
    """

    path: Path
    kind: str
    others: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        """Every option of the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """What is printed at the end."""
        return self.path / "metrics.json"

    @property
    def curve(self) -> Path:
        """The picture of the losses."""
        return self.path / "loss.png"

    @property
    def checkpoints(self) -> Path:
        """The newest, to resume from."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """CSV and TensorBoard."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The metrics, to read."""
        return self.path / "report.md"

    @property
    def model(self) -> Path:
        """Hugging Face format."""
        return self.path / "model"

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that holds something else than this run, and remove what killed processes left behind.

        A run that failed before its first step has left logs at most; they are no reason to refuse.
        """
        _prepare(self, resume, overwrite)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """As JSON, whole or not at all."""
        with atomic_file(self.metrics) as file:
            file.write(json.dumps(metrics, indent=2).encode() + b"\n")


@rank_zero_only
def _prepare(folder: RunFolder, resume: bool, overwrite: bool) -> None:
    output = folder.path
    if resume and overwrite:
        raise ValueError("give --resume or --overwrite, not both")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is not a folder")
    entries = {path.name for path in output.iterdir()} if output.exists() else set()
    paths = (folder.config, folder.metrics, folder.curve, folder.checkpoints, folder.logs, folder.report, folder.model)
    ours = {*(path.name for path in paths), *folder.others}
    if foreign := sorted(name for name in entries - ours if not name.endswith(".tmp")):
        raise ValueError(
            f"--output {output} holds what is no {folder.kind} run: {', '.join(foreign[:3])}; give another folder"
        )
    if folder.config.name in entries and not (resume or overwrite):
        state = "a finished" if folder.metrics.name in entries else "an unfinished"
        raise ValueError(
            f"--output {output} holds {state} run: continue it with --resume, replace it with --overwrite, or give "
            "another folder"
        )
    if resume:
        for path in [*output.glob(".*.tmp"), *folder.checkpoints.glob(".*.tmp")]:
            _remove(path)
    else:
        for name in entries:
            _remove(output / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- Options ----------------------------------------------------------------------------------------------------------


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the lines of the description kept."""


def command_parser(command: str, description: str, output: str) -> LightningArgumentParser:
    """A parser with the options of every training command.

    Args:
        command: its words after ``fastformer``.
        description: shown with its lines kept.
        output: default of ``--output``.
    """
    parser = LightningArgumentParser(
        prog=f"fastformer {command}",
        usage=f"fastformer {command} [options]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="YAML file of options; what follows it on the command line wins")
    add("--output", type=str, default=output, metavar="DIR", help="folder for all that the run writes")
    add("--resume", action="store_true", help="continue the run in --output, with its options where none are given")
    add("--elastic", action="store_true", help="continue the run in --output if there is one: for what restarts itself")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--max_minutes", type=float | None, metavar="M", help="stop training after this time, whatever else is said")
    add("--accumulate", type=int, default=1, metavar="N", help="batches whose gradients make one optimizer step")
    add("--accelerator", type=str, default="auto", help="cpu, gpu, ... or auto")
    add("--devices", type=str, default="auto", help="their number, or a list such as 0,2")
    add("--strategy", choices=STRATEGIES, default="auto", help="of several devices; auto is ddp")
    add("--compile", action="store_true", help="the model by torch.compile: minutes at the start, faster steps")
    add("--cuda_graphs", action="store_true", help=_GRAPHS_HELP)
    add("--precision", choices=PRECISIONS, default="32-true", help="of weights and of the computation")
    return parser


def add_trainer_arguments(parser: LightningArgumentParser) -> None:
    """Lightning's own options, as ``--trainer.NAME``, those of `command_parser` and --evaluate_every linked to them."""
    parser.add_class_arguments(
        Trainer, "trainer", fail_untyped=False, instantiate=False, skip=_TRAINER_ARGUMENTS_NOT_OFFERED
    )
    parser.set_defaults({"trainer.gradient_clip_val": 1.0, "trainer.log_every_n_steps": 10})
    for name in ("accelerator", "devices", "strategy", "precision"):
        parser.link_arguments(name, f"trainer.{name}")
    parser.link_arguments("max_steps", "trainer.max_steps", compute_fn=lambda steps: -1 if steps is None else steps)
    parser.link_arguments("accumulate", "trainer.accumulate_grad_batches")
    parser.link_arguments(
        ("evaluate_every", "accumulate"),
        "trainer.val_check_interval",
        compute_fn=lambda every, batches: every * batches,
    )


def parse(parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
    """The options; of a run that is resumed its own, where none are given.

    Raises:
        FileNotFoundError: there is no run to resume.
    """
    options = parser.parse_args(arguments)
    config = RunFolder(Path(options.output), "").config
    if options.resume and not config.is_file():
        raise FileNotFoundError(f"nothing to resume in {options.output}: it has no {config.name}")
    if options.resume or (options.elastic and config.is_file()):
        options = parser.parse_args(["--config", str(config), *arguments])
        options.resume = True
    return options


class SaveOptions(Callback):
    """Writes the options when training starts: from then on there is a run to resume."""

    def __init__(self, path: Path, parser: LightningArgumentParser, options: Namespace) -> None:
        self.path = path
        kept = options.clone()
        kept.resume = kept.overwrite = False
        self.text = parser.dump(kept)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with atomic_file(self.path) as file:
                file.write(self.text.encode())


# --- The trainer ------------------------------------------------------------------------------------------------------


def build_trainer(arguments: Namespace, folder: RunFolder, callbacks: Sequence[Callback]) -> Trainer:
    """Lightning's trainer, with atomic checkpoints, CSV and TensorBoard logs.

    Raises:
        ValueError: Lightning refuses an argument.
    """
    given = arguments.as_dict()
    given["callbacks"] = [*callbacks, *_as_list(given["callbacks"])]
    given["plugins"] = [AtomicCheckpointIO(), *_cluster_environment(), *_as_list(given["plugins"])]
    given["logger"] = given["logger"] or [
        CSVLogger(folder.logs, name="csv"),
        TensorBoardLogger(folder.logs, name="tensorboard"),
    ]
    try:
        return Trainer(
            **given,
            default_root_dir=folder.path,
            check_val_every_n_epoch=None,
            enable_model_summary=False,
            num_sanity_val_steps=-1,  # all of the held-out text: the loss before the first step
        )
    except TypeError as error:
        raise ValueError(str(error)) from error


def _cluster_environment() -> list[ClusterEnvironment]:
    """Who has started the processes, where it is not Lightning."""
    if TorchElasticEnvironment.detect():  # within a job of SLURM too
        return [TorchElasticEnvironment()]
    if SLURMEnvironment.detect():  # Lightning's own checkpoint for requeueing may fall between two optimizer steps
        return [SLURMEnvironment(auto_requeue=False)]
    return []


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def summary(
    trainer: Trainer, module: LightningModule, throughput: Throughput, curve: LossCurve, folder: RunFolder, wall: float
) -> dict[str, Any]:
    """What every run reports of itself; `wall` is in seconds."""
    return {
        "start": curve.validation[0] if curve.validation else None,
        "end": curve.validation[-1] if curve.validation else None,
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tokens": throughput.tokens,
        "training_seconds": throughput.seconds,
        "tokens_per_second": throughput.tokens_per_second,
        "wall_seconds": wall,
        "peak_memory": peak_memory(trainer.strategy.root_device),
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "precision": trainer.precision,
        "model": str(folder.model),
        "curve": str(folder.curve),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """Two lines of English for `summary`."""
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    return (
        f"{summary['steps']:,} steps, {summary['tokens'] / 1e6:.2f} M tokens at {summary['tokens_per_second']:,.0f} "
        f"tokens/s on {summary['devices']} x {summary['device']}; {minutes} min {seconds} s in all\n"
        f"model: {summary['model']} ({summary['parameters'] / 1e6:.2f} M parameters)   loss curve: {summary['curve']}"
    )


def quieten() -> None:
    """Leave the terminal to progress, warnings that matter and the report."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _UNIMPORTANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
