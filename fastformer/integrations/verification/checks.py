"""Checks that a transformers model computes the same with Fastformer's kernels as without them.

Each check runs the model twice: unchanged, with eager attention, and with attention "fastformer", also accelerated. In
float32 the two have to agree to 1e-5 of the largest element. In half precision both are compared with eager attention
in float32 on the same rounded weights. There the error may be twice eager's own plus one unit of rounding. Float64
would not be a better reference: transformers' softmaxes and norms compute in float32 for any dtype of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.backends import backend
from fastformer.console import track
from fastformer.integrations.acceleration import Acceleration, accelerate
from fastformer.integrations.verification.subject import TOKENS, Subject

TOLERANCE = 1e-5
NEW_TOKENS = 6

Results = dict[str, Tensor]
Measurement = Callable[[Any], Results]
"""Named tensors of a model."""


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        name: what was compared.
        status: "passed", "failed" or "not applicable".
        error: the largest error, relative to the largest element; `allowed`: the largest allowed error.
        detail: the place of the error, or why there is no error.
    """

    name: str
    status: str
    error: float | None = None
    allowed: float | None = None
    detail: str = ""


def verify(
    subject: Subject, accelerated: bool = True, backend_name: str = "auto"
) -> tuple[Acceleration | None, list[Check]]:
    """Compare the subject's model with itself on Fastformer.

    Args:
        subject: the model and its inputs.
        accelerated: whether `fastformer.accelerate` is applied; otherwise only attention is replaced.
        backend_name: the backend of Fastformer's operators.

    Returns:
        The report of the acceleration, if any, and the checks.

    Raises:
        ValueError: the model itself does not run, or no part of it is replaced, so that there is nothing to compare.
    """
    candidate = copy.deepcopy(subject.model)
    report = accelerate(candidate) if accelerated else None
    checks: list[Check] = []
    if candidate._can_set_attn_implementation():
        candidate.set_attn_implementation("fastformer")
    elif not accelerated:
        raise ValueError(
            f"{type(candidate).__name__} takes no attention implementation: no part of it would be replaced"
        )
    # Without a chosen backend, a CPU runs a model's own SDPA on all small inputs.
    chooses = backend_name == "auto" and candidate.device.type == "cpu"
    pair = _Pair(subject, candidate, "torch" if chooses else backend_name)
    for check in track(_CHECKS, "verifying"):
        checks += check(pair)
        if checks[0].status == "not applicable":
            raise ValueError(f"{type(subject.model).__name__} does not run on an input made here; {checks[0].detail}")
    return report, checks


@dataclass(frozen=True)
class _Pair:
    """The subject, and its model on Fastformer."""

    subject: Subject
    candidate: Any
    backend_name: str

    def compare(self, names: tuple[str, ...], measure: Measurement) -> list[Check]:
        """Make one check for each of `names`, of the results whose names start with it, in float32."""
        try:
            expected = measure(self.subject.model)
        except Exception as error:  # if the model itself fails, ours need not work
            return [Check(name, "not applicable", detail=f"eager: {_reason(error)}") for name in names]
        try:
            with backend(self.backend_name):
                actual = measure(self.candidate)
        except Exception as error:
            return [Check(name, "failed", detail=_reason(error)) for name in names]
        return [_agreement(name, _part(actual, name), _part(expected, name)) for name in names]

    def compare_in(self, dtype: torch.dtype) -> list[Check]:
        """Check outputs and gradients in half precision; the error is measured against float32."""
        kinds = ("outputs", "gradients")
        names = [f"{str(dtype).removeprefix('torch.')} {kind}" for kind in kinds]
        batch = self.subject.batch("right" if self.subject.reads_tokens else None)
        try:
            rounded = _converted(self.subject.model, dtype)
            exact = _forward_and_backward(_converted(rounded, torch.float32), batch)
            eager = _forward_and_backward(rounded, batch)
        except Exception as error:
            return [Check(name, "not applicable", detail=f"eager: {_reason(error)}") for name in names]
        try:
            with backend(self.backend_name):
                ours = _forward_and_backward(_converted(self.candidate, dtype), batch)
        except Exception as error:
            return [Check(name, "failed", detail=_reason(error)) for name in names]
        checks = []
        for name, kind in zip(names, kinds, strict=True):
            found, own = (_relative_distance(_part(results, kind), _part(exact, kind)) for results in (ours, eager))
            allowed = 2.0 * own + torch.finfo(dtype).eps
            status = "passed" if found <= allowed else "failed"
            checks.append(Check(name, status, found, allowed, f"eager's own: {own:.1e}"))
        return checks


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _part(results: Results, kind: str) -> Results:
    return {name: tensor for name, tensor in results.items() if name.startswith(kind)}


def _agreement(name: str, actual: Results, expected: Results) -> Check:
    """Check whether every tensor is equal to 1e-5 of the largest element of all."""
    if not expected:
        return Check(name, "not applicable", detail="the model has none")
    if actual.keys() != expected.keys():
        return Check(name, "failed", detail=f"{sorted(actual.keys() ^ expected.keys())[0]} is there only once")
    worst, place = 0.0, ""
    for key, tensor in expected.items():
        if actual[key].shape != tensor.shape:
            return Check(name, "failed", detail=f"{key}: shape {[*actual[key].shape]}, not {[*tensor.shape]}")
        if tensor.numel():
            error = float((actual[key] - tensor).abs().max() / tensor.abs().max().clamp_min(1.0))
            if not error <= worst:
                worst, place = error, key
    status = "passed" if worst <= TOLERANCE else "failed"
    return Check(name, status, worst, TOLERANCE, place if status == "failed" else "")


