"""The ``fastformer`` command. A subcommand's modules are imported only when that subcommand is run."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time

from fastformer.console import plain_warnings, printable, show_any_character
from fastformer.extras import missing_package, remedy
from fastformer.stopping import STATUS, Stopped, stopping_at_signals
from fastformer.version import __version__

COMMANDS = {
    "pretrain": "train a Transformer from scratch: masked or causal language modelling, span corruption, denoising",
    "generate": "continue prompts: batched, streamed, sampled, with a draft model",
    "convert": "convert a checkpoint from Hugging Face's format, or BERT's TensorFlow one, to Fastformer's, and back",
    "models": "list the presets: parameters, memory, operations, context, and what each is suited for",
    "plan": "compute what training a model takes: memory of each GPU, operations, tokens per second, days",
    "evaluate": "compute the metrics of predictions in a file of JSON lines",
    "data": "list, show and fetch labelled sets for fine-tuning",
    "explain": "draw what a model attends to in a text, and how much each token contributes to its answer",
    "finetune": "fine-tune a model: classify, tag, qa, summarize, translate, generate or embed",
    "predict": "write the predictions of a fine-tuned model as JSON lines",
    "bench": "measure speed, memory and learning compared with the peers, with tables and pictures",
    "tune": "measure which kernel configurations are fastest on this GPU, and store them for later runs",
    "verify": "compare a Hugging Face model with and without Fastformer: outputs, gradients, generation",
    "hub": "export layers as a kernel that Hugging Face's `kernels` package loads",
    "kernels": "compile the GPU kernels ahead of time and report on the compiled code; needs no GPU",
    "numerics": "measure the error of every operator against float64, compared with PyTorch's own",
    "doctor": "show this machine's hardware and libraries and each operator's backend, and run a self-test",
}
"""Each command with its line of help. `main(arguments, begin)` in `fastformer/commands/NAME.py` runs the command."""


_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    The status is 0 on success and 2 after an error in what the user gave or has installed. A command that a signal
    ended returns that signal's status (`fastformer.stopping.STATUS`).
    """
    begin = time.monotonic()
    show_any_character()
    known, rest = _parser().parse_known_args(arguments)
    try:
        with stopping_at_signals(), plain_warnings():
            importlib.import_module(f"fastformer.commands.{known.command}").main(rest, begin)
    except (ValueError, OSError) as error:
        if known.debug:
            raise
        return _end(known.command, f"error: {' '.join(str(error).split())}", 2)
    except (MemoryError, RuntimeError) as error:
        if known.debug or not _is_out_of_memory(error):
            raise
        return _end(known.command, f"error: not enough memory: {' '.join(str(error).split())[:200]}", 2)
    except KeyboardInterrupt:
        return _end(known.command, str(Stopped(signal.SIGINT)), STATUS["SIGINT"])
    except Stopped as stopped:
        return _end(known.command, str(stopped), stopped.status)
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if error.name is None and not known.debug:  # a library's own message about a package that an option needs
            return _end(known.command, f"error: {' '.join(str(error).split())}", 2)
        if package is None or known.debug:
            raise
        print(f"fastformer {known.command} needs {package}, which is not installed: {remedy(package)}", file=sys.stderr)
        return 2
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or PyTorch on a CPU or a GPU, ran out of memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error)


def _end(command: str, text: str, status: int) -> int:
    print(f"fastformer {command}: {printable(text)}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastformer",
        description="Transformers on fused Triton kernels.",
        epilog="`fastformer COMMAND --help` shows a command's options, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"fastformer {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error in the input")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_line in COMMANDS.items():
        commands.add_parser(name, help=help_line, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
