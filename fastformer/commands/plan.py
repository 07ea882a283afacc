"""The command ``fastformer plan``: compute the memory, time and cost of training a model before running it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastformer.arguments import PRECISIONS, CommandParser
from fastformer.planning.choices import OPTIMIZERS, STRATEGIES
from fastformer.planning.gpus import GPUS
from fastformer.planning.presets import MOST_TOKENS

if TYPE_CHECKING:
    from fastformer.models import FastformerConfig
    from fastformer.planning.needs import Setup

_DESCRIPTION = """\
Compute what training a model needs: memory of each device, operations, tokens per second, days. Parameters, operations
and activations are counted on the model itself, on tensors without memory; time is computed from the GPUs' peak and the
utilisation that you give. Nothing is measured. Exit status 1 if the model does not fit.

examples:
  fastformer plan --preset bert-base --gpu a100:8 --tokens 137e9
  fastformer plan --preset gpt3-175b --gpu h100:64 --strategy fsdp --tensor_parallel 8 --checkpointing \\
      --global_tokens 3.2e6 --tokens 300e9 --price 2.5
  fastformer plan --model runs/pretrain/model --gpu rtx-4090 --batch_size 32 --json

strategies: ddp keeps weights, gradients and optimiser states on every device. DeepSpeed's zero-1 divides the optimiser
states over the devices, zero-2 also the gradients, zero-3 also the weights; fsdp (PyTorch's FSDP2) divides all three.
--tensor_parallel N divides every block and the vocabulary over N devices, in addition to ddp or fsdp.
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer plan`` with the arguments that follow."""
    options = _parser().parse_args(arguments)
    from fastformer.planning.model_work import known_model
    from fastformer.planning.needs import plan, whole_run
    from fastformer.planning.remedies import what_fits
    from fastformer.planning.report import PlanReport

    name = options.preset or options.model
    config, kind = known_model(name)
    setup = _setup(options, config)
    found = plan(config, kind, setup)
    run = None if options.tokens is None else whole_run(found, setup, options.tokens, options.price)
    changes = None if found.fits else what_fits(config, kind, setup)
    report = PlanReport(name, setup, found, run, None if changes is None else _as_options(changes))
    print(json.dumps(report.as_json(), indent=1) if options.json else report.as_text())
    if not found.fits:
        raise SystemExit(1)


def _as_options(changes: dict[str, Any]) -> str:
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())


def _parser() -> ArgumentParser:
    parser = CommandParser(
        prog="fastformer plan", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", help="a published shape; `fastformer models` lists them")
    which.add_argument("--model", type=folder, metavar="DIR", help="a model's folder in Hugging Face's format")
    add("--gpu", required=True, metavar="NAME[:N]", help=f"{', '.join(GPUS)}, and their number (default: 1)")
    add("--strategy", choices=STRATEGIES, default="ddp", help="default: %(default)s")
    add("--tensor_parallel", type=int, default=1, metavar="N", help="devices that share every block (default: 1)")
    add("--precision", choices=PRECISIONS, default="bf16-mixed", help="default: %(default)s")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="default: %(default)s")
    add("--checkpointing", action="store_true", help="compute every block again in the backward pass")
    add(
        "--length",
        type=whole_number,
        metavar="N",
        help=f"tokens in an example (default: the context, at most {MOST_TOKENS})",
    )
    add("--target_length", type=whole_number, metavar="N", help="tokens in the decoder's target (default: --length)")
    add("--batch_size", type=whole_number, metavar="N", help="examples per device at a time (default: as many as fit)")
    add("--global_tokens", type=whole_number, metavar="N", help="the least number of tokens in an optimiser step")
    add("--tokens", type=whole_number, metavar="N", help="tokens of the whole run: shows its steps, days and GPU hours")
    add(
        "--mfu",
        type=float,
        default=0.4,
        help="model FLOPs utilisation: the share of the GPUs' peak that forward and backward reach, without "
        "recomputation; well-tuned large runs report 0.35 to 0.5 (default: 0.4)",
    )
    add("--usable", type=float, default=0.92, help="share of a GPU's memory that the run may use (default: 0.92)")
    add(
        "--network",
        type=float,
        default=50.0,
        metavar="GB/s",
        help="between nodes of 8, for each GPU (default: 50)",
    )
    add("--price", type=float, metavar="X", help="price of a GPU hour, in any currency; needs --tokens")
    add("--json", action="store_true", help="print JSON")
    return parser


def whole_number(text: str) -> int:
    """Parse an option's value, written in digits or as 3.2e6. argparse's errors show the name of this function."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def folder(text: str) -> str:
    """Return an option's value, which must be an existing folder."""
    if not Path(text).is_dir():
        raise ValueError(text)
    return text


def _setup(options: Namespace, config: FastformerConfig) -> Setup:
    from fastformer.planning.needs import Setup

    name, _, number = options.gpu.partition(":")
    if name not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}; got {name!r}")
    if number and not number.isdecimal():
        raise ValueError(f"--gpu takes a number after the colon, such as {name}:8; got {number!r}")
    if options.target_length is not None and config.stack != "encoder_decoder":
        raise ValueError("--target_length is for encoder-decoders")
    if options.price is not None and options.tokens is None:
        raise ValueError("--price needs --tokens, the length of the run")
    if options.length is not None and config.image_size:
        raise ValueError("--length is for text: the configuration says how many tokens an image has")
    return Setup(
        gpu=GPUS[name],
        devices=int(number or 1),
        strategy=options.strategy,
        tensor_parallel=options.tensor_parallel,
        precision=options.precision,
        length=min(config.max_position_embeddings, MOST_TOKENS) if options.length is None else options.length,
        target_length=options.target_length,
        batch_size=options.batch_size,
        global_tokens=options.global_tokens,
        checkpointing=options.checkpointing,
        optimizer=options.optimizer,
        mfu=options.mfu,
        usable=options.usable,
        network=options.network * 1e9,
    )
