"""Python processes without Triton's interpreter, which is on in the process of the tests."""

import os
import subprocess
import sys
from pathlib import Path


def python(*arguments: str, cache: Path | None = None, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the Python of the tests with `arguments`. Triton's cache is `cache`, or by default the usual one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    tests = str(Path(__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [tests, environment.get("PYTHONPATH")]))
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=seconds
    )


def fastformer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command `fastformer`."""
    return python("-m", "fastformer.cli", *arguments)
