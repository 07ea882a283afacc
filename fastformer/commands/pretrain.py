"""The command ``fastformer pretrain``: train a model from its arguments, and write a report."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fastformer.training.folder import RunFolder
from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.options import add_trainer_arguments, classes_allowed, command_parser, parse
from fastformer.training.pretraining import MODULES
from fastformer.training.pretraining_run import DATA_OPTIONS, run_pretraining
from fastformer.training.run import quieten, resumable

_DESCRIPTION = """\
Pretrain a Transformer. Without options, it trains a small BERT with rotary positions, by masked language modelling and
next-sentence prediction, on the English of Python's own documentation, in minutes on two CPU cores, into runs/pretrain.

examples:
  fastformer pretrain
  fastformer pretrain --objective clm             # a small GPT; span-corruption: a small T5; denoising: a small BART
  fastformer pretrain --data texts/ more.jsonl --preset bert-base --max_steps 100000 --precision bf16-mixed
  fastformer pretrain --optimizer.learning_rate 5e-4 --overrides.num_hidden_layers 6 --corpus.next_sentence false
  fastformer pretrain --corpus.sentence_order true --corpus.whole_word true
  fastformer pretrain --preset bert-base --precision bf16-mixed --cuda_graphs    # small batches on one GPU
  fastformer pretrain --print_config > run.yaml && fastformer pretrain --config run.yaml
  fastformer pretrain --resume                    # continue the run in runs/pretrain exactly where it stopped

many devices (the batch of an optimizer step is --tokens_per_batch times --accumulate times the devices):
  fastformer pretrain --devices 8 --strategy ddp --accumulate 4 --tokens_per_batch 65536
  fastformer pretrain --devices 8 --strategy fsdp2 --precision bf16-mixed --activation_checkpointing
  fastformer pretrain --devices 8 --strategy fsdp2 --tensor_parallel 2    # each batch on two devices
  torchrun --nproc_per_node 8 --max_restarts 3 --no_python fastformer pretrain --strategy fsdp2 --elastic
  srun fastformer pretrain --devices 8 --trainer.num_nodes 4 --strategy fsdp2 --elastic     # sbatch --requeue
A run can resume with another strategy and on another number of devices. Its batches are the same, in the same order;
if --accumulate changes inversely with the devices, its optimizer steps are the same too.

files in --output:
  config.yaml     every option of the run                  model/         Hugging Face format, for transformers
  checkpoints/    the two newest, for --resume             loss.png       loss in training and on held-out text
  logs/           CSV and TensorBoard                      metrics.json   the metrics printed at the end
  report.md       the metrics as a report                  manifest.json  the list of the run's files
Only files in the manifest are ever replaced, and only one process at a time writes. Ctrl-C, SIGTERM and SIGUSR1 save a
checkpoint after the current step, and print the command that continues the run.
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer pretrain``.

    Args:
        arguments: the command line after ``pretrain``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    quieten()
    parser = build_parser()
    with classes_allowed(arguments):
        options = parse(parser, arguments)
        if options.max_steps is None and options.epochs == -1:
            options.max_steps = options.trainer.max_steps = MODULES[options.objective].default_steps
        folder = RunFolder(Path(options.output), "pretraining")
        try:
            with resumable("pretrain", folder, options, {"--data": [*map(Path, options.data)]}) as stop:
                seed_everything(options.seed, workers=True, verbose=False)
                run_pretraining(parser, options, folder, stop, begin)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error


def build_parser() -> LightningArgumentParser:
    """Return the parser of the command's options."""
    parser = command_parser("pretrain", _DESCRIPTION, {"output": "runs/pretrain", "evaluate_every": 200})
    add = parser.add_argument
    add("--objective", choices=list(MODULES), default="mlm", help=_OBJECTIVE_HELP)
    add("--data", type=str, nargs="+", default=[], metavar="PATH", help=_DATA_HELP)
    add("--tensor_parallel", type=int, default=1, metavar="N", help=_TENSOR_HELP)
    elsewhere = {"data", "few_shapes", *DATA_OPTIONS}
    parser.add_class_arguments(PretrainingDataModule, "corpus", instantiate=False, skip=elsewhere)
    add_trainer_arguments(parser)
    return parser


_OBJECTIVE_HELP = "the objective of BERT, GPT, T5 or BART; default number of optimizer steps: {}".format(
    ", ".join(f"{module.default_steps} for {name}" for name, module in MODULES.items())
)
_DATA_HELP = (
    "instead of the default corpus: text files, JSON lines, parquet, folders of these, folders of datasets.save_to_disk"
)
_TENSOR_HELP = "with --strategy fsdp2: N devices compute each batch together, each some heads and columns"