def _relative_distance(actual: Results, exact: Results) -> float:
    """Return the Euclidean distance of all elements together, relative to their length."""
    distance = sum(float((actual[name].double() - tensor).square().sum()) for name, tensor in exact.items())
    return (distance / sum(float(tensor.square().sum()) for tensor in exact.values())) ** 0.5


def _converted(model: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(dtype)


def _forward_and_backward(model: Any, batch: dict[str, Tensor], **options: Any) -> Results:
    """Return outputs, the loss if the model has one, and every parameter's gradient."""
    model.zero_grad()
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    given = {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in moved.items()}
    output = model(**given, **options)
    outputs = {
        f"outputs {name}": _attended(tensor, given)
        for name, tensor in output.items()
        if isinstance(tensor, Tensor) and name != "loss"
    }
    loss = output.get("loss")
    if loss is not None and not loss.requires_grad:
        loss = None
    objective = torch.stack([tensor.float().sin().sum() for tensor in outputs.values()]).sum() if loss is None else loss
    objective.backward()
    gradients = {
        f"gradients {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    losses = {} if loss is None else {"loss": loss.detach()}
    return {name: tensor.detach() for name, tensor in outputs.items()} | losses | gradients


def _attended(tensor: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the tensor without its values at padding, which must not be used."""
    mask = batch.get("attention_mask")
    return tensor if mask is None or mask.dim() != 2 or tensor.shape[:2] != mask.shape else tensor[mask.bool()]


def _plain(pair: _Pair) -> list[Check]:
    batch = pair.subject.batch()
    return pair.compare(("outputs", "loss", "gradients"), lambda model: _forward_and_backward(model, batch))


def _padding(side: str) -> Callable[[_Pair], list[Check]]:
    def check(pair: _Pair) -> list[Check]:
        name = f"{side} padding"
        if not pair.subject.reads_tokens:
            return [Check(name, "not applicable", detail=f"it reads {pair.subject.model.main_input_name}")]
        batch = pair.subject.batch(side)
        return pair.compare((name,), lambda model: _named(name, _forward_and_backward(model, batch)))

    return check


def _named(name: str, results: Results) -> Results:
    return {f"{name} {key}": tensor for key, tensor in results.items()}


def _packed(pair: _Pair) -> list[Check]:
    """Check documents in one row, separated by position_ids that start again."""
    subject, name = pair.subject, "packed"
    reason = _no_decoder(subject)
    if reason is not None:
        return [Check(name, "not applicable", detail=reason)]
    torch.manual_seed(1)
    ids = subject.tokens(1, TOKENS)
    positions = torch.cat((torch.arange(4), torch.arange(TOKENS - 4)))[None]
    batch = {"input_ids": ids, "position_ids": positions}
    return pair.compare((name,), lambda model: _named(name, _forward_and_backward(model, batch, use_cache=False)))


def _four_dimensional(pair: _Pair) -> list[Check]:
    """Check a mask of numbers to add, (batch, 1, queries, keys), that is neither causal nor padding."""
    subject, name = pair.subject, "4-D mask"
    if not subject.reads_tokens or subject.model.config.is_encoder_decoder:
        return [Check(name, "not applicable", detail="it takes a mask of another kind")]
    batch = subject.batch()
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    allowed = torch.rand(3, 1, TOKENS, TOKENS, generator=generator) < 0.6
    allowed = (allowed & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()) | torch.eye(TOKENS, dtype=torch.bool)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    batch = {**batch, "attention_mask": mask}
    return pair.compare((name,), lambda model: _named(name, _forward_and_backward(model, batch)))


def _no_decoder(subject: Subject) -> str | None:
    if not subject.reads_tokens or subject.model.config.is_encoder_decoder or not subject.model.can_generate():
        return "it is not a decoder of tokens"
    return None


def _generation(name: str, side: str | None, **options: Any) -> Callable[[_Pair], list[Check]]:
    def check(pair: _Pair) -> list[Check]:
        subject = pair.subject
        if not subject.model.can_generate():
            return [Check(name, "not applicable", detail="its class does not generate")]
        if side is not None and not subject.reads_tokens:
            return [Check(name, "not applicable", detail="it reads no tokens that could be padded")]
        inputs = {
            key: tensor for key, tensor in subject.batch(side).items() if key not in ("labels", "decoder_input_ids")
        }

        def measure(model: Any) -> Results:
            given = {key: tensor.to(model.device) for key, tensor in inputs.items()}
            length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **length, **options}
            generated = model.generate(**given, **how)
            logits = {f"{name} logits {step}": logits for step, logits in enumerate(generated.logits)}
            return {f"{name} tokens": generated.sequences, **logits}

        return pair.compare((name,), measure)

    return check


_CHECKS: list[Callable[[_Pair], list[Check]]] = [
    _plain,
    _padding("right"),
    _padding("left"),
    _packed,
    _four_dimensional,
    _generation("generation", None, use_cache=False),
    _generation("generation, dynamic cache", None),
    _generation("generation, static cache", None, cache_implementation="static", disable_compile=True),
    _generation("generation, left padding", "left"),
    lambda pair: pair.compare_in(torch.bfloat16),
    lambda pair: pair.compare_in(torch.float16),
]
