"""Feed-forward networks, classic and gated: two or three projections and an activation, with any names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer.integrations.acceleration.probing import ERRORS, close, mark, marked, outcome, probing, same
from fastformer.integrations.acceleration.projections import (
    dropout_probability,
    is_dropout,
    is_projection,
    projection_class,
    takes,
    weight_and_bias,
)
from fastformer.integrations.acceleration.swapping import OperatorRecipe
from fastformer.nn.feed_forward import ACTIVATIONS
from fastformer.ops.feed_forward import feed_forward


@dataclass(frozen=True)
class FeedForward(OperatorRecipe):
    """A feed-forward: ``down(activation(up(x)))``, or gated ``down(activation(gate(x)) * up(x))``.

    Attributes:
        kind: the projections' class.
        up, down, gate: the names of the children that are the projections. A `gate` that equals `up` is one projection
            to both halves: the gate's half is first, unless `gate_last`.
        activation: as in `fastformer.feed_forward`.
        hidden_dropout, dropout: the names of the children that drop elements between the projections and after them.
    """

    kind: type[nn.Module]
    up: str
    down: str
    gate: str | None = None
    gate_last: bool = False
    activation: str = "gelu"
    hidden_dropout: str | None = None
    dropout: str | None = None

    part = "feed-forward"

    def describe(self) -> str:
        return f"fastformer.feed_forward ({self.activation}{'' if self.gate is None else ', gated'})"

    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        projections = [getattr(module, name) for name in (self.up, self.down, self.gate) if name is not None]
        if not all(is_projection(projection, self.kind) for projection in projections):
            return False
        dropouts = is_dropout(module, self.hidden_dropout) and is_dropout(module, self.dropout)
        return dropouts and takes(tensors[0], *projections)

    def run(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        (up, up_bias), (gate, gate_bias), (down, down_bias) = self._parameters(module)
        return feed_forward(
            tensors[0],
            up,
            down,
            up_bias,
            down_bias,
            gate,
            gate_bias,
            self.activation,
            hidden_dropout_p=dropout_probability(module, self.hidden_dropout),
            output_dropout_p=dropout_probability(module, self.dropout),
        )

    def marked(self, module: nn.Module, input: Tensor) -> Tensor:
        """Compute the same by PyTorch's functions, with a dropout's mark where elements are dropped."""
        (up, up_bias), (gate, gate_bias), (down, down_bias) = self._parameters(module)
        activate = ACTIVATIONS[self.activation]
        hidden = F.linear(input, up, up_bias)
        hidden = activate(hidden) if gate is None else activate(F.linear(input, gate, gate_bias)) * hidden
        hidden = hidden if self.hidden_dropout is None else mark(hidden)
        output = F.linear(hidden, down, down_bias)
        return output if self.dropout is None else mark(output)

    def _parameters(self, module: nn.Module) -> tuple[Any, Any, Any]:
        """Weight and bias of up, of the gate (None and None without a gate) and of down."""
        up, down = (weight_and_bias(getattr(module, name)) for name in (self.up, self.down))
        if self.gate is None:
            return up, (None, None), down
        if self.gate != self.up:
            return up, weight_and_bias(getattr(module, self.gate)), down
        weights, biases = (((None, None) if tensor is None else tensor.chunk(2)) for tensor in up)
        first, second = zip(weights, biases, strict=True)
        return (first, second, down) if self.gate_last else (second, first, down)


def recognise(module: nn.Module) -> FeedForward | str | None:
    """Return the recipe for `module`, the reason why a feed-forward network has none, or None for any other module."""
    children = dict(module.named_children())
    projections = {name: child for name, child in children.items() if any(True for _ in child.parameters())}
    if _is_inside_more(module):
        return "its projections are applied in a forward that does more"
    if len(projections) not in (2, 3) or any(True for _ in module.parameters(recurse=False)):
        return None
    kind = projection_class(*projections.values())
    if kind is None:
        return None
    shapes = {name: tuple(weight_and_bias(child)[0].shape) for name, child in projections.items()}
    with probing(module):
        found = _find(module, list(_roles(kind, shapes)), shapes)
    if not isinstance(found, FeedForward):
        return found
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    return _with_dropouts(module, found, dropouts, shapes)


def _is_inside_more(module: nn.Module) -> bool:
    """Whether `module` has two projections, to a size and back, together with other layers that have parameters."""
    others = [child for child in module.children() if projection_class(child) is None]
    shapes = [weight_and_bias(child)[0].shape for child in module.children() if child not in others]
    there_and_back = len(shapes) == 2 and shapes[0] == shapes[1][::-1] and shapes[0] != shapes[1]
    return there_and_back and any(True for child in others for _ in child.parameters())


def _roles(kind: type[nn.Module], shapes: dict[str, tuple[int, ...]]) -> Iterator[FeedForward]:
    """Yield every assignment of roles to the projections that their shapes (out_features, in_features) allow."""
    for up, down in itertools.permutations(shapes, 2):
        intermediate, read = shapes[up][0], shapes[down][1]
        gates = [name for name in shapes if name not in (up, down)]
        if gates and shapes[gates[0]] == shapes[up] and read == intermediate:
            yield FeedForward(kind, up, down, gates[0])
        elif not gates and read == intermediate:
            yield FeedForward(kind, up, down)
        elif not gates and 2 * read == intermediate:
            yield FeedForward(kind, up, down, up)
            yield FeedForward(kind, up, down, up, gate_last=True)


def _input(size: int) -> Tensor:
    return torch.randn(2, 3, size, generator=torch.Generator("cpu").manual_seed(2))


def _find(module: nn.Module, roles: list[FeedForward], shapes: dict[str, tuple[int, ...]]) -> FeedForward | str | None:
    forward = type(module).forward
    reason = None
    for role in roles:
        input = _input(shapes[role.up][1])
        try:
            expected = outcome(module, forward, input)
        except ERRORS:
            continue
        if not isinstance(expected, Tensor) or expected.shape != (2, 3, shapes[role.down][0]):
            continue
        for activation in ACTIVATIONS:
            recipe = replace(role, activation=activation)
            # Large inputs are tried too, since an activation may be bounded.
            inputs = [(input,), (3.0 * input[:1, :2],), (30.0 * input[1:],)]
            if close(outcome(module, recipe.run, input), expected) and same(module, forward, recipe.run, inputs):
                return recipe
        reason = f"it computes no feed-forward with {', '.join(ACTIVATIONS)}"
    return reason


def _with_dropouts(
    module: nn.Module, recipe: FeedForward, dropouts: list[str], shapes: dict[str, tuple[int, ...]]
) -> FeedForward | str:
    """Add to the recipe each dropout at its place in training."""
    input = _input(shapes[recipe.up][1])
    places: list[tuple[str | None, str | None]] = [(None, None)]
    places += [place for name in dropouts for place in ((name, None), (None, name))]
    places += list(itertools.permutations(dropouts, 2)) + [(name, name) for name in dropouts]
    with probing(module, training=True), marked(module):
        expected = outcome(module, type(module).forward, input)
        for hidden_dropout, dropout in places:
            candidate = replace(recipe, hidden_dropout=hidden_dropout, dropout=dropout)
            if close(outcome(module, candidate.marked, input), expected):
                return candidate
    return "it drops elements in training elsewhere than between and after the projections"
