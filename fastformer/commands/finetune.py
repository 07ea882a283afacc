"""The command ``fastformer finetune TASK``: load data, train a model for a task, evaluate it, and write a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fastformer.data.labelled.sets import DEFAULT_SETS, SETS
from fastformer.extras import require
from fastformer.training.adversarial import Adversary
from fastformer.training.finetuning_examples import sets_of
from fastformer.training.finetuning_preparation import PRETRAINED
from fastformer.training.finetuning_run import run_finetuning, run_folder
from fastformer.training.lora import Lora
from fastformer.training.options import add_trainer_arguments, classes_allowed, command_parser, parse
from fastformer.training.privacy import Privacy
from fastformer.training.run import quieten, resumable
from fastformer.training.starting_point import Task
from fastformer.training.tasks import RECIPES, TextOptions

_DESCRIPTION = """\
Fine-tune a model on a task: {tasks}.
Without options, it trains on data that needs no download, from runs/pretrain/model if it is there and fits the task,
otherwise from scratch by --preset; in minutes on two CPU cores, into runs/{task}.

examples:
  fastformer finetune {task}
  fastformer finetune {task} --data folder/ --model folder/of/a/hugging-face/model --epochs 5 --patience 3
  fastformer finetune {task} --lora --adapter.rank 16 --optimizer.learning_rate 1e-3
  fastformer finetune {task} --adversarial fgm --optimizer.layer_decay 0.9
  fastformer finetune {task} --devices 8 --strategy fsdp2 --precision bf16-mixed --accumulate 4     # or ddp
  fastformer finetune {task} --precision bf16-mixed --cuda_graphs                                   # on one GPU
  fastformer finetune {task} --resume              # continue the run in runs/{task} exactly where it stopped

files in --output:
  config.yaml     every option of the run          model/              Hugging Face format, or PEFT's adapter
  checkpoints/    the two newest, for --resume     loss.png            loss in training and on held-out examples
  logs/           CSV and TensorBoard              metrics.json        the metrics printed at the end
  report.md       metrics, pictures, examples      predictions.jsonl   for the test examples
  manifest.json   the list of the run's files
Only files in the manifest are ever replaced, and only one process at a time writes. Ctrl-C, SIGTERM and SIGUSR1 save a
checkpoint after the current step, and print the command that continues the run. A run can only be resumed with the same
examples and tokenizer.
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer finetune``.

    Args:
        arguments: the command line after ``finetune``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    tasks = ", ".join(RECIPES)
    if arguments[:1] in (["--help"], ["-h"]):
        arguments = ["classify", *arguments]
    if not arguments or arguments[0] not in RECIPES:
        raise ValueError(f"name a task first: {tasks}; got {arguments[0] if arguments else 'nothing'}")
    task = cast(Task, arguments[0])
    quieten()
    parser = build_parser(task)
    with classes_allowed(arguments):
        options = parse(parser, arguments[1:])
        for wanted, package in ((options.lora, "peft"), (options.privacy_epsilon, "opacus")):
            if wanted:
                require(package)
        folder = run_folder(Path(options.output))
        inputs = {"--model": options.model, "--data": None if options.data in SETS else options.data}
        paths = {option: [Path(given)] for option, given in inputs.items() if given is not None}
        try:
            with resumable(f"finetune {task}", folder, options, paths) as stop:
                seed_everything(options.seed, workers=True, verbose=False)
                run_finetuning(task, parser, options, arguments, folder, stop, begin)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error


# Per-task defaults, chosen to learn the task's built-in set within minutes on two CPU cores.
_DEFAULTS: dict[Task, dict[str, Any]] = {
    "tag": {"epochs": 10, "vocab_size": 4096, "tokens_per_batch": 1024},
    "qa": {"epochs": 2, "vocab_size": 4096, "tokens_per_batch": 2048},
    "summarize": {"epochs": 12, "vocab_size": 2048, "tokens_per_batch": 2048},
    "translate": {"epochs": 10, "vocab_size": 4096, "tokens_per_batch": 2048},
    "embed": {"epochs": 10},
}


def build_parser(task: Task) -> LightningArgumentParser:
    """Return the parser of the command's options for a task."""
    description = _DESCRIPTION.format(task=task, tasks=", ".join(RECIPES))
    defaults = {"output": f"runs/{task}", "epochs": 3, **_DEFAULTS.get(task, {})}
    parser = command_parser(f"finetune {task}", description, defaults)
    add = parser.add_argument
    add("--task", choices=(task,), default=task, help="the task, kept with the options of the run")
    add(
        "--data",
        type=str,
        default=DEFAULT_SETS[task],
        metavar="SET|PATH",
        help=_DATA_HELP.format(", ".join(sets_of(task))),
    )
    add("--model", type=str | None, metavar="DIR", help=_MODEL_HELP)
    add("--from_scratch", action="store_true", help=_SCRATCH_HELP)
    add("--max_train_examples", type=int | None, metavar="N", help=_EXAMPLES_HELP)
    add("--patience", type=int | None, metavar="N", help="stop after N evaluations without improvement")
    add("--monitor", type=str, default="loss", help="the metric that --patience compares")
    add("--class_weights", type=str | list[float] | None, help=_WEIGHTS_HELP)
    add("--lora", action="store_true", help="train added small matrices, by PEFT, with frozen weights; see --adapter")
    add("--adversarial", choices=("fgm", "pgd"), help="train also on moved word embeddings; see --adversary")
    add("--privacy_epsilon", type=float | None, help="train with differential privacy, by Opacus; see --privacy")
    parser.add_class_arguments(TextOptions, "text", instantiate=False, skip={"max_length"})
    parser.add_class_arguments(Lora, "adapter", instantiate=False)
    parser.add_class_arguments(Adversary, "adversary", instantiate=False, skip={"method"})
    parser.add_class_arguments(Privacy, "privacy", instantiate=False, skip={"epsilon"})
    add_trainer_arguments(parser)
    return parser


_DATA_HELP = (
    "a set ({}); or a folder with train, validation and test files in the layouts of GLUE, SQuAD, CoNLL, XSum or WMT, "
    "tables or JSON lines; or one such file, of which one tenth is held out for validation and one for testing; all "
    "questions about a context stay together"
)
_MODEL_HELP = (
    f"the model to start from: a folder in Hugging Face's format. Default: {PRETRAINED} if it is there and fits the "
    "task, else none"
)
_WEIGHTS_HELP = "balanced, or a number for each class: by value if the classes are numbers, else in alphabetical order"
_SCRATCH_HELP = (
    "use only the tokenizer and the architecture of --model, with new weights, to see what its pretraining gives; "
    "without --model, train a tokenizer and use --preset"
)
_EXAMPLES_HELP = "train on at most N examples, drawn at random with --seed"
