"""A test of which text models of the installed transformers run on ``attn_implementation="fastformer"``.

    python -m fastformer.integrations.verification.coverage --out docs/transformers_coverage.md

Each class is built small with random weights, run with eager attention and with ours on a padded batch, and compared:
outputs, the gradient of every parameter, and what it generates.
"""

from __future__ import annotations

import argparse
import inspect
import math
import signal
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.auto import modeling_auto

from fastformer.backends import backend
from fastformer.console import track
from fastformer.files import OVERWRITE_HELP, atomic_file, check_out
from fastformer.integrations.attention.forward import attention_forward
from fastformer.integrations.verification.small_models import END, FIRST_WORD, VOCABULARY, small_model
from fastformer.markdown import table

EQUAL = 1e-5
SECONDS = 60
BATCH, TOKENS = 2, 8
TASKS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "TEXT_ENCODING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
)


@dataclass(frozen=True)
class Outcome:
    """The result for one class: `verdict` is a key of VERDICTS, `reason` explains any verdict but the first."""

    model: str
    verdict: str
    reason: str = ""


VERDICTS = {
    "equal": "Outputs, gradients, and what it generates if it does, are those of its eager attention",
    "own attention": "The class computes attention itself, or has none; ours is not asked",
    "refused": "Ours raises an error that says why",
    "not comparable": "Eager attention gives no reference: not the same numbers twice, or not finite ones",
    "not built": "No small model could be built, or run on tokens alone",
    "different": "Ours gives something else: a defect",
}


def text_models() -> list[str]:
    """Return the names of the classes that an Auto class for text lists."""
    names: set[str] = set()
    for task in TASKS:
        for classes in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            names |= {classes} if isinstance(classes, str) else set(classes)
    return sorted(names)


def examine(name: str) -> Outcome:
    """Build the class small and compare its attention with ours."""
    try:
        with _time_limit():
            model = small_model(getattr(transformers, name))
            inputs = _inputs(model)
            expected = _results(model, inputs)
    except Exception as error:  # a class may raise anything for a configuration it was never given before
        return Outcome(name, "not built", _in_a_line(error))
    with _time_limit():
        return _compare(name, model, inputs, expected)


