"""BERT's input block, ``dropout(LayerNorm(word + position + token_type))``, recognised by its tables and results."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastformer.integrations.acceleration.probing import ERRORS, close, mark, marked, outcome, probing, same
from fastformer.integrations.acceleration.projections import dropout_probability, is_dropout
from fastformer.integrations.acceleration.swapping import OperatorRecipe, original_class
from fastformer.nn.embedding import is_plain_embedding
from fastformer.nn.plain import is_own
from fastformer.ops.checks import FLOATING_DTYPES
from fastformer.ops.embedding import transformer_embedding
from fastformer.ops.normalization import MAX_COLUMNS

_IDS = ("input_ids", "token_type_ids", "position_ids")
"""The names in transformers' models of the operator's arguments."""


@dataclass(frozen=True)
class Embeddings(OperatorRecipe):
    """The input block of an encoder.

    Attributes:
        word, position, token_type, norm, dropout: the children.
        skips_padding: default positions count the words that are not padding, from padding_idx + 1 (RoBERTa);
            otherwise they are indices.
        arguments: the forward's arguments and their defaults.
    """

    word: str
    position: str
    token_type: str | None
    norm: str
    dropout: str | None
    skips_padding: bool
    arguments: tuple[tuple[str, Any], ...]

    part = "embeddings"

    def describe(self) -> str:
        return "fastformer.transformer_embedding"

    def tensors(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        defaults = dict(self.arguments)
        given = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        others = [name for name in defaults if name not in _IDS]
        if given["input_ids"] is None or not all(_is_default(given[name], defaults[name]) for name in others):
            return None
        return tuple(given.get(name) for name in _IDS)

    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        tables = [getattr(module, name) for name in (self.word, self.position, self.token_type) if name is not None]
        norm = getattr(module, self.norm)
        if not all(map(is_plain_embedding, tables)) or original_class(norm) is not nn.LayerNorm or not is_own(norm):
            return False
        dtypes = {table.weight.dtype for table in (*tables, norm)}
        return is_dropout(module, self.dropout) and len(dtypes) == 1 and dtypes <= set(FLOATING_DTYPES)

    def run(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        norm = getattr(module, self.norm)
        return transformer_embedding(
            tensors[0],
            *self._tables(module),
            norm.weight,
            norm.bias,
            position_ids=self._positions(module, *tensors),
            token_type_ids=tensors[1],
            padding_idx=getattr(module, self.word).padding_idx,
            eps=norm.eps,
            dropout_p=dropout_probability(module, self.dropout),
        )

    def marked(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """Compute the same by PyTorch's functions, with dropout's mark where elements are dropped."""
        undropped = replace(self, dropout=None).run(module, *tensors)
        return undropped if self.dropout is None else mark(undropped)

    def _tables(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        token_type = None if self.token_type is None else _table(getattr(module, self.token_type))
        return getattr(module, self.word).weight, _table(getattr(module, self.position)), token_type

    def _positions(self, module: nn.Module, *tensors: Tensor) -> Tensor | None:
        input_ids, _, position_ids = tensors
        if position_ids is not None or not self.skips_padding:
            return position_ids
        padding = getattr(module, self.word).padding_idx
        words = (input_ids != padding).long()
        return words.cumsum(1) * words + padding


def _is_default(value: Any, default: int | None) -> bool:
    return value is None if default is None else isinstance(value, int) and value == default


def _table(embedding: Any) -> Tensor:
    """The weight of a table of positions or token types; its padding row, if any, gets no gradient."""
    weight, padding = embedding.weight, embedding.padding_idx
    if padding is None:
        return weight
    row = torch.full((1,), padding, device=weight.device)
    return weight.index_copy(0, row, weight.detach().narrow(0, padding, 1))


def recognise(module: nn.Module) -> Embeddings | str | None:
    """Return the recipe for `module`, the reason why an input block has none, or None for any other module."""
    children: dict[str, Any] = dict(module.named_children())
    tables = [name for name, child in children.items() if isinstance(child, nn.Embedding)]
    norms = [name for name, child in children.items() if original_class(child) is nn.LayerNorm]
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    if not 2 <= len(tables) <= 3 or not norms:
        return None
    if len(norms) != 1 or len(children) > len(tables) + 1 + len(dropouts) or len(dropouts) > 1:
        return "they are summed and normalised in a forward that does more"
    signature = inspect.signature(type(module).forward).parameters
    arguments = tuple(
        (name, None if name in _IDS else given.default) for name, given in signature.items() if name != "self"
    )
    if "input_ids" not in signature or not all(default in (None, 0) for _, default in arguments):
        return "its forward takes no input_ids, or needs more"
    if not all(is_plain_embedding(children[name]) for name in tables) or not is_own(children[norms[0]]):
        return "its tables are not plain embeddings"
    sizes = {children[name].embedding_dim for name in tables}
    if len(sizes) != 1 or max(sizes) > MAX_COLUMNS:
        return "its tables differ in size"
    if any(buffer.is_meta for buffer in module.buffers()):
        return "its buffers are on the meta device; load the model first"
    for recipe in _recipes(children, tables, norms[0], arguments):
        if _is_proven(module, recipe):
            return _with_dropout(module, recipe, dropouts)
    return "it does not normalise the sum of word, position and token type"


def _recipes(
    children: dict[str, Any], tables: list[str], norm: str, arguments: tuple[tuple[str, Any], ...]
) -> Iterator[Embeddings]:
    for word, position, *rest in itertools.permutations(tables):
        token_type = rest[0] if rest else None
        for skips_padding in (False, True) if children[word].padding_idx is not None else (False,):
            yield Embeddings(word, position, token_type, norm, None, skips_padding, arguments)


def _forward(recipe: Embeddings) -> Any:
    """Turn the module's own forward into a function of the three tensors."""

    def forward(module: nn.Module, *tensors: Any) -> Any:
        known = {name for name, _ in recipe.arguments}
        given = {name: tensor for name, tensor in zip(_IDS, tensors, strict=True) if name in known}
        return type(module).forward(module, **given)

    return forward


