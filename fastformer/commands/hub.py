"""The command ``fastformer hub export``: write Fastformer's layers for Hugging Face's `kernels` package."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from fastformer.arguments import CommandParser
from fastformer.integrations.hub.export import export

_DESCRIPTION = """\
Write a folder that Hugging Face's `kernels` package can load: Fastformer's RMSNorm, LayerNorm, feed-forwards and rotary
embedding as layers, with the Triton kernels and operators they need. Fastformer need not be installed to use it.

examples:
  fastformer hub export runs/kernel

in Python:
  from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
  layers = get_local_kernel(Path("runs/kernel")).layers
  mapping = {"RMSNorm": {"cuda": LocalLayerRepository(Path("runs/kernel"), layer_name="RMSNorm")}}
  with use_kernel_mapping(mapping):
      model = kernelize(model, mode=Mode.TRAINING)
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer hub`` with the arguments that follow."""
    parser = CommandParser(prog="fastformer hub", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "export", help="write the folder", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    command.add_argument("folder", metavar="DIR", type=Path, help="the folder to write; it must not exist")
    export(parser.parse_args(arguments).folder)