def _compare(name: str, model: PreTrainedModel, inputs: dict[str, Any], expected: dict[str, Tensor]) -> Outcome:
    if not all(value.isfinite().all() for value in expected.values()):
        return Outcome(name, "not comparable", "the small model's numbers are not finite")
    if _difference(_results(model, inputs), expected):
        return Outcome(name, "not comparable", "eager attention does not give the same numbers twice")
    generated = _generated_or_none(model, inputs)
    model.set_attn_implementation("fastformer")
    try:
        # Without a chosen backend, a CPU would run the model's own SDPA on such small inputs.
        with backend("torch"), _counted_calls() as calls:
            actual = _results(model, inputs)
            if generated is not None:
                actual["generated"], expected["generated"] = _generate(model, inputs), generated
    except (TypeError, ValueError, RuntimeError) as error:
        ours = any("fastformer" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[1:])
        return Outcome(name, "refused" if ours else "different", _in_a_line(error))
    if not calls:
        asks = type(model)._can_set_attn_implementation()
        return Outcome(name, "own attention", "has none" if asks else "asks for no attention implementation")
    if (difference := _difference(actual, expected)) and not _as_exact(model, inputs, actual, expected):
        return Outcome(name, "different", difference)
    return Outcome(name, "equal", "not generating" if generated is None and model.can_generate() else "")


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Make a batch with padding: before the text if the model generates, after it if not."""
    torch.manual_seed(1)
    parameters = inspect.signature(type(model).forward).parameters
    ids = torch.randint(FIRST_WORD, VOCABULARY - 6, (BATCH, TOKENS))
    ids[:, TOKENS // 2] = END  # some classifiers read this token
    mask = torch.ones_like(ids)
    encodes = model.config.is_encoder_decoder or not model.can_generate()
    mask[1, slice(-3, None) if encodes else slice(3)] = 0
    inputs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in parameters:
        inputs["attention_mask"] = mask
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids.flip(1)
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {key: value[:, None].repeat(1, 2, 1) for key, value in inputs.items()}
    return inputs


def _results(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the first floating output where there is no padding, and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(2)
    output = next(value for value in model(**inputs).to_tuple() if torch.is_tensor(value) and value.is_floating_point())
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and output.shape[: mask.dim()] == mask.shape:
        output = output[mask.bool()]
    torch.manual_seed(3)
    (output * torch.randn(output.shape)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"output": output.detach()} | {name: gradient.clone() for name, gradient in gradients.items()}


def _generate(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 1}
    prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    output: Any = model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)  # type: ignore[operator]
    return torch.stack(output.logits)


def _generated_or_none(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
    """Return what eager attention generates; None if the class does not generate, which some leave to others."""
    if not model.can_generate():
        return None
    try:
        return _generate(model, inputs)
    except Exception:
        return None


def _difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Return the largest difference if it exceeds 1e-5 of its tensor's largest element and of 1; otherwise ""."""
    if actual.keys() != expected.keys():
        return f"only one of them has {', '.join(sorted(actual.keys() ^ expected.keys()))}"
    errors = {name: _error(actual[name], value) for name, value in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    return "" if errors[worst] <= EQUAL else f"{worst} by {errors[worst]:.1e}"


def _as_exact(
    model: PreTrainedModel, inputs: dict[str, Any], actual: dict[str, Tensor], eager: dict[str, Tensor]
) -> bool:
    """Whether rounding explains the difference: against float64 the worst error is at most twice transformers' own."""
    own = [eager]
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
        own.append(_results(model, inputs))
    model.set_attn_implementation("eager")
    exact = _results(model.double(), inputs)
    if model._supports_sdpa and not all(value.isfinite().all() for value in exact.values()):
        # Eager attention rounds to float32 even here: the least number of float64, its mask, becomes -inf, and a row of
        # padding NaN.
        model.set_attn_implementation("sdpa")
        exact = _results(model, inputs)
    ours, *theirs = (max(_error(results[name], value) for name, value in exact.items()) for results in (actual, *own))
    return ours <= 2 * max(theirs)


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item() if expected.numel() else 0.0


@contextmanager
def _counted_calls() -> Iterator[list[str]]:
    """Yield a list that grows with every call of our attention."""
    calls: list[str] = []

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return attention_forward(module, *args, **kwargs)

    AttentionInterface.register("fastformer", counted)
    try:
        yield calls
    finally:
        AttentionInterface.register("fastformer", attention_forward)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError after SECONDS, if the system has such a signal."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:160] + '…'}"


def markdown(outcomes: Iterable[Outcome]) -> str:
    """Make the table: the number of classes of each verdict, and for each model type those with the same outcome."""
    outcomes = list(outcomes)
    counts = Counter(outcome.verdict for outcome in outcomes)
    introduction = [
        f"Every text model class of transformers {transformers.__version__}, built small with random weights and",
        "compared with its own eager attention in float32: equal to 1e-5 of the largest element, or with an error",
        "against float64 of at most twice that of transformers' eager or SDPA attention. Made by",
        "`python -m fastformer.integrations.verification.coverage --out docs/transformers_coverage.md`.",
    ]
    meanings = [(verdict, str(counts[verdict]), meaning) for verdict, meaning in VERDICTS.items()]
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for outcome in outcomes:
        model_type = getattr(transformers, outcome.model).config_class.model_type
        groups[model_type, outcome.verdict, outcome.reason].append(outcome.model)
    rows = [
        (model_type, verdict, ", ".join(sorted(names)), reason.replace("[", "\\["))  # in an error, it begins no link
        for (model_type, verdict, reason), names in sorted(groups.items())
    ]
    parts = [
        "# Text models of transformers on Fastformer's attention",
        "\n".join(introduction),
        table(("outcome", "classes", "what it means"), "lll", meanings),
        table(("model type", "outcome", "classes", "reason"), "llll", rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a class differs from eager attention."""
    parser = argparse.ArgumentParser(
        prog="python -m fastformer.integrations.verification.coverage", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="file for the Markdown table; default: print it")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="examine these only, by their names in transformers"
    )
    options = parser.parse_args(arguments)
    if options.out is not None:
        try:
            check_out([options.out], options.overwrite)
        except ValueError as error:
            parser.error(str(error))
    names = options.classes or text_models()
    if unknown := sorted({*names} - {*text_models()}):
        parser.error(f"not a text model class of transformers {transformers.__version__}: {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = [examine(name) for name in track(names, "classes")]
    text = markdown(outcomes)
    if options.out is None:
        print(text)
    else:
        with atomic_file(options.out) as file:
            file.write(text.encode())
    return int(any(outcome.verdict == "different" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
