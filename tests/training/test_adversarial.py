"""Adversarial training moves embeddings as the papers' formulas say."""

import pytest
import torch
from torch import nn

from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForSequenceClassification
from fastformer.training.adversarial import Adversary

SHAPE = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
CU_SEQLENS = torch.tensor([0, 3, 5], dtype=torch.int32)


class Quadratic(nn.Module):
    """A model with the loss L = Σᵢ aᵢ ‖xᵢ‖² / 2 over the sequences i, so that ∇L = aᵢ xᵢ."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.factors = torch.tensor([1.0, 3.0])

    def squares(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).square().sum(-1) / 2

    def dense(self) -> torch.Tensor:
        return (self.factors[:, None] * self.squares(torch.arange(6).view(2, 3))).sum()

    def packed(self) -> torch.Tensor:
        return (self.factors.repeat_interleave(CU_SEQLENS.diff()) * self.squares(torch.arange(5))).sum()


def losses_by_hand(model: Quadratic, adversary: Adversary, parts: list[torch.Tensor]) -> tuple[float, float]:
    """Return the losses without and with the adversary, computed by hand.

    The gradient aᵢ xᵢ moves each sequence along itself: ‖x‖ grows by the length of the move.
    """
    step = adversary.epsilon if adversary.method == "fgm" else adversary.steps * adversary.step_size
    norms = torch.stack([part.norm() for part in parts])
    moved = norms + min(step, adversary.epsilon)
    return (model.factors * norms**2 / 2).sum().item(), (model.factors * moved**2 / 2).sum().item()


@pytest.mark.parametrize(
    "adversary",
    [
        Adversary(epsilon=0.5),
        Adversary("pgd", epsilon=1.0, step_size=0.2, steps=3),
        Adversary("pgd", epsilon=0.3, step_size=0.2, steps=3),
    ],
)
def test_a_quadratic_loss_moves_by_the_formula(adversary: Adversary) -> None:
    torch.manual_seed(0)
    model = Quadratic()
    table = model.table.weight.detach()
    dense = adversary.losses(model.table, model.dense, [])
    assert (dense.clean.item(), dense.adversarial.item()) == pytest.approx(
        losses_by_hand(model, adversary, [table[:3], table[3:]]), rel=1e-5
    )
    packed = adversary.losses(model.table, model.packed, [CU_SEQLENS])
    assert (packed.clean.item(), packed.adversarial.item()) == pytest.approx(
        losses_by_hand(model, adversary, [table[:3], table[3:5]]), rel=1e-5
    )
    assert not model.table._forward_hooks


def packed_batch() -> dict:
    return {"input_ids": torch.tensor([3, 4, 5, 6, 7]), "cu_seqlens": CU_SEQLENS, "max_seqlen": 3}


@pytest.mark.parametrize("frozen", [False, True])
def test_fgm_of_a_model_is_fgm_by_hand(frozen: bool) -> None:
    torch.manual_seed(0)
    model = FastformerForSequenceClassification(FastformerConfig(**SHAPE, initializer_range=0.3)).eval()
    table = model.get_input_embeddings()
    table.weight.requires_grad_(not frozen)
    batch, labels = packed_batch(), torch.tensor([0, 1])
    found = Adversary(epsilon=0.7).losses(table, lambda: model(**batch, labels=labels).loss, [CU_SEQLENS])

    words = table(batch["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    (gradient,) = torch.autograd.grad(model(inputs_embeds=words, **rest, labels=labels).loss, words)
    move = torch.cat([0.7 * part / part.norm() for part in gradient.split([3, 2])])
    expected = model(inputs_embeds=words.detach() + move, **rest, labels=labels).loss
    torch.testing.assert_close(found.adversarial, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.clean, model(**batch, labels=labels).loss, rtol=1e-5, atol=1e-6)
    assert found.adversarial > found.clean


def test_the_sum_of_both_losses_has_the_gradient_of_both() -> None:
    """The sum of both losses has the gradient of both.

    The backward goes through the clean pass twice, so the first time must not use up or change what the pass keeps.
    """
    torch.manual_seed(0)
    decoder = {"stack": "decoder", "norm_placement": "pre", "embedding_norm": False, "type_vocab_size": 0}
    model = FastformerForCausalLM(FastformerConfig(**SHAPE, **decoder, initializer_range=0.3)).eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = packed_batch()

    def loss() -> torch.Tensor:
        return model(**batch, labels=batch["input_ids"]).loss

    (expected,) = torch.autograd.grad(loss(), [model.lm_head.weight])
    found = Adversary(epsilon=1e-6).losses(model.get_input_embeddings(), loss, [CU_SEQLENS])
    (both,) = torch.autograd.grad(found.clean + found.adversarial, [model.lm_head.weight])
    torch.testing.assert_close(both, 2 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fgsm"}, "method must be fgm or pgd; got 'fgsm'"),
        ({"epsilon": 0.0}, "epsilon must be above 0; got 0.0"),
        ({"steps": 0}, "steps must be 1 or more; got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adversary(**arguments)
