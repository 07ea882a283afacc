"""Train a model of your own, built from fastformer.nn, in a LightningModule.

`from fastformer import nn` in place of `from torch import nn` is the whole change. Each module has the constructor and
the parameter names of PyTorch's, so the weights load into the same model built from torch.nn, with the same outputs.
The model learns whether a sequence contains the token 7.

    pip install -e ".[train]" && python examples/lightning_module.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from fastformer import nn

WIDTH, VOCABULARY, LENGTH, PADDING, WANTED = 32, 40, 16, 0, 7


class Classifier(LightningModule):
    def __init__(self, nn=nn) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features = self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == PADDING)
        return self.head(features.masked_fill((tokens == PADDING)[..., None], -torch.inf).amax(dim=1)).squeeze(1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def sequences(number: int) -> TensorDataset:
    tokens = torch.randint(WANTED + 1, VOCABULARY, (number, LENGTH))
    tokens[::2, 2] = WANTED
    tokens[torch.arange(LENGTH) >= torch.randint(4, LENGTH + 1, (number, 1))] = PADDING
    return TensorDataset(tokens, (tokens == WANTED).any(dim=1).float())


def main() -> tuple[float, float]:
    seed_everything(0, verbose=False)
    model, (tokens, labels) = Classifier(), sequences(256).tensors
    loader = DataLoader(sequences(1024), batch_size=32, shuffle=True)
    Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False).fit(model, loader)
    twin = Classifier(torch.nn)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = model.eval()(tokens), twin.eval()(tokens)
    accuracy, difference = ((ours > 0) == labels.bool()).float().mean(), (ours - theirs).abs().max()
    print(f"accuracy on new sequences {accuracy:.1%}; largest difference from torch.nn {difference:.1e}")
    return accuracy.item(), difference.item()


if __name__ == "__main__":
    main()
