"""The command ``fastformer kernels``: compile kernels ahead of time and report the result, without a GPU."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton
from fastformer_kernels.launch import ARCHITECTURES

from fastformer.arguments import PRECISIONS, CommandParser
from fastformer.console import track
from fastformer.extras import require
from fastformer.files import OVERWRITE_HELP, check_out
from fastformer.kernel_reports.compilation import FailedKernelsError, Work
from fastformer.kernel_reports.gate import regressions, unwanted_spills
from fastformer.kernel_reports.portable_cache import make_cache
from fastformer.kernel_reports.recorded import read_figures, record, recorded_file, write_figures
from fastformer.kernel_reports.report import Figures, as_table, compiled_figures
from fastformer.kernel_reports.workload import DTYPES, LAYOUTS, OPERATORS, cases

_COMPILE = """\
Compile kernels ahead of time into a Triton cache, for GPUs that this machine need not have. A machine with such a GPU
and the same versions of triton and fastformer launches them without compiling: set TRITON_CACHE_DIR to the cache there.

examples:
  fastformer kernels compile --arch sm_90 --model bert-base --precision bf16-mixed --out /opt/fastformer-cache
  fastformer kernels compile --arch sm_80,sm_90,gfx942 --model runs/pretrain/model --out cache --home /opt/cache
  fastformer kernels compile --arch sm_90 --operators softmax,norm --dtypes bfloat16 --out cache
  fastformer kernels compile --arch sm_90 --bench-gpu all --out cache

Without --model and --bench-gpu, every case of every operator is compiled: a thousand kernels for each architecture.
"""

_REPORT = """\
Report for each kernel and architecture: registers, spills, shared memory, residency, instructions, and an estimate of
the fraction of peak (a lower and an upper bound). Kernels are compiled first, unless --cache has them.

examples:
  fastformer kernels report --arch sm_90 --operators attention --dtypes bfloat16 --layouts aligned
  fastformer kernels report --arch sm_80,sm_90,sm_100,gfx942 --model bert-base --json report.json --picture report.png
"""

_CHECK = """\
Check for regressions: compile the guarded cases, and compare them with the figures recorded in the repository for this
version of triton. It is an error if a kernel has a new spill, too much shared memory, over 3% more instructions, lacks
a wgmma, tcgen05, TMA or asynchronous copy that it had, or is not in the figures. On sm_90, 16-bit attention with
head_dim 64, 96, 128, 256 or 512 may not spill at all. On sm_86, sm_89, sm_120 and gfx950 only attention is guarded:
causal, with block masks, and with heads wider than 128.

examples:
  fastformer kernels check --figures tests/kernel_reports/kernel_figures
  fastformer kernels check --figures tests/kernel_reports/kernel_figures --update
