"""Tests that need a GPU, at real sizes: ``pytest -m gpu -n 8`` is meant for five minutes of an H100.

Without a GPU, ``pytest tests/gpu --dry`` runs the same tests at tiny sizes, the kernels in Triton's interpreter, and
``python -m ttsem.sanitize pytest tests/gpu --dry`` runs their compiled IR. Tests that need CUDA's own streams, graphs,
allocator or compiler are skipped there.

Processes share the GPU: each keeps to `MEMORY`. One process at a time can take a lock, and then keeps to `MUCH_MEMORY`.
A test that hangs ends its process after its time limit, and so does one that leaves the GPU unusable: pytest-xdist
starts another process for the remaining tests.
"""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from gpu.calls import CALLS
from gpu.judging import Call
from gpu.making import Maker

FOLDER = Path(__file__).parent
MEMORY = 6 << 30
MUCH_MEMORY = 26 << 30
SECONDS, SLOW_SECONDS = 100, 280
DRY_CALLS = ("rms_norm", "layer_norm of a sum", "causal attention", "paged append_to_cache")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dry", action="store_true", help="tiny sizes, on a machine without a GPU")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real: of real sizes only; see `dry_with`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dry = config.getoption("--dry", default=False)
    items[:] = [item for item in items if not (dry and item.get_closest_marker("real"))]
    others = [item for item in items if FOLDER not in item.path.parents]
    here = [item for item in items if FOLDER in item.path.parents]
    slow = [item for item in here if item.get_closest_marker("slow")]
    fast = [item for item in here if not item.get_closest_marker("slow")]
    for item in [] if dry else here:
        item.add_marker(pytest.mark.gpu)
        # A signal does not interrupt a wait for the GPU; the method "thread" ends the process.
        item.add_marker(pytest.mark.timeout(SLOW_SECONDS if item in slow else SECONDS, method="thread"))
    # The last files have the slowest tests.
    items[:] = [*spread(slow[::-1], fast), *others]


def spread(few: list[pytest.Item], many: list[pytest.Item]) -> list[pytest.Item]:
    """Spread a few tests evenly among many, because pytest-xdist gives neighbours to the same process."""
    step = -(-len(many) // max(1, len(few)))
    parts = [[test, *many[number * step : (number + 1) * step]] for number, test in enumerate(few)]
    return list(chain.from_iterable(parts)) if few else many


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes a `call` with every call, or with a few in a dry run."""
    if "call" in metafunc.fixturenames:
        dry = metafunc.config.getoption("--dry", default=False)
        metafunc.parametrize("call", DRY_CALLS if dry else list(CALLS), indirect=True)


@pytest.fixture
def call(request: pytest.FixtureRequest, make: Maker) -> Call:
    return CALLS[request.param](make)


@pytest.fixture(scope="session")
def dry(pytestconfig: pytest.Config) -> bool:
    """Whether sizes are tiny."""
    return pytestconfig.getoption("--dry", default=False)


@pytest.fixture
def real_gpu(dry: bool) -> None:
    """Skip, in a dry run, a test that uses CUDA's own streams, graphs, allocator or compiler."""
    if dry:
        pytest.skip("needs CUDA's streams, graphs, allocator or compiler; this is a dry run")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Make every operator run its kernels."""
    import fastformer

    with fastformer.backend("triton"):
        yield


@pytest.fixture
def make(dry: bool) -> Maker:
    """A maker of this test's tensors, the same in every run."""
    device = torch.device("cpu" if dry else "cuda")
    return Maker(dry, device, torch.Generator(device).manual_seed(0))


@pytest.fixture(autouse=True)
def memory(dry: bool) -> Iterator[None]:
    """Keep the process to its share of the GPU's memory, and free the memory after each test."""
    if dry:
        yield
        return
    _limit_memory(MEMORY)
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def much_memory(dry: bool, memory: None) -> Iterator[None]:
    """Give this process more of the memory, one process at a time."""
    if dry:
        yield
        return
    with (Path(tempfile.gettempdir()) / "fastformer-gpu-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _limit_memory(MUCH_MEMORY)
        yield
        gc.collect()
        torch.cuda.empty_cache()


def _limit_memory(size: int) -> None:
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole))
