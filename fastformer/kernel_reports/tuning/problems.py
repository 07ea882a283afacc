"""The calls whose launch configurations are tuned, the most valuable first."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch

from fastformer.kernel_reports.tuning.attention_plan_problems import attention_plan_problems
from fastformer.kernel_reports.tuning.attention_problems import (
    attention_problems,
    decode_problems,
    wide_attention_problems,
)
from fastformer.kernel_reports.tuning.feed_forward_problems import feed_forward_problems
from fastformer.kernel_reports.tuning.problem import FULL, Group, Problem, Sizes
from fastformer.kernel_reports.tuning.row_problems import cross_entropy_problems, norm_problems, softmax_problems


def problems(dtypes: Iterable[torch.dtype], groups: Iterable[Group], sizes: Sizes = FULL) -> list[Problem]:
    """One call for each class of shapes of these groups of operations."""
    wanted = set(groups)
    both = ("attention_forward", "attention_backward")
    deterministic = ("attention_deterministic", "attention_query_gradient")
    return [
        problem
        for dtype in dtypes
        for problem in chain(
            attention_problems(dtype, sizes, sizes.lengths[:1], both),
            attention_plan_problems(dtype, sizes, sizes.lengths[:1]),
            norm_problems(dtype, sizes, "norm_backward"),
            cross_entropy_problems(dtype, sizes),
            decode_problems(dtype, sizes),
            feed_forward_problems(dtype, sizes),
            wide_attention_problems(dtype, sizes),
            attention_problems(dtype, sizes, sizes.lengths[1:], both),
            attention_plan_problems(dtype, sizes, sizes.lengths[1:]),
            norm_problems(dtype, sizes, "norm_forward"),
            softmax_problems(dtype, sizes),
            attention_problems(dtype, sizes, sizes.lengths, deterministic),
            attention_problems(dtype, sizes, sizes.lengths, (*both, *deterministic), ("block mask", "score_mod")),
        )
        if problem.group in wanted
    ]
