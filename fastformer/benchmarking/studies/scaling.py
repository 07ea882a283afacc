"""The cost of a training step by its sizes: measured, fitted to counts of its work, and predicted for larger sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Literal

from fastformer.benchmarking.data_parallel import DataParallelSteps, data_parallel_steps
from fastformer.benchmarking.fits import Fit, Terms, fit
from fastformer.benchmarking.measurement import OURS, PEAK_MEMORY, TIME, Goal, Measurement, Metric
from fastformer.benchmarking.processes import most_processes
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.training_steps import Kind, Shape, counted, training_step

NAME = "scaling"
MODEL = "model"
KINDS: tuple[Kind, ...] = ("BERT-like", "GPT-like")
COEFFICIENT = Metric("coefficient", "")
_ROUNDS = 3
_MIB = 2**20

# --- The sizes --------------------------------------------------------------------------------------------------------

Role = Literal["fitted", "held out", "extrapolated"]
_LENGTH, _TOKENS, _LAYERS, _WIDTH = "tokens of a sequence", "tokens of a step", "layers", "hidden size"


@dataclass(frozen=True)
class Point:
    """A size along an axis. By its role it is used to fit the model, is held out to test it, or is only predicted."""

    axis: str
    at: int
    role: Role
    shape: Shape

    @property
    def case(self) -> str:
        return f"{self.role}: {self.shape}"

    @property
    def curve(self) -> str:
        return f"{self.shape.kind}, by {self.axis}"


def points(kind: Kind, quick: bool) -> list[Point]:
    """The sizes along each axis: sizes to fit, the largest measured size, which is held out, and sizes beyond it."""
    sizes: dict[str, tuple[tuple[int, ...], int, tuple[int, ...]]]
    if quick:
        base = Shape(kind, layers=1, hidden=64, tokens=256, length=32, vocabulary=512)
        sizes = {
            _TOKENS: ((64, 128), 512, (2048,)),
            _WIDTH: ((128,), 192, (512,)),
        }
    else:
        base = Shape(kind, layers=4, hidden=256, tokens=2048, length=128, vocabulary=4096)
        sizes = {
            _LENGTH: ((64, 512, 1024), 2048, (8192, 32768, 131072)),
            _TOKENS: ((512, 1024, 3072), 8192, (65536, 524288)),
            _LAYERS: ((1, 2, 6), 12, (24, 96)),
            _WIDTH: ((128, 320, 384), 768, (1536, 6144)),
        }
    few = replace(base, tokens=base.tokens // 2)
    resized: dict[str, Callable[[int], Shape]] = {
        # If a sequence is longer than all tokens of the other steps, a step has one sequence.
        _LENGTH: lambda size: replace(base, length=size, tokens=max(size, base.tokens)),
        _TOKENS: lambda size: replace(base, tokens=size),
        _LAYERS: lambda size: replace(few, layers=size),
        _WIDTH: lambda size: replace(few, hidden=size),
    }
    found = []
    for axis, (fitted, held_out, beyond) in sizes.items():
        roles: list[tuple[int, Role]] = [(size, "fitted") for size in fitted]
        roles += [(held_out, "held out"), *((size, "extrapolated") for size in beyond)]
        found += [Point(axis, size, role, resized[axis](size)) for size, role in roles]
    return found


def measured_points(quick: bool) -> list[Point]:
    return [point for kind in KINDS for point in points(kind, quick) if point.role != "extrapolated"]


def cases(setting: Setting) -> list[Case]:
    return [
        Case(
            point.case,
            {OURS: Peer(partial(training_step, point.shape, setting.device))},
            _step_work(point.shape),
            curve=point.curve,
            axis=point.axis,
            at=point.at,
            memory=not setting.quick and _has_memory(point),
        )
        for point in measured_points(setting.quick)
    ]


def _has_memory(point: Point) -> bool:
    """Whether memory is measured at the point, in a new process. On most axes one kind of model is enough."""
    return point.shape.kind == "BERT-like" or point.axis == _TOKENS


# --- What a step consists of ------------------------------------------------------------------------------------------

_CONSTANT = "every step: s"
_PRODUCTS = "products: s for 10^12 operations"
_ATTENTION = "attention: s for 10^12 operations"
_TRAFFIC = "passes over activations: s for each GB kept for the backward"
_OPTIMIZER = "optimizer: s for 10^9 parameters"


def _step_work(shape: Shape) -> dict[str, float]:
    """The tokens of a step, and the operations of its forward and backward."""
    return {"tokens": shape.tokens, "FLOP": 3 * counted(shape).flops.total * shape.sequences}


def time_terms(shape: Shape) -> Terms:
    """The terms of a step's seconds = a + b products + c attention + d bytes kept for the backward + e parameters.

    For layers of equal width, products are 72 tokens layers hidden^2 operations plus the vocabulary's. Attention has 12
    tokens length layers hidden operations, half of it if causal. All are counted on the model; see `model_cost`.
    """
    cost = counted(shape)
    return {
        _CONSTANT: 1.0,
        _PRODUCTS: 3 * cost.flops.products * shape.sequences / 1e12,
        _ATTENTION: 3 * cost.flops.attention * shape.sequences / 1e12,
        _TRAFFIC: cost.saved * shape.sequences / 1e9,
        _OPTIMIZER: cost.parameters / 1e9,
    }


def memory_terms(shape: Shape) -> Terms:
    """The terms of a step's MiB = a + b counted. If the count is exact, a is 0 and b is 1."""
    cost = counted(shape)
    # Weights, gradients and Adam's two moments, with four bytes each.
    state = 16 * cost.parameters + cost.casts
    # During a block's backward, the gradients of the tensors it kept exist for a while.
    activations = (cost.saved + cost.saved_by_block) * shape.sequences
    return {"every step: MiB": 1.0, "MiB for each MiB counted": (state + activations) / _MIB}


