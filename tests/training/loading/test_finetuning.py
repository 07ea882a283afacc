"""Fine-tuning batches leave out and repeat nothing, ranks share them, and an epoch continues where it was left."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastformer.training.loading.finetuning import FineTuningData, in_order

FEATURES = [[number] * (1 + number % 7) for number in range(50)]


def data(
    rank: int = 0, world_size: int = 1, done: tuple[int, int] = (0, 0), accumulate: int = 1, **options: Any
) -> FineTuningData:
    made = FineTuningData(SimpleNamespace(), FEATURES, FEATURES[:20], rows, len, targets, 16, **options)
    total, current = (SimpleNamespace(completed=count) for count in done)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total, current=current)))
    made.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        fit_loop=loop,
        accumulate_grad_batches=accumulate,
        num_training_batches=float("inf"),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return made


def rows(features: list[Any]) -> dict[str, Any]:
    """Return a batch of the given features."""
    return {"rows": features}


def targets(batch: dict[str, Any]) -> int:
    return len(batch["rows"])


def numbers(batches: Any) -> list[list[int]]:
    return [[row[0] for row in batch["rows"]] for batch in batches]


def in_turn(shares: list[list[Any]]) -> list[Any]:
    """Return the batches of all ranks in turn: the first of each rank, then the second of each rank, and so on."""
    return [batch for of_all in zip(*shares, strict=True) for batch in of_all]


def test_an_epoch_has_every_feature_once_in_full_batches() -> None:
    batches = numbers(data().train_dataloader())
    assert len(batches) == len(data().train_dataloader())
    assert sorted(chain.from_iterable(batches)) == list(range(50))
    assert max(sum(len(FEATURES[number]) for number in batch) for batch in batches) <= 16
    assert batches != numbers(data(seed=1).train_dataloader())


def test_epochs_run_on_so_that_nothing_is_left_out() -> None:
    size = len(data().train_dataloader())
    seen = [batch for epoch in range(10) for batch in numbers(data(done=(epoch * size, 0)).train_dataloader())]
    assert len(seen) == 10 * size
    counts = Counter(chain.from_iterable(seen))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("of_this_epoch", [1, 5])
def test_an_epoch_goes_on_where_it_was_left(of_this_epoch: int) -> None:
    size = len(data().train_dataloader())
    whole = numbers(data(done=(size, 0)).train_dataloader())
    assert numbers(data(done=(size + of_this_epoch, of_this_epoch)).train_dataloader()) == whole[of_this_epoch:]


def test_ranks_share_the_batches_in_turn() -> None:
    shares = [numbers(data(rank, 3).val_dataloader()) for rank in range(3)]
    assert list(chain.from_iterable(in_turn(shares))) == list(range(20))


def test_any_number_of_ranks_trains_on_the_same_batches() -> None:
    one = numbers(data().train_dataloader())
    three = in_turn([numbers(data(rank, 3).train_dataloader()) for rank in range(3)])
    assert len(three) == -(-len(one) // 3) * 3
    assert three[: len(one)] == one


def test_another_number_of_ranks_goes_on_with_the_same_batches() -> None:
    one = numbers(data().train_dataloader())
    before = data(done=(5, 5))
    assert numbers(before.train_dataloader()) == one[5:]
    shares = []
    for rank in range(2):
        after = data(rank, 2, done=(5, 0))
        after.load_state_dict(before.state_dict())
        shares.append(numbers(after.train_dataloader()))
    assert in_turn(shares)[: len(one) - 5] == one[5:]


@pytest.mark.parametrize(("rank", "world_size", "accumulate"), [(0, 1, 6), (1, 2, 3), (2, 3, 2)])
def test_an_epoch_is_of_whole_steps_whatever_they_are_made_of(rank: int, world_size: int, accumulate: int) -> None:
    """A step always has the same six batches, for any number of ranks and of accumulated batches."""
    size = len(data().train_dataloader())
    assert size % 6
    following = numbers(data(done=(size, 0)).train_dataloader())
    expected = (numbers(data().train_dataloader()) + following)[: -(-size // 6) * 6]
    loader = data(rank, world_size, accumulate=accumulate).train_dataloader()
    assert numbers(loader) == expected[rank::world_size]
    assert len(loader) == len(expected) // world_size


def test_batches_are_told_the_targets_of_their_step() -> None:
    batches = list(data(accumulate=2).train_dataloader())
    own = [len(batch["rows"]) for batch in batches]
    of_step = [sum(own[number // 2 * 2 :][:2]) for number in range(len(own))]
    assert [batch["label_counts"].tolist() for batch in batches] == [
        [[count], [counts]] for count, counts in zip(own, of_step, strict=True)
    ]


def test_validation_and_prediction_keep_the_order() -> None:
    assert list(chain.from_iterable(numbers(data().val_dataloader()))) == list(range(20))
    assert [row for batch in in_order(FEATURES, rows, len, 16) for row in batch["rows"]] == FEATURES


def test_too_long_features_and_empty_data_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_batch=5 is less than the longest sequence, 7"):
        list(in_order(FEATURES, rows, len, 5))
    with pytest.raises(ValueError, match="training and validation examples; got 50 and 0"):
        FineTuningData(SimpleNamespace(), FEATURES, [], rows, len, targets)


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_lie_in_pinned_memory_if_they_go_to_a_gpu(device: str, pinned: bool) -> None:
    """Batches lie in pinned memory only if they go to a GPU.

    Pinning makes a CUDA context, even in a run on the CPU of a machine with a GPU.
    """
    made = data()
    made.trainer.strategy.root_device = torch.device(device)
    assert made.load(FEATURES, [[0]], rows).pin_memory is pinned
