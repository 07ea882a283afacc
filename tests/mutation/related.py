"""The tests that should notice a fault in a file, first those that find most."""

from __future__ import annotations

# Rules that hold for every operator.
RULES = ["ops/test_nan.py", "ops/test_derivatives.py", "ops/test_bounds.py", "ops/test_autocast.py"]

# The first entry that a path begins with counts. `{stem}` is replaced by the stem of the path, and tests that do not
# exist are left out: thus the tests with the name of a file come first.
RELATED: list[tuple[str, list[str]]] = [
    (
        "kernels/fastformer_kernels/attention/cache.py",
        ["ops/attention/test_cache.py", "fuzz/test_every_operator.py::test_any_call[append_to_cache]", "generation"],
    ),
    (
        "kernels/fastformer_kernels/attention/decode",
        [
            "ops/attention/test_decode.py",
            "fuzz/test_every_operator.py::test_any_call[decode_attention]",
            "generation/test_generator.py",
        ],
    ),
    (
        "kernels/fastformer_kernels/attention/merge.py",
        ["ops/attention/test_merge.py", "fuzz/test_every_operator.py::test_any_call[merge_attention]"],
    ),
    (
        "kernels/fastformer_kernels/attention/weights.py",
        ["ops/attention/test_weights.py", "fuzz/test_every_operator.py::test_any_call[attention_weights]"],
    ),
    (
        "kernels/fastformer_kernels/attention",
        [
            "ops/attention/test_attention.py",
            "ops/attention/test_block_mask.py",
            "ops/attention/test_packed_mask.py",
            "ops/attention/test_score_mod.py",
            "ops/test_launch.py",
            "ops/test_kept_launches.py",
            "metamorphic",
            "kernel_reports/tuning",
        ],
    ),
    (
        "kernels/fastformer_kernels/feed_forward",
        [
            "ops/test_feed_forward.py",
            "fuzz/test_every_operator.py::test_any_call[feed_forward]",
            "kernel_reports/tuning",
        ],
    ),
    (
        "kernels/fastformer_kernels/normalization.py",
        [
            "ops/test_normalization.py",
            "fuzz/test_every_operator.py::test_any_call[layer_norm]",
            "fuzz/test_every_operator.py::test_any_call[rms_norm]",
            "nn/test_normalization.py",
        ],
    ),
    ("kernels/fastformer_kernels/norms_of_odd_rows.py", ["ops/test_normalization.py"]),
    (
        "kernels/fastformer_kernels/embedding.py",
        ["ops/test_embedding.py", "fuzz/test_every_operator.py::test_any_call[transformer_embedding]"],
    ),
    (
        "kernels/fastformer_kernels/cross_entropy.py",
        ["ops/test_cross_entropy.py", "ops/test_linear_cross_entropy.py", "fuzz"],
    ),
    (
        "kernels/fastformer_kernels/dropout.py",
        ["ops/test_dropout.py", "ops/test_embedding.py", "ops/test_feed_forward.py", "ops/attention/test_attention.py"],
    ),
    ("kernels/fastformer_kernels/matmul.py", ["ops/test_linear_cross_entropy.py", "ops/test_feed_forward.py"]),
    (
        "kernels/fastformer_kernels/kept_launches.py",
        ["ops/test_kept_launches.py", "ops/test_launch.py", "fuzz", "ops/test_embedding.py"],
    ),
    (
        "kernels/fastformer_kernels",
        [
            "ops/test_{stem}.py",
            "ops/test_launch.py",
            "ops/test_kept_launches.py",
            "ops/test_feed_forward.py",
            "fuzz",
            "kernel_reports/tuning",
        ],
    ),
    (
        "fastformer/ops/attention/decode.py",
        ["ops/attention/test_decode.py", "ops/test_operator.py", *RULES, "fuzz", "generation"],
    ),
    (
        "fastformer/ops/attention/cache.py",
        ["ops/attention/test_cache.py", "ops/test_operator.py", *RULES, "fuzz", "generation"],
    ),
    (
        "fastformer/ops/attention/relative_position.py",
        [
            "ops/attention/test_relative_position.py",
            "nn",
            "models/test_architectures.py",
            "models/conversion/test_models.py",
        ],
    ),
    (
        "fastformer/ops/attention/merge.py",
        ["ops/attention/test_merge.py", "ops/test_operator.py", *RULES, "fuzz", "generation"],
    ),
    (
        "fastformer/ops/attention",
        ["ops/attention/test_attention.py", "ops/attention/test_weights.py", *RULES, "nn", "metamorphic"],
    ),
    (
        "fastformer/ops",
        ["ops/test_{stem}.py", "ops/test_operator.py", *RULES, "fuzz", "ops/test_kept_launches.py", "nn"],
    ),
    (
        "fastformer/data/pretraining",
        ["data/pretraining/test_{stem}.py", "data/pretraining", "training/loading/test_pretraining.py"],
    ),
    ("fastformer/data/labelled", ["data/labelled/test_{stem}.py", "data/labelled", "training/test_finetune_data.py"]),
    ("fastformer/data", ["data/test_{stem}.py", "data", "training/loading"]),
    (
        "fastformer/training/loading",
        ["training/loading/test_{stem}.py", "training/loading", "training/test_elastic.py"],
    ),
    ("fastformer/training/predict", ["training/test_finetune_command.py", "training/test_finetuning.py"]),
    ("fastformer/training/adversarial.py", ["training/test_adversarial.py"]),
    ("fastformer/training/privacy.py", ["training/test_privacy.py"]),
    ("fastformer/training/cuda_graphs.py", ["training/test_cuda_graphs.py"]),
    ("fastformer/training/lora.py", ["training/test_lora.py"]),
    ("fastformer/training/tensor_parallel.py", ["training/test_scale.py"]),
    ("fastformer/training/sharding.py", ["training/test_scale.py", "training/test_lora.py"]),
    (
        "fastformer/training/finetun",
        [
            "training/test_finetuning.py",
            "training/test_finetune_data.py",
            "training/test_finetune_command.py",
            "training/test_scale.py",
        ],
    ),
    (
        "fastformer/training/tasks.py",
        [
            "training/test_finetuning.py",
            "training/test_finetune_data.py",
            "training/test_finetune_command.py",
            "training/test_scale.py",
        ],
    ),
    (
        "fastformer/training/pretrain",
        ["training/test_pretraining.py", "training/test_pretraining_command.py", "training/test_scale.py"],
    ),
    (
        "fastformer/training",
        [
            "training/test_{stem}.py",
            "training/test_callbacks.py",
            "training/test_progress.py",
            "training/test_early_stopping.py",
            "training/test_pretraining_command.py",
            "training/test_finetune_command.py",
        ],
    ),
]


def related_tests(path: str, existing: set[str]) -> list[str]:
    """Return the test files and folders for a source file, relative to tests/, in the order in which they run.

    Args:
        path: the source file.
        existing: the files and folders in tests/.
    """
    named = next(tests for beginning, tests in RELATED if path.startswith(beginning))
    stem = path.rsplit("/", 1)[-1].removesuffix(".py")
    wanted = [test.format(stem=stem) for test in named]
    return [f"tests/{test}" for test in dict.fromkeys(wanted) if test.split("::")[0] in existing]
