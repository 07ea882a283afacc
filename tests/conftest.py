"""Without a GPU every kernel runs in Triton's interpreter; its switch must be set before triton is imported."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()
torch.set_num_threads(1)

# torch.compile's cache of an earlier version would answer for operators whose results have changed since.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fastformer-inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=2000, help="configurations of attention drawn at random")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest):
    """Each test that takes this fixture runs once on every backend."""
    import fastformer

    with fastformer.backend(request.param):
        yield request.param
