"""Parts that the training commands share: saving the options, ending a run, the callbacks, the trainer, the summary."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from transformers.utils import logging as transformers_logging

from fastformer.console import printable, printable_line
from fastformer.files import atomic_file
from fastformer.stopping import Stopped
from fastformer.training.callbacks import CompileModel, SavePretrained, StepSeed, StopAtLimit
from fastformer.training.checkpoints import AtomicCheckpointIO, newest_checkpoint
from fastformer.training.cuda_graphs import RecordSteps
from fastformer.training.finite import FiniteLosses
from fastformer.training.folder import RunFolder
from fastformer.training.interruption import StopOnSignal
from fastformer.training.memory import PeakMemory, peak_memory
from fastformer.training.progress import LossCurve, Throughput, TrainingProgress

_UNIMPORTANT_WARNINGS = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*deprecated.*",
    "Total length of `list` across ranks is zero.*",  # the user wants nothing held out
)


class SaveOptions(Callback):
    """Write the options when training starts: from then on the run can be resumed, and a replaced run is removed.

    Every checkpoint gets the id of the run.

    Args:
        folder: the folder of the run.
        parser: the parser of the options.
        options: the options of the run.
        data: fingerprints of the run's data, by part.
    """

    def __init__(
        self,
        folder: RunFolder,
        parser: LightningArgumentParser,
        options: Namespace,
        data: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.data = data
        self.resumed = options.resume
        kept = options.clone()
        kept.resume = kept.overwrite = kept.trust = False
        self.text = parser.dump(kept)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            if not self.resumed:
                self.folder.begin(self.data)
            with atomic_file(self.folder.config) as file:
                file.write(self.text.encode())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:  # it alone writes the checkpoint
            checkpoint["run"] = self.folder.run


# --- How a run ends ---------------------------------------------------------------------------------------------------


@contextmanager
def resumable(
    command: str, folder: RunFolder, options: Namespace, inputs: Mapping[str, Sequence[Path]]
) -> Iterator[StopOnSignal]:
    """Return a context in which the run holds its folder, and in which a signal ends it.

    The message after a signal has the command that resumes the run.

    Args:
        command: the words of the command after ``fastformer``.
        folder: the folder of the run.
        options: the options of the run.
        inputs: the files and folders that the run reads, by option.
    """
    try:
        with StopOnSignal() as stop, folder.opened(options.resume, options.overwrite, inputs):
            yield stop
    except Stopped as stopped:
        newest = newest_checkpoint(folder.checkpoints) if folder.config.is_file() else None
        if newest is None:
            stopped.note = ": nothing was saved yet"
        else:
            again = f"fastformer {command} --resume --output {shlex.quote(str(folder.path))}"
            stopped.note = f"; {newest.name} is saved. Continue with: {again}{' --trust' * options.trust}"
        raise


# --- The trainer ------------------------------------------------------------------------------------------------------


class Watch(NamedTuple):
    """The callbacks whose findings are in the summary of a run."""

    throughput: Throughput
    curve: LossCurve
    finite: FiniteLosses


def callbacks(
    options: Namespace,
    watch: Watch,
    save_options: SaveOptions,
    save_checkpoints: Callback,
    stop: StopOnSignal,
    save_model: SavePretrained,
    stopping: Sequence[Callback] = (),
) -> list[Callback]:
    """Return the callbacks of a run in the order in which Lightning calls them.

    Args:
        options: the options of the run.
        watch: the callbacks that the summary is made from.
        save_options: writes the options.
        save_checkpoints: writes checkpoints.
        stop: ends the run after a signal.
        save_model: writes the model at the end.
        stopping: what else ends the run; called before a checkpoint is written.
    """
    return [
        save_options,
        watch.finite,
        StepSeed(options.seed),
        StopAtLimit(options.max_minutes),
        watch.throughput,
        PeakMemory(),
        TrainingProgress(),
        *([CompileModel()] if options.compile else []),
        *([RecordSteps()] if options.cuda_graphs else []),
        watch.curve,
        *stopping,
        save_checkpoints,
        stop,
        save_model,
    ]


def build_trainer(arguments: Namespace, folder: RunFolder, callbacks: Sequence[Callback]) -> Trainer:
    """Return Lightning's trainer, with atomic checkpoints, CSV logs and TensorBoard logs.

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
            num_sanity_val_steps=-1,  # validate on all held-out text before the first step
        )
    except TypeError as error:
        raise ValueError(str(error)) from error


def _cluster_environment() -> list[ClusterEnvironment]:
    """Return the environment that started the processes; an empty list if Lightning starts them."""
    if TorchElasticEnvironment.detect():  # also inside a SLURM job
        return [TorchElasticEnvironment()]
    try:
        if SLURMEnvironment.detect():  # Lightning's own checkpoint for requeueing may fall inside an optimizer step
            return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:  # inconsistent SLURM variables
        raise ValueError(str(error)) from error
    return []


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def summary(trainer: Trainer, module: LightningModule, watch: Watch, folder: RunFolder, wall: float) -> dict[str, Any]:
    """Return the facts that every run reports; `wall` is in seconds."""
    throughput, curve, finite = watch
    return {
        "start": curve.validation[0] if curve.validation else None,
        "end": curve.validation[-1] if curve.validation else None,
        "steps": trainer.global_step,
        **({"skipped_steps": finite.skipped} if finite.skipped else {}),
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
    """Return two lines of English for `summary`."""
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    skipped = f", {summary['skipped_steps']:,} of them skipped" if "skipped_steps" in summary else ""
    text = (
        f"{summary['steps']:,} steps{skipped}, {summary['tokens'] / 1e6:.2f} M tokens at "
        f"{summary['tokens_per_second']:,.0f} tokens/s on {summary['devices']} x {summary['device']}; "
        f"{minutes} min {seconds} s in all\n"
        f"model: {printable_line(summary['model'])} ({summary['parameters'] / 1e6:.2f} M parameters)   "
        f"loss curve: {printable_line(summary['curve'])}"
    )
    return printable(text)


def quieten() -> None:
    """Leave the terminal to progress, warnings that matter and the report."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _UNIMPORTANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
