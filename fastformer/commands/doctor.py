"""The command ``fastformer doctor``: show this machine and the backend of each operator, and run a self-test."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict

from fastformer.arguments import CommandParser
from fastformer.console import Table
from fastformer.diagnostics.doctor import DTYPES, Device, SelfTest, devices, machine, run_test
from fastformer.registry import OPERATORS

_DESCRIPTION = """\
Show this machine's hardware and software, and which backend each operator uses on each device and why. Test that every
operator, forward and backward, agrees with float64 on each device. Exit status 1 if a test fails.

examples:
  fastformer doctor
  fastformer doctor --json
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer doctor`` with the arguments that follow."""
    parser = CommandParser(
        prog="fastformer doctor", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found = devices()
    tests = [run_test(name, device, dtype) for device in found for name in OPERATORS for dtype in DTYPES]
    if options.json:
        results = [{**asdict(test), "passed": test.passed} for test in tests]
        print(json.dumps({"machine": machine(), "devices": [asdict(device) for device in found], "tests": results}))
    else:
        _show(found, tests)
    if not all(test.passed for test in tests):
        raise SystemExit(1)


def _show(found: list[Device], tests: list[SelfTest]) -> None:
    for name, value in machine().items():
        if value:
            print(f"{name:>12}  {value}")
    print()
    print(
        Table(
            ("device", "product", "architecture", "memory", "backend", "because"),
            [
                (
                    device.name,
                    device.product,
                    device.architecture or "",
                    "" if device.memory_gib is None else f"{device.memory_gib:.0f} GiB",
                    device.backend,
                    device.reason,
                )
                for device in found
            ],
            "lllrll",
            title="backend of every operator",
        )
    )
    print()
    print(
        Table(
            ("operator", "dtype", "device", "backend", "error", "allowed", ""),
            [
                (
                    test.operator,
                    test.dtype,
                    test.device,
                    test.backend,
                    "" if test.error is None else f"{test.error:.1e}",
                    f"{test.allowed:.1e}",
                    test.failure or "ok",
                )
                for test in tests
            ],
            "llllrrl",
            title="self-test: output and gradients against float64",
        )
    )
