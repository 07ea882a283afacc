"""These tests run compiled kernels, never the interpreter: on a GPU, or as IR that a CPU executes.

Without a GPU, run ``python -m ttsem.sanitize pytest tests/executed``. It compiles every launch to Triton's IR for sm_90
and executes it. It finds out-of-bounds accesses and races between programs, and rounds bfloat16 as hardware does. It
does not cover the compiler below that IR (layouts, pipelining, LLVM, ptxas), AMD's backend, and kernels in
`NOT_EXECUTED`. A kernel that no test launches fails the run.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

import pytest

EXECUTED = "ttsem.sanitize" in sys.modules or "ttsem" in str(getattr(sys.modules["__main__"], "__file__", ""))

# Kernels that cannot be executed, and the reason for each.
NOT_EXECUTED: dict[str, str] = {}

_launched: set[str] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "executed" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=["small", "sm_90"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The choice of tiles: small ones, so that small tensors have many, or those of an architecture."""
    from fastformer_kernels import launch

    chosen = launch.INTERPRETER if request.param == "small" else launch.ARCHITECTURES[request.param]
    monkeypatch.setattr(launch, "_target", chosen)
    return request.param


@pytest.fixture(autouse=True)
def note_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def noting(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        _launched.add(f"{self.module}.{self.fn.__name__}")
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", noting)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of the whole folder in which some kernel was not launched."""
    if not EXECUTED or session.config.option.keyword or session.testsfailed:
        return
    missing = sorted(_kernels() - _launched - set(NOT_EXECUTED))
    if missing:
        print(f"\nno test in tests/executed launches {', '.join(missing)}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    for name, reason in NOT_EXECUTED.items():
        print(f"\nnot executed: {name}: {reason}", file=sys.stderr)


def _kernels() -> set[str]:
    """Return the names of all kernels in fastformer_kernels: the Triton functions whose names end in _kernel."""
    import fastformer_kernels
    from triton.runtime.jit import JITFunction

    names = set()
    for module in pkgutil.walk_packages(fastformer_kernels.__path__, "fastformer_kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                names.add(f"{value.module}.{name}")
    return names
