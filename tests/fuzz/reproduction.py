"""A failing call as a Python program that anyone can run, with all values and strides of its tensors."""

from __future__ import annotations

from typing import Any

import torch

from fastformer import BlockMask, ScoreMod


def program(
    function: str,
    tensors: dict[str, torch.Tensor],
    options: dict[str, Any],
    differentiable: list[str],
    written: list[str],
) -> str:
    """Return a program that calls ``fastformer.<function>(**tensors, **options)`` on both backends and compares.

    It compares outputs, the tensors named in `written`, which the call writes to, and the gradients of those named in
    `differentiable`. It ends with an error where they differ by more than 1% of the largest, or only one has NaN.
    """
    lines = [
        "import copy, os",
        'os.environ["TRITON_INTERPRET"] = "1"  # delete this line on a GPU, and move the tensors there',
        "import torch, fastformer",
        "from torch import tensor",
        "from fastformer.registry.score_mod import DECAY",
        "",
        *(f"{name} = {_expression(value)}" for name, value in tensors.items()),
        f"options = {_options(options)}",
        f"tensors = dict({', '.join(f'{name}={name}' for name in tensors)})",
        "",
        "def run(backend):",
        f"    leaves = {{n: copy.deepcopy(t).requires_grad_(n in {differentiable}) for n, t in tensors.items()}}",
        "    torch.manual_seed(0)",
        "    with fastformer.backend(backend):",
        f"        output = fastformer.{function}(**leaves, **options)",
        "        outputs = [o for o in (output if isinstance(output, tuple) else (output,)) if o is not None]",
        f"        outputs += [leaves[name] for name in {written}]",
        "        sources = [leaf for leaf in leaves.values() if leaf.requires_grad]",
        "        loss = sum(o.float().nan_to_num(0.0, 0.0, 0.0).square().sum() for o in outputs)",
        "        grads = torch.autograd.grad(loss, sources, allow_unused=True) if loss.requires_grad else []",
        "    return [*outputs, *(g for g in grads if g is not None)]",
        "",
        'for kernel, pytorch in zip(run("triton"), run("torch"), strict=True):',
        "    print(kernel, pytorch, sep='\\n')",
        "    scale = max([1.0, *pytorch[pytorch.isfinite()].abs().flatten().tolist()])",
        "    torch.testing.assert_close(kernel, pytorch, atol=0.01 * scale, rtol=0.0, equal_nan=True)",
    ]
    return "\n".join(lines)


def _expression(value: torch.Tensor) -> str:
    """Return an expression for the tensor, with its strides and only the part of its storage that it uses."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    reached = value.as_strided((last + 1 if value.numel() else 0,), (1,)).tolist()
    elements = ", ".join(_number(element) for element in reached)
    return f"tensor([{elements}], dtype={value.dtype}).as_strided({tuple(value.shape)}, {value.stride()})"


def _number(element: float | int | bool) -> str:
    return f"float('{element}')" if element != element or element in (float("inf"), float("-inf")) else repr(element)


def _options(options: dict[str, Any]) -> str:
    return "dict(" + ", ".join(f"{name}={_option(value)}" for name, value in options.items()) + ")"


def _option(value: Any) -> str:
    if isinstance(value, BlockMask):
        return f"fastformer.BlockMask.from_mask({_expression(value.to_dense())})"
    return "DECAY" if isinstance(value, ScoreMod) else repr(value)
