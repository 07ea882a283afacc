"""Tests of checkpoints for another number of devices, of who starts processes, and of what sharding refuses."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastformer.models import FastformerConfig, FastformerModel
from fastformer.training import run
from fastformer.training.elastic import convert_progress, number_by_module
from fastformer.training.sharding import shard
from fastformer.training.tensor_parallel import parallelize


def checkpoint(world_size: int, total: int, current: int) -> dict:
    """Return a checkpoint that Lightning writes after a step, when the last batch is not completed yet."""
    counts = {
        period: {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
        for period, ready in (("total", total), ("current", current))
    }
    return {
        "world_size": world_size,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": counts}},
        "PretrainingDataModule": {"ranks": [[0, world_size]]},
    }


def test_progress_is_that_of_as_many_batches_together() -> None:
    converted = checkpoint(world_size=2, total=18, current=6)
    convert_progress(converted, "PretrainingDataModule", 4)
    expected = checkpoint(world_size=4, total=9, current=3)
    assert converted["loops"] == expected["loops"]
    assert converted["PretrainingDataModule"] == expected["PretrainingDataModule"]


@pytest.mark.parametrize("world_size", [1, 4])
def test_progress_that_cannot_be_shared_or_need_not_be_stays(world_size: int) -> None:
    before = checkpoint(world_size=1, total=9, current=3)
    after = copy.deepcopy(before)
    convert_progress(after, "PretrainingDataModule", world_size)
    assert after == before


def test_an_optimizer_numbered_by_its_module_reads_its_state_again() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))

    def optimizer() -> torch.optim.Optimizer:
        vectors, matrices = ([p for p in module.parameters() if p.ndim == ndim] for ndim in (1, 2))
        return torch.optim.Adam([{"params": matrices}, {"params": vectors, "lr": 0.5}])

    first, second = optimizer(), optimizer()
    module(torch.ones(4, 2)).sum().backward()
    first.step()
    state = first.state_dict()
    number_by_module(state, first, module)
    for number, parameter in enumerate(module.parameters()):
        assert torch.equal(state["state"][number]["exp_avg"], first.state[parameter]["exp_avg"])
    second.load_state_dict(state)
    for parameter in module.parameters():
        assert torch.equal(second.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 3, "hidden_size": 12}, "--tensor_parallel 2 must divide num_attention_heads=3"),
        ({"num_key_value_heads": 1}, "must divide num_key_value_heads=1"),
        ({"intermediate_size": 5}, "must divide intermediate_size=5"),
        ({"activation_dropout": 0.1}, "cannot be combined with activation_dropout=0.1"),
        ({"qk_norm": True}, "cannot be combined with qk_norm=True"),
    ],
)
def test_what_tensor_parallel_devices_cannot_share_is_refused(options: dict[str, Any], message: str) -> None:
    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 4,
    }
    model = FastformerModel(FastformerConfig(**{**shape, **options}))
    with pytest.raises(ValueError, match=re.escape(message)):
        parallelize(model, SimpleNamespace(size=lambda: 2))


def test_what_has_no_blocks_of_its_own_weights_is_not_sharded() -> None:
    mesh = SimpleNamespace()
    with pytest.raises(ValueError, match=r"shards the blocks in an nn\.ModuleList; Linear has none"):
        shard(nn.Linear(1, 1), mesh)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.layers[1].weight = model.layers[0].weight
    with pytest.raises(ValueError, match=r"share weights with others: layers\.1\.weight; use --strategy ddp"):
        shard(model, mesh)


def test_torchrun_within_a_job_of_slurm_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run._cluster_environment() == []
    for name, value in {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    (slurm,) = run._cluster_environment()
    assert type(slurm).__name__ == "SLURMEnvironment"
    assert not slurm.auto_requeue
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    (torchrun,) = run._cluster_environment()
    assert type(torchrun).__name__ == "TorchElasticEnvironment"
