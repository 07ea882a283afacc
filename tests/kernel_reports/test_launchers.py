"""Triton's launchers, where it has any, are compiled ahead of time and found in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import fastformer, python
from triton.backends.nvidia import driver

# Launch as far as Triton goes without the driver, and print the extension modules that it has the C compiler make.
LAUNCH = """
import json
import torch
from types import SimpleNamespace
from triton.backends.nvidia import driver
from triton.runtime import build
import fastformer
from fastformer.kernel_reports import stand_in
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators

asked, loaded = [], []
build._build = lambda name, *_: asked.append(name)
build._load_module_from_path = lambda name, path: loaded.append(name) or SimpleNamespace(launch=None)
driver.libcuda_dirs = lambda: []
def launcher(self, source, metadata):
    driver.CudaLauncher(source, metadata)
    return lambda *_: None
stand_in._StandInDriver.launcher_cls = launcher
with stand_in.stand_in("sm_90"), kernels_of_meta_operators():
    x = torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta", requires_grad=True)
    fastformer.softmax(x).backward(torch.empty_like(x))
print(json.dumps({"asked": asked, "loaded": loaded}))
"""


@pytest.mark.skipif(not hasattr(driver, "make_launcher"), reason="this triton has one launcher for all signatures")
def test_a_launch_finds_its_launcher_in_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = ("--operators", "softmax", "--dtypes", "bfloat16", "--layouts", "aligned", "--processes", "1")
    done = fastformer("kernels", "compile", "--arch", "sm_90", *options, "--out", str(cache))
    assert done.returncode == 0, done.stderr
    assert "Triton cache error" not in done.stderr
    launched = python("-c", LAUNCH, cache=cache)
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout) == {"asked": [], "loaded": ["__triton_launcher", "__triton_launcher"]}
