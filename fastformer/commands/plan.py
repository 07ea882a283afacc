"""The command ``fastformer plan``: compute the memory, time and cost of training a model before running it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastformer.arguments import PRECISIONS, CommandParser
from fastformer.console import Table
from fastformer.planning.choices import OPTIMIZERS, STRATEGIES
from fastformer.planning.gpus import GPUS
from fastformer.planning.presets import MOST_TOKENS
from fastformer.planning.quantities import duration, gibibytes, in_billions, with_prefix

if TYPE_CHECKING:
    from fastformer.models import FastformerConfig
    from fastformer.planning.needs import Plan, Run, Setup

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

    name = options.preset or options.model
    config, kind = known_model(name)
    setup = _setup(options, config)
    found = plan(config, kind, setup)
    run = None if options.tokens is None else whole_run(found, setup, options.tokens, options.price)
    changes = None if found.fits else _what_fits(config, kind, setup)
    if options.json:
        print(json.dumps(_as_json(name, setup, found, run, changes), indent=1))
    else:
        _show(name, setup, found, run, changes)
    if not found.fits:
        raise SystemExit(1)


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


def _what_fits(config: FastformerConfig, kind: str, setup: Setup) -> str | None:
    """Return the first of several changes with which the run would fit, as options; None if none helps."""
    from fastformer.planning.needs import plan

    smallest = {"batch_size": 1, "checkpointing": True}
    candidates: list[dict[str, Any]] = [{"checkpointing": True}, {"batch_size": 1}, smallest]
    if setup.devices > 1:
        candidates += [{"strategy": "fsdp"}, {"strategy": "fsdp", **smallest}]
    for changes in candidates:
        if plan(config, kind, replace(setup, **changes)).fits:
            changed = {name: value for name, value in changes.items() if getattr(setup, name) != value}
            return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())
    return None


def _as_json(name: str, setup: Setup, found: Plan, run: Run | None, changes: str | None) -> dict[str, Any]:
    return {
        "model": name,
        "setup": asdict(setup),
        "plan": {**asdict(found), "memory_total": found.memory.total, "fits": found.fits},
        "run": None if run is None else asdict(run),
        "fits_with": changes,
    }


def _show(name: str, setup: Setup, found: Plan, run: Run | None, changes: str | None) -> None:
    parts = f", {setup.tensor_parallel}-way tensor-parallel" if setup.tensor_parallel > 1 else ""
    checkpointing = ", checkpointing" if setup.checkpointing else ""
    print(
        f"{name}, {in_billions(found.parameters)} parameters, on {setup.devices} x {setup.gpu.name} "
        f"({setup.gpu.source})\n{setup.strategy}{parts}, {setup.precision}, {setup.optimizer}{checkpointing}\n"
    )
    print(_memory_table(found), end="\n\n")
    print(_time_table(setup, found, run))
    if changes:
        print(f"it fits with {changes}")


def _memory_table(found: Plan) -> Table:
    rows = [(part, gibibytes(size)) for part, size in asdict(found.memory).items()]
    rows += [("total", gibibytes(found.memory.total)), ("usable", gibibytes(found.available))]
    rows.append(("", "fits" if found.fits else "does not fit"))
    return Table(("", ""), rows, "lr", title="memory of each device")


def _time_table(setup: Setup, found: Plan, run: Run | None) -> Table:
    accumulation = f" x {found.accumulation} batches" if found.accumulation > 1 else ""
    rows = {
        "examples per step": f"{found.batch_size} x {setup.copies} copies{accumulation}",
        "tokens per step": f"{found.tokens:,}",
        "operations per token": with_prefix(found.flops_per_token, "FLOP"),
        "  share of attention": f"{found.attention_share:.1%}",
        "operations per step": with_prefix(found.flops, "FLOP"),
        "tokens per second": f"{found.tokens_per_second:,.0f}",
        "time of a step": duration(found.seconds),
        "  communication, not overlapped": duration(found.communication),
    }
    if run is not None:
        rows |= {
            "tokens": in_billions(run.tokens),
            "steps": f"{run.steps:,}",
            "operations": f"{run.flops:.3g} FLOP",
            "time": duration(run.seconds),
            "GPU hours": f"{run.gpu_hours:,.0f}",
        }
        if run.price is not None:
            rows["price"] = f"{run.price:,.0f}"
    title = f"operations and time, at {setup.mfu:.0%} of the peak"
    return Table(("", ""), list(rows.items()), "lr", title=title, note=_NOTE)


_NOTE = (
    "Computed, not measured. Operations are the model's forward and backward, without recomputation. If communication "
    "takes nearly as long as a step, the given utilisation cannot be reached."
)
