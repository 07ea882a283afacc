"""The package installs and imports as promised."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent


def python(code: str, *options: str, **environment: str) -> str:
    """Run `code` in a new Python in the repository's root, and return what it prints."""
    command = [sys.executable, *options, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.quick
def test_import_is_lean() -> None:
    code = (
        "import sys, fastformer; print(sorted({'transformers', 'lightning', 'triton', 'datasets'} & set(sys.modules)))"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["models", "--help"], ["plan", "--help"], ["generate", "--help"]]
)
def test_help_is_lean(arguments: list[str]) -> None:
    code = (
        "import sys, atexit; from fastformer import cli\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))))\n"
        f"cli.main({arguments})"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_works_without_triton() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'triton' else find(name, package)\n"
        "sys.modules['triton'] = None\n"
        "import torch, fastformer\n"
        "q = torch.randn(1, 2, 5, 8); print(tuple(fastformer.attention(q, q, q).shape))\n"
        "try:\n"
        "    with fastformer.backend('triton'): fastformer.softmax(q)\n"
        "except RuntimeError as error: print(error)\n"
    )
    shape, error = python(code).splitlines()
    assert shape == "(1, 2, 5, 8)"
    assert "triton is not installed" in error


def test_hugging_face_kernels_is_not_shadowed() -> None:
    pytest.importorskip("kernels.layer", reason="needs Hugging Face's package kernels")
    assert "site-packages" in python("import kernels; kernels.get_kernel; print(kernels.__file__)")


def test_backend_comes_from_the_environment() -> None:
    code = (
        "import torch, fastformer\n"
        "try: fastformer.softmax(torch.zeros(2)); print('ran')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert python(code, FASTFORMER_BACKEND="torch") == "ran"
    asked = python(code, FASTFORMER_BACKEND="triton", TRITON_INTERPRET="0")
    assert asked.startswith("backend 'triton' was selected for a tensor on cpu")


def test_wheel_holds_both_packages_and_works(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "fastformer/ops/attention/attention.py" in names
    assert "fastformer_kernels/attention/forward.py" in names
    assert {"fastformer/py.typed", "fastformer_kernels/py.typed"} <= set(names)  # type checkers read our annotations
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        "import torch, fastformer, fastformer_kernels\n"
        "fastformer.softmax(torch.zeros(1, 2)); print(fastformer.__file__, fastformer_kernels.__file__)\n"
    )
    assert python(code).count(str(tmp_path)) == 2


def test_modules_can_be_loaded_again() -> None:
    """Modules can be loaded again, as in notebooks, and functions imported before still work."""
    code = (
        "import importlib, pkgutil, sys, warnings; warnings.simplefilter('ignore')\n"
        "import torch, fastformer; before = fastformer.softmax\n"
        "skipped = ('benchmarking', 'stand_in', 'process')\n"
        "for found in pkgutil.walk_packages(fastformer.__path__, 'fastformer.'):\n"
        "    if not any(part in found.name for part in skipped):\n"
        "        try: importlib.import_module(found.name)\n"
        "        except ModuleNotFoundError: pass\n"
        "modules = [name for name in sys.modules if name.startswith('fastformer')]\n"
        "for name in sorted(modules): importlib.reload(sys.modules[name])\n"
        "x = torch.randn(3, 4, requires_grad=True)\n"
        "for softmax in (before, sys.modules['fastformer.ops.softmax'].softmax):\n"
        "    softmax(x).square().sum().backward(); torch.func.vmap(softmax)(x.detach())\n"
        "    torch.compile(softmax, backend='eager', fullgraph=True)(x.detach())\n"
        "print(len(modules))"
    )
    assert int(python(code).splitlines()[-1]) > 100