def _inputs(module: nn.Module, recipe: Embeddings) -> list[tuple[Any, ...]]:
    """Make words with padding before and after, with all optional inputs and with none of them."""
    known = {name for name, _ in recipe.arguments}
    tables = [getattr(module, name) for name in (recipe.word, recipe.position, recipe.token_type) if name is not None]
    generator = torch.Generator("cpu").manual_seed(2)
    ids = [torch.randint(table.num_embeddings, (2, 5), generator=generator) for table in tables]
    words, positions, *types = ids
    if tables[0].padding_idx is not None:
        words[0, :2] = words[1, 4:] = tables[0].padding_idx
    inputs: list[tuple[Any, ...]] = [(words, None, None)]
    if "position_ids" in known:
        inputs += [(words, None, positions), (words, None, positions[:1])]
    if "token_type_ids" in known and types:
        inputs += [(words, types[0], None)]
    return inputs


def _is_proven(module: nn.Module, recipe: Embeddings) -> bool:
    with probing(module):
        forward, inputs = _forward(recipe), _inputs(module, recipe)
        try:
            if not close(outcome(module, recipe.run, *inputs[0]), outcome(module, forward, *inputs[0])):
                return False
            return same(module, forward, recipe.run, inputs)
        except ERRORS:
            return False


def _with_dropout(module: nn.Module, recipe: Embeddings, dropouts: list[str]) -> Embeddings | str:
    input = _inputs(module, recipe)[0]
    with probing(module, training=True), marked(module):
        expected = outcome(module, _forward(recipe), *input)
        for dropout in (None, *dropouts):
            candidate = replace(recipe, dropout=dropout)
            if close(outcome(module, candidate.marked, *input), expected):
                return candidate
    return "it drops elements in training elsewhere than after the norm"
