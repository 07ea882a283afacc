"""The address computations of a kernel that can overflow 32 bits, found in Triton's IR before any lowering.

The offset of an element is a sum of products of a position and a stride. Each of the two fits in 32 bits, but in a
tensor of more than 2^31 elements their product does not. Therefore no product of two values that are both unknown at
compilation may be computed in 32 bits on the way to a pointer. A product with a constant is allowed: it is the index
of a tile times the size of a tile, which is a position, bounded by a size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from triton._C.libtriton import ir
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from fastformer.kernel_reports.compilation import Work, instead_of_compiling
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import gpu_target, stand_in

_NAME = r"%[\w\-.]+(?:#\d+)?"
_DEFINITION = re.compile(rf"^\s*(?P<results>{_NAME}(?::\d+)?(?:,\s*{_NAME})*)\s*=\s*(?P<body>.*)$")


def narrow_products(text: str) -> list[str]:
    """Return the products of two unknown 32-bit integers that reach a pointer, by their names in the source."""
    operands: dict[str, set[str]] = {}
    bodies: dict[str, str] = {}
    roots: set[str] = set()
    for raw in text.splitlines():
        line = re.sub(r"\s*loc\(.*$", "", raw)
        for name, start in re.findall(rf"({_NAME})\s*=\s*({_NAME})(?=[,)])", line):  # the variables that a loop carries
            operands.setdefault(name, set()).add(start)
        match = _DEFINITION.match(line)
        if match is None:
            continue
        body = match["body"]
        used = set(re.findall(_NAME, body.split(" : ")[0]))
        for name in re.findall(_NAME, match["results"]):
            name = name.split(":")[0]
            operands.setdefault(name, set()).update(used)
            bodies[name] = body
        if "tt.addptr" in body:
            roots.add(re.findall(_NAME, body)[1])
    reached = _closure(roots, operands)
    return [
        " * ".join(_source_name(operand) for operand in re.findall(_NAME, bodies[name])[:2])
        for name in sorted(reached)
        if "arith.muli" in bodies.get(name, "")
        and re.search(r":\s*(tensor<[\dx]+x)?i32>?\s*$", bodies[name])
        and not any(_is_constant(operand, bodies, operands) for operand in operands[name])
    ]


def _source_name(operand: str) -> str:
    """Return the variable of the source that a value of the IR is named after."""
    return re.sub(r"(_\d+)?(#\d+)?$", "", operand.removeprefix("%")).split(".")[-1]


def _closure(roots: set[str], operands: dict[str, set[str]]) -> set[str]:
    reached, waiting = set(roots), list(roots)
    while waiting:
        for operand in operands.get(waiting.pop().split("#")[0], set()):
            if operand not in reached:
                reached.add(operand)
                waiting.append(operand)
    return reached


def _is_constant(name: str, bodies: dict[str, str], operands: dict[str, set[str]]) -> bool:
    body = bodies.get(name, "")
    if "arith.constant" in body:
        return True
    shaped = any(operation in body for operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"))
    return shaped and all(_is_constant(operand, bodies, operands) for operand in operands[name])


def intermediate_representations(work: list[Work], architecture: str) -> Iterator[tuple[str, str]]:
    """Yield name and IR of each kernel that `work` launches, with device functions inlined; nothing is compiled."""
    found: dict[str, tuple[str, str]] = {}

    def keep(function, key, signature, constants, options, attributes) -> None:
        if key not in found:
            source = ASTSource(function, signature, constants, attributes)
            found[key] = (function.fn.__qualname__, _inlined(source, architecture))

    with instead_of_compiling(keep), stand_in(architecture), kernels_of_meta_operators():
        for run in work:
            run()
    yield from found.values()


def _inlined(source: ASTSource, architecture: str) -> str:
    target = gpu_target(architecture)
    backend = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))