# --- What follows from the measurements -------------------------------------------------------------------------------


def conclusions(setting: Setting, measured: Sequence[Measurement]) -> Iterator[Measurement]:
    """Yield the predictions for all sizes, and the measurements of a step divided among processes."""
    yield from predictions(setting.quick, measured)
    yield from processes(setting)


def predictions(quick: bool, measured: Sequence[Measurement]) -> Iterator[Measurement]:
    """Fit the model to the measurements, and yield its coefficients and its predictions for all sizes."""
    for kind in KINDS:
        steps = points(kind, quick)
        seconds = _fitted(steps, time_terms, [each for each in measured if each.metric == TIME])
        yield from _predictions(steps, time_terms, seconds, TIME)
        yield from _coefficients(f"{kind}, time of a step", seconds)
        yield from _attention_outweighs_products(steps[0].shape, seconds)
        mebibytes = [each for each in measured if each.metric == PEAK_MEMORY]
        steps = [point for point in steps if any(each.curve == point.curve for each in mebibytes)]
        if steps:
            memory = _fitted(steps, memory_terms, mebibytes)
            yield from _predictions(steps, memory_terms, memory, PEAK_MEMORY)
            yield from _coefficients(f"{kind}, memory of a step", memory)


def _fitted(steps: Sequence[Point], terms: Callable[[Shape], Terms], measured: Sequence[Measurement]) -> Fit:
    known = {each.case: each.median for each in measured}
    used = [point for point in steps if point.role == "fitted" and point.case in known]
    return fit([terms(point.shape) for point in used], [known[point.case] for point in used])


def _predictions(
    steps: Sequence[Point], terms: Callable[[Shape], Terms], fitted: Fit, metric: Metric
) -> Iterator[Measurement]:
    for point in steps:
        value = fitted(terms(point.shape))
        yield _modelled(point.case, metric, value, _step_work(point.shape), point.curve, point.axis, point.at)


def _coefficients(of: str, fitted: Fit) -> Iterator[Measurement]:
    for name, value in fitted.coefficients.items():
        yield _modelled(f"{of}: {name}", COEFFICIENT, value)


def _attention_outweighs_products(shape: Shape, fitted: Fit) -> Iterator[Measurement]:
    """Yield the length at which attention takes as long as products. Only attention's work per token grows with it."""
    terms = time_terms(shape)
    products, attention = (fitted.coefficients[name] * terms[name] for name in (_PRODUCTS, _ATTENTION))
    if attention:
        name = (
            f"{shape.kind}, hidden size {shape.hidden}: tokens of a sequence whose attention takes as long as products"
        )
        yield _modelled(name, COEFFICIENT, shape.length * products / attention)


def _modelled(
    case: str,
    metric: Metric,
    value: float,
    work: dict[str, float] | None = None,
    curve: str | None = None,
    axis: str | None = None,
    at: float | None = None,
) -> Measurement:
    return Measurement(NAME, case, MODEL, metric, [value], work or {}, curve, axis, at, modelled=True)


# --- Processes --------------------------------------------------------------------------------------------------------

_CURVE, _PROCESSES = "a BERT-like step divided among processes (DDP)", "processes"
_WHOLE = "the whole batch: s"


