"""Compiled row kernels read and write each tensor once, in wide accesses, and keep enough programs resident."""

from __future__ import annotations

import json

import pytest
from processes import python

# Compile the kernels of some guarded calls for sm_90, and print their figures.
COMPILE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from fastformer.kernel_reports.report import compiled_figures
from fastformer.kernel_reports.workload import cases

if __name__ == "__main__":
    work = [(case.name, case.run) for case in cases(guarded=True) if case.name.startswith(tuple(sys.argv[2:]))]
    figures = compiled_figures(work, ["sm_90"], Path(sys.argv[1]), 2, lambda steps, total: steps)
    print(json.dumps([asdict(entry) for entry in figures]))
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """The figures of each kernel, by the first two parts of the work's name and by the kernel's name."""
    folder = tmp_path_factory.mktemp("traffic")
    (folder / "compile.py").write_text(COMPILE)
    calls = (
        "norm/layer-512-residual/",
        "norm/layer-4095-residual/",
        "norm/layer-4096-residual/",
        "norm/layer-16384-residual/",
        "merge_attention/",
        "decode/",
        "cross_entropy/",
        "softmax/8x",
    )
    done = python(str(folder / "compile.py"), str(folder / "cache"), *calls)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {("/".join(entry["work"].split("/")[:2]), entry["kernel"]): entry for entry in found}


def moved(figures: dict, instruction: str) -> int:
    """Bytes that a program moves with `instruction` of at least 8 bytes. Narrower ones are for single numbers."""
    threads = 32 * figures["configuration"]["num_warps"]
    widths = {bits: figures["highlights"].get(f"{instruction}.{bits}", 0) for bits in (64, 128)}
    assert f"{instruction}.16" not in figures["highlights"]
    return sum(count * bits // 8 * threads for bits, count in widths.items())


@pytest.mark.cpu
@pytest.mark.parametrize("columns", [512, 4096])
def test_a_norm_reads_and_writes_once(figures: dict, columns: int) -> None:
    """A tile's rows in bfloat16, and weights, biases and sums in float32."""
    work, parameter = f"norm/layer-{columns}-residual", 4 * columns
    forward, backward = figures[work, "_forward_kernel"], figures[work, "_backward_kernel"]
    tile = 2 * columns * forward["configuration"]["BLOCK_ROWS"]
    assert moved(forward, "LDG") == 2 * tile + 2 * parameter  # input, residual; weight, bias
    assert moved(forward, "STG") == 2 * tile  # the sum, the output
    tile = 2 * columns * backward["configuration"]["BLOCK_ROWS"]
    assert moved(backward, "LDG") == 3 * tile + parameter  # the gradients of output and sum, the sum; weight
    wide = moved(backward, "STG")
    assert wide in (tile + 2 * parameter, tile)  # the input's gradient; partial sums may be stored as single numbers


@pytest.mark.cpu
def test_the_backward_of_a_wide_norm_is_one_kernel(figures: dict) -> None:
    """It reads the gradient of the output, x and weight for the means, and the same with the sum's gradient for dx."""
    work, columns = "norm/layer-16384-residual", 16384
    backwards = [entry for (name, kernel), entry in figures.items() if name == work and "backward" in kernel]
    assert [entry["kernel"] for entry in backwards] == ["_backward_wide_rows_kernel"]
    assert backwards[0]["spill_bytes"] == 0
    assert moved(backwards[0], "LDG") == 2 * (2 * 2 * columns + 4 * columns) + 2 * columns
    assert moved(backwards[0], "STG") == 2 * columns + 4 * columns  # the input's gradient, and partial sums


@pytest.mark.cpu
def test_a_softmax_of_few_rows_reads_each_tensor_twice_and_writes_once(figures: dict) -> None:
    """The first launch of each pass writes single numbers, statistics of its part."""
    tile = 2 * 4096
    traffic = {"_softmax_forward_kernel": (1, 0), "_softmax_forward_kernel (2)": (1, 1)}
    traffic |= {"_softmax_backward_kernel": (2, 0), "_softmax_backward_kernel (2)": (2, 1)}
    for kernel, (read, written) in traffic.items():
        entry = figures["softmax/8x131072", kernel]
        assert entry["configuration"]["BLOCK_COLUMNS"] == 4096 and entry["spill_bytes"] == 0
        assert (moved(entry, "LDG"), moved(entry, "STG")) == (read * tile, written * tile), kernel


@pytest.mark.cpu
def test_kernels_of_rows_keep_programs_resident(figures: dict) -> None:
    """No spills, and at least 768 threads of the norm's kernels and 1,280 of a merge's on a multiprocessor.

    A wide norm's backward has half of the registers for its sums, and 512 threads.
    """
    for (work, kernel), entry in figures.items():
        least = 1280 if kernel == "_merge_kernel" else 768 if work.startswith("norm/") else 0
        least = 512 if kernel == "_backward_wide_rows_kernel" else least
        if least and "attention/" not in work.removeprefix("merge_"):
            assert entry["spill_bytes"] == 0, (work, kernel)
            assert entry["ctas"] * 32 * entry["configuration"]["num_warps"] >= least, (work, kernel, entry["registers"])


@pytest.mark.cpu
def test_rows_that_begin_anywhere_are_read_and_written_in_wide_accesses(figures: dict) -> None:
    """Only the elements before and after a row's tiles are single, in fewer accesses than a tile's part of a thread."""
    for kernel in ("_cross_entropy_kernel", "_cross_entropy_kernel (2)"):
        entry = figures["cross_entropy/50257", kernel]
        highlights = entry["highlights"]
        assert entry["spill_bytes"] == 0
        assert highlights["LDG.128"] >= 4 and highlights.get("LDG.16", 0) < 16, highlights
    assert highlights["STG.128"] == 4 and highlights["STG.16"] == 1, highlights
    for way, read, written in (("forward", 2, 2), ("backward", 3, 1)):
        entry = figures["norm/layer-4095-residual", f"_{way}_of_odd_rows_kernel"]
        highlights = entry["highlights"]
        assert entry["configuration"]["BLOCK_COLUMNS"] == 8 * 32 * entry["configuration"]["num_warps"]
        assert highlights["LDG.128"] == highlights["LDG.16"] == read, highlights
        assert highlights["STG.128"] == highlights["STG.16"] == written, highlights
    for way, tensors in (("forward", 1), ("backward", 2)):
        entry = figures["softmax/8x50257", f"_softmax_{way}_kernel (2)"]
        highlights = entry["highlights"]
        assert entry["spill_bytes"] == 0
        assert highlights["LDG.128"] == 2 * tensors and highlights["LDG.16"] == tensors, highlights
        assert highlights["STG.128"] == 2 and highlights["STG.16"] == 1, highlights
