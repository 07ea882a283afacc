"""Tests run on the GPU if there is one. Without a GPU every kernel runs in Triton's interpreter.

The GPU is PyTorch's default device in every test except those marked `cpu` and those in `CPU_FOLDERS`. These do not
test kernels, and see no GPU. The interpreter's switch must be set before triton is imported, and therefore holds for
the whole run: with a GPU nothing is interpreted.
"""

import atexit
import os
import random
import resource
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from devices import end_without_a_gpu, need_kernels

TESTS = Path(__file__).parent
GPU = torch.cuda.is_available()
# Folders that test data on a disk, Lightning, metrics, and tools on a CPU.
CPU_FOLDERS = {"benchmarking", "data", "evaluation", "training"}

if GPU:
    # Without it cuBLAS refuses deterministic mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Each of pytest-xdist's processes would start a compiler's process for every core.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
else:
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()
torch.set_num_threads(1)

# Every run draws the same examples. A failing one is printed as drawn: shrinking would interpret kernels for minutes.
hypothesis.settings.register_profile(
    "fastformer",
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    # The start of CUDA and the first compilation of a kernel are slow; the drawing of examples is not.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastformer")


class TorchRandom:
    """PyTorch's generator, for Hypothesis, which gives it the same state at the start of each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Hypothesis keeps no reference to it.
TORCH_RANDOM = TorchRandom()
hypothesis.register_random(TORCH_RANDOM)

# Without a new cache, torch.compile would use code cached before an operator's results changed.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="fastformer-inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Restore the environment: a test that starts processes leaves its address and rank, and the next would join it."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=200, help="configurations of attention drawn at random")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a GPU; this machine has none")
    for item in items:
        if item.path.relative_to(TESTS).parts[0] in CPU_FOLDERS:
            item.add_marker("cpu")
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)


def seed_by_name(name: str) -> None:
    """Seed the global generators by `name`: a test draws the same in every run, alone or after any other tests."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    seed_by_name(f"{request.node.nodeid} {fixturedef.argname} {getattr(request, 'param_index', 0)}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_by_name(item.nodeid)


def pytest_runtest_teardown() -> None:
    # Lightning changes the number of threads, and later tests compare runs bit by bit.
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    seed_by_name(collector.nodeid)
    report = yield
    if report.call.excinfo is not None:
        _skip_for_want_of_an_extra(report, collector, report.call.excinfo.value.__cause__)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if call.excinfo is not None:
        _skip_for_want_of_an_extra(report, item, call.excinfo.value)
    return report


def _skip_for_want_of_an_extra(
    report: pytest.CollectReport | pytest.TestReport, node: pytest.Item | pytest.Collector, error: BaseException | None
) -> None:
    """Skip a module or a test that needs a package of an extra which is not installed."""
    from fastformer.extras import missing_package, remedy

    if isinstance(error, ModuleNotFoundError) and (package := missing_package(error)):
        report.outcome = "skipped"
        report.longrepr = (str(node.path), 1, f"Skipped: needs {package}: {remedy(package)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test and its fixtures, of any scope, with the GPU as the default device, or with no GPU in sight."""
    if not GPU:
        return (yield)
    if item.get_closest_marker("cpu"):
        with without_gpu():
            return (yield)
    with torch.device("cuda"):
        result = yield
    end_without_a_gpu()
    return result


@contextmanager
def without_gpu() -> Iterator[None]:
    """Hide the GPUs from this process and from those that it starts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def device() -> torch.device:
    """The device of a test's tensors: the GPU if there is one and the test is not marked `cpu`."""
    return torch.get_default_device()


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest):
    """Run each test that takes this fixture once on every backend."""
    import fastformer

    if request.param == "triton":
        need_kernels()
    with fastformer.backend(request.param):
        yield request.param


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """A context manager in which the operating system lets no file grow beyond a number of bytes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