def processes(setting: Setting) -> Iterator[Measurement]:
    """Measure a step divided among processes, compared with threads of one process and with predictions from parts."""
    shape = _divided(setting.quick)
    most = min(most_processes(setting.device), shape.sequences)
    rounds = setting.rounds or (2 if setting.quick else _ROUNDS)
    found = data_parallel_steps(shape, 1 if setting.quick else most, setting.device, rounds)
    alone = {1: found.share[1]}
    for peer, lines in ((OURS, found.processes), ("threads of one process", found.threads)):
        for count, values in (alone | lines).items() if lines or peer == OURS else ():
            case = _case(count, max(found.share))
            yield Measurement(NAME, case, peer, TIME, values, _step_work(shape), _CURVE, _PROCESSES, count)
    if found.exchange:
        yield from _predicted_processes(shape, found)


def _predicted_processes(shape: Shape, found: DataParallelSteps) -> Iterator[Measurement]:
    """Predict the time of n processes: that of one process alone with 1/n of the tokens, plus the gradient exchange.

    The exchange has the measured speed.
    """
    share = fit([_share_terms(count) for count in found.share], [median(values) for values in found.share.values()])
    gradients, most = 4 * counted(shape).parameters, max(found.exchange)
    speed = _sent(gradients, most) / median(found.exchange[most])

    def seconds(count: int) -> float:
        return share(_share_terms(count)) + _sent(gradients, count) / speed

    for count in [*found.share, *(most << extra for extra in range(1, 6))]:
        case = _case(count, most)
        yield _modelled(case, TIME, seconds(count), _step_work(shape), _CURVE, _PROCESSES, count)
    yield from _coefficients("processes, time of a step", share)
    yield _modelled("processes, exchange of gradients: GB/s of each", COEFFICIENT, speed / 1e9)
    half = next((count for count in range(2, 1 << 14) if seconds(1) < 0.5 * count * seconds(count)), None)
    if half is not None:
        yield _modelled("processes, of which each does less than half as much as one alone", COEFFICIENT, half)


def _share_terms(count: int) -> Terms:
    return {_CONSTANT: 1.0, _WHOLE: 1 / count}


def _sent(size: float, count: int) -> float:
    """Bytes that each of `count` processes in a ring sends to add up `size` bytes."""
    return 2 * (count - 1) / count * size


def _case(count: int, most: int) -> str:
    role = "fitted" if count == 1 else "held out" if count <= most else "extrapolated"
    return f"{role}: {_CURVE}, {count:,}"


def _divided(quick: bool) -> Shape:
    if quick:
        return Shape("BERT-like", layers=1, hidden=64, tokens=512, length=32, vocabulary=512)
    return Shape("BERT-like", layers=4, hidden=256, tokens=4096, length=64, vocabulary=4096)


_BOUNDS = {"at_least": 0.75, "at_most": 1.33}
STUDY = TimedStudy(
    name=NAME,
    title="a training step's cost by its sizes, measured and predicted",
    cases=cases,
    rounds=_ROUNDS,
    memory="everything",
    conclusions=conclusions,
    goals=[
        Goal("held out", MODEL, metric, **{bound: value})
        for metric in (TIME, PEAK_MEMORY)
        for bound, value in _BOUNDS.items()
    ],
    note="""\
The model is a sum of terms, which are counted on the neural network and the batch, not measured. The terms of time are:
a constant, operations of products with weights (72 tokens layers hidden^2, and the vocabulary's), operations of
attention (12 tokens length layers hidden; half of it if causal), bytes that are kept for the backward (for the passes
over activations), and parameters (for the optimizer). The terms of memory are: a constant, and the bytes of weights,
gradients, Adam's moments and kept activations. The coefficients are fitted by non-negative least squares of relative
errors to the sizes called "fitted". The largest measured sizes are "held out": the fit has not seen them. The sizes
called "extrapolated" (dashed, on grey) were not measured. Compared with the model, fastformer's speed of 0.9 x means
that a step took 1.11 times the predicted time.

The model is valid for this machine, in float32, for sequences of equal length, and while the step fits into memory. It
assumes that products run as fast as at the fitted widths: smaller ones are slower, and on many cores also larger ones
up to some width. For n processes, the model adds two times: that of one process alone with 1/n of the tokens, and that
of exchanging 2 (n - 1) / n of the gradients' bytes at the speed that was measured for a sum of that size. It assumes
that nothing overlaps, that each process has its own core, and that memory bandwidth is not the limit. For more
processes than this machine has cores, it assumes more cores of the same kind and the same speed of exchange.
""",
)