"""

GUARDED_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Most of their launches are those of another architecture: the gate watches attention's main cases there.
GUARDED_IN_PART = ("sm_86", "sm_89", "sm_120", "gfx950")


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer kernels`` with the arguments that follow."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> ArgumentParser:
    parser = CommandParser(prog="fastformer kernels", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    compile = commands.add_parser(
        "compile",
        help="compile kernels into a Triton cache",
        description=_COMPILE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    _add_work(compile)
    compile.add_argument(
        "--bench-gpu",
        type=_names,
        metavar="STEP,...",
        help="of these steps of `fastformer bench gpu`, or all",
    )
    compile.add_argument("--out", type=Path, default=Path("fastformer-cache"), help="the cache (default: %(default)s)")
    compile.add_argument("--home", type=Path, help="the absolute path at which the cache will be used (default: --out)")
    compile.set_defaults(run=_compile)

    report = commands.add_parser(
        "report",
        help="report registers, spills, instructions, ... of kernels",
        description=_REPORT,
        formatter_class=RawDescriptionHelpFormatter,
    )
    _add_work(report)
    report.add_argument("--json", type=Path, help="write the figures here")
    report.add_argument("--picture", type=Path, help="draw a roofline and the instruction mix here, as PNG, PDF or SVG")
    report.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    report.add_argument("--cache", type=Path, help="folder that keeps compiled kernels for the next report")
    report.set_defaults(run=_report)

    check = commands.add_parser(
        "check",
        help="fail if compiled kernels got worse",
        description=_CHECK,
        formatter_class=RawDescriptionHelpFormatter,
    )
    check.add_argument("--figures", type=Path, required=True, help="the folder of recorded figures")
    check.add_argument("--update", action="store_true", help="record the present figures for this version of triton")
    _add_arch(check, ",".join(GUARDED_ARCHITECTURES + GUARDED_IN_PART))
    check.set_defaults(run=_check)
    return parser


def _add_arch(parser: ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--arch",
        type=_names,
        required=default is None,
        default=default,
        metavar="NAME,...",
        help=f"some of {', '.join(ARCHITECTURES)}{f' (default: {default})' if default else ''}",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of kernels to compile at a time")


def _add_work(parser: ArgumentParser) -> None:
    _add_arch(parser)
    parser.add_argument("--model", help="the kernels of this model: a folder in Hugging Face's format, or a preset")
    parser.add_argument("--precision", default="bf16-mixed", help="of the model: 32-true, bf16-mixed (default), ...")
    parser.add_argument("--operators", type=_names, metavar="NAME,...", help=f"only these of {', '.join(OPERATORS)}")
    parser.add_argument("--dtypes", type=_names, metavar="NAME,...", help=f"only these of {', '.join(DTYPES)}")
    parser.add_argument("--layouts", type=_names, metavar="NAME,...", help=f"only these of {', '.join(LAYOUTS)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _compile(options: Namespace) -> None:
    if options.home and not options.home.is_absolute():
        raise ValueError(f"--home must be an absolute path; got {options.home}")
    work = _benchmark_work(options) if options.bench_gpu else [run for _, run in _selected_work(options)]
    _check_arch(options.arch)
    made = make_cache(work, options.arch, options.out, options.home, options.processes, _progress)
    if made.failures:
        print(f"{FailedKernelsError(made.failures)}\n{options.out} has the other {made.kernels - len(made.failures)}")
        raise SystemExit(1)
    if made.missed:
        print(f"the cache lacks {', '.join(f'{name} ({n})' for name, n in Counter(made.missed).items())}")
        raise SystemExit(1)
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(
        f"{made.kernels} kernels for {', '.join(options.arch)} in {options.out} ({size / 2**20:.0f} MiB); launched "
        f"again, none was compiled\nuse it with TRITON_CACHE_DIR={options.home or options.out.absolute()}"
    )


def _report(options: Namespace) -> None:
    for option, path in (("--json", options.json), ("--picture", options.picture)):
        if path is not None:
            check_out([path], options.overwrite, option=option)
    if options.picture:
        require("matplotlib")
    figures = _figures(_selected_work(options), options.arch, options.processes, options.cache)
    print(as_table(figures))
    if options.json:
        write_figures(figures, options.json)
    if options.picture:
        from fastformer.kernel_reports.picture import draw

        draw(figures, options.picture)


def _check(options: Namespace) -> None:
    path = recorded_file(options.figures)
    command = f"fastformer kernels check --figures {options.figures} --update"
    if not path.exists() and not options.update:
        raise ValueError(
            f"there is no {path}; every compiler version gives other figures. To record those of triton "
            f"{triton.__version__}: {command}"
        )
    guarded = list(cases(guarded=True))
    figures = []
    for architecture in options.arch:
        watched = [case for case in guarded if case.everywhere or architecture not in GUARDED_IN_PART]
        work = [(case.name, case.run) for case in watched]
        figures += _figures(work, [architecture], options.processes, None)
    if options.update:
        record(figures, options.arch, path)
        print(f"recorded {len(figures)} kernels in {path}")
        return
    worse = regressions([entry for entry in read_figures(path) if entry.architecture in options.arch], figures)
    if worse:
        print("\n".join(["compiled kernels got worse, or are not in the figures:", *worse]))
        print(f"if this is intended: {command}")
    unwanted = unwanted_spills(figures)
    if unwanted:
        print("\n".join(["attention kernels spill that may not:", *unwanted]))
    if worse or unwanted:
        raise SystemExit(1)
    print(f"{len(figures)} kernels are no worse than recorded in {path}")


def _figures(
    work: Sequence[tuple[str, Work]], architectures: Sequence[str], processes: int, cache: Path | None
) -> list[Figures]:
    _check_arch(architectures)
    try:
        return compiled_figures(work, architectures, cache, processes, _progress)
    except FailedKernelsError as failed:
        print(failed)
        raise SystemExit(1) from None


def _progress(steps: Iterable[None], total: int) -> Iterable[None]:
    return track(steps, "compiling", total)


def _check_arch(names: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(ARCHITECTURES))
    if unknown:
        raise ValueError(f"--arch must be among {', '.join(ARCHITECTURES)}; got {', '.join(unknown)}")


def _selected_work(options: Namespace) -> list[tuple[str, Work]]:
    """Return the work that the options select."""
    if options.model is None:
        return [(case.name, case.run) for case in cases(options.operators, options.dtypes, options.layouts)]
    if options.operators or options.dtypes or options.layouts:
        raise ValueError("--operators, --dtypes and --layouts select cases; they cannot be combined with --model")
    if options.precision not in PRECISIONS:
        raise ValueError(f"--precision must be one of {', '.join(PRECISIONS)}; got {options.precision!r}")
    from fastformer.planning.model_work import named_steps

    return named_steps(options.model, options.precision)


def _benchmark_work(options: Namespace) -> list[Work]:
    """Return the launches of steps of the GPU benchmark."""
    if options.model or options.operators or options.dtypes or options.layouts:
        raise ValueError("--bench-gpu cannot be combined with --model, --operators, --dtypes or --layouts")
    from fastformer.benchmarking.gpu.steps import STEPS, launches_of

    return launches_of(STEPS if options.bench_gpu == ["all"] else options.bench_gpu)
