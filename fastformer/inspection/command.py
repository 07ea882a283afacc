"""The command ``fastformer kernels``: compile kernels ahead of time and report what they became, with no GPU."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastformer_kernels.launch import ARCHITECTURES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastformer.inspection.compilation import Failure, compile_ahead, compiled_by, relocate
from fastformer.inspection.workload import DTYPES, LAYOUTS, OPERATORS, cases

_COMPILE = """\
Compile kernels ahead of time, for GPUs that need not be there, into a Triton cache. A machine with such a GPU and the
same version of triton and fastformer then launches them without compiling: set TRITON_CACHE_DIR to the cache there.

examples:
  fastformer kernels compile --arch sm_90 --model bert-base --precision bf16-mixed --out /opt/fastformer-cache
  fastformer kernels compile --arch sm_80,sm_90,gfx942 --model runs/pretrain/model --out cache --home /opt/cache
  fastformer kernels compile --arch sm_90 --operators softmax,norm --dtypes bfloat16 --out cache

Without --model: every case of every operator, a thousand kernels for each architecture.
"""

_console = Console(highlight=False, soft_wrap=True)


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer kernels`` with the arguments that follow."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fastformer kernels", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    compile = commands.add_parser(
        "compile",
        help="compile kernels into a Triton cache",
        description=_COMPILE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    _add_work(compile)
    compile.add_argument(
        "--model", help="compile what this model launches: a folder in Hugging Face's format, a preset"
    )
    compile.add_argument("--precision", default="bf16-mixed", help="of the model: 32-true, bf16-mixed (default), ...")
    compile.add_argument("--out", type=Path, default=Path("fastformer-cache"), help="the cache (default: %(default)s)")
    compile.add_argument("--home", type=Path, help="the absolute path where the cache will be used, if not --out")
    compile.set_defaults(run=_compile)
    return parser


def _add_work(parser: ArgumentParser) -> None:
    parser.add_argument("--arch", type=_names, required=True, metavar="NAME,...", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--operators", type=_names, metavar="NAME,...", help=f"only these of {', '.join(OPERATORS)}")
    parser.add_argument("--dtypes", type=_names, metavar="NAME,...", help=f"only these of {', '.join(DTYPES)}")
    parser.add_argument("--layouts", type=_names, metavar="NAME,...", help=f"only these of {', '.join(LAYOUTS)}")
    parser.add_argument("--processes", type=int, help="compile this many kernels at once (default: the CPUs)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check_architectures(names: list[str]) -> None:
    unknown = sorted(set(names) - set(ARCHITECTURES))
    if unknown:
        raise ValueError(f"--arch must be among {', '.join(ARCHITECTURES)}; got {', '.join(unknown)}")


def _compile(options: Namespace) -> None:
    _check_architectures(options.arch)
    if options.home and not options.home.is_absolute():
        raise ValueError(f"--home must be an absolute path; got {options.home}")
    work = _work(options)
    specializations, failures = compile_ahead(work, options.arch, options.out, options.processes, _track)
    if failures:
        _console.print(_explained(failures), markup=False)
        raise SystemExit(1)
    # The proof: the same launches, as a GPU machine makes them, find everything there.
    missed = compiled_by(work, options.arch, options.out)
    if missed:
        _console.print(f"the cache lacks {', '.join(f'{name} ({n})' for name, n in Counter(missed).items())}")
        raise SystemExit(1)
    if options.home:
        relocate(options.out, options.home)
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    _console.print(
        f"{len(specializations)} kernels for {', '.join(options.arch)} in {options.out} ({size / 2**20:.0f} MiB); "
        f"launched again, none was compiled\nuse it with TRITON_CACHE_DIR={options.home or options.out.absolute()}"
    )


def _work(options: Namespace) -> list[Callable[[], object]]:
    if options.model is None:
        return [case.run for case in cases(options.operators, options.dtypes, options.layouts)]
    if options.operators or options.dtypes or options.layouts:
        raise ValueError("--operators, --dtypes and --layouts choose cases; a --model says itself what it launches")
    from fastformer.inspection.model_work import PRECISIONS, meta_model, model_work

    if options.precision not in PRECISIONS:
        raise ValueError(f"--precision must be one of {', '.join(PRECISIONS)}; got {options.precision!r}")
    return model_work(meta_model(options.model, options.precision), options.precision)


def _explained(failures: list[Failure]) -> str:
    lines = [
        f"{failure.specialization.architecture} {failure.specialization.kernel}: {failure.reason}"
        for failure in failures
    ]
    return "\n".join([f"{len(failures)} kernels failed:", *dict.fromkeys(lines)])


def _track(steps: Iterable[None], total: int) -> Iterator[None]:
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(steps, total)
