"""Pretrain a small GPT from Python, on packed batches: documents stand one after the other, and no token is padding.

`fastformer pretrain --objective clm` does this from the command line, with checkpoints and a report. Here the data
module trains a tokenizer on a text and makes the batches, and a Lightning Trainer runs them. The text follows a simple
pattern, so the held-out loss falls far below its start in a few steps.

    pip install -e ".[train]" && python examples/packed_pretraining.py
"""

import random
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.optimization import Optimization
from fastformer.training.pretraining import CausalLanguageModeling

SUBJECTS, VERBS = ["the cat", "a small dog", "my neighbour", "the old captain"], ["sees", "likes", "follows", "paints"]


def write_text(path: Path, documents: int = 300) -> None:
    """Write documents of 1 to 6 sentences, with a blank line between them."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(documents):
            for _ in range(draw.randint(1, 6)):
                file.write(f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(SUBJECTS)}.\n")
            file.write("\n")


def main() -> tuple[float, float, list[int]]:
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder, "text.txt"))
        sizes = {"vocab_size": 300, "max_length": 64, "tokens_per_batch": 512}
        data = PretrainingDataModule([f"{folder}/text.txt"], "clm", cache_dir=f"{folder}/cache", **sizes)
        module = CausalLanguageModeling(overrides={"num_hidden_layers": 1}, optimization=Optimization(1e-2))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", max_steps=40, num_sanity_val_steps=0, **quiet)
        before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        trainer.fit(module, data)
        after = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        boundaries = next(iter(data.train_dataloader()))["cu_seqlens"].tolist()
    print(f"held-out loss: {before:.2f} nats before, {after:.2f} after {trainer.global_step} steps")
    print(f"a batch: {len(boundaries) - 1} sequences, {boundaries[-1]} tokens, no padding; they begin at {boundaries}")
    return before, after, boundaries


if __name__ == "__main__":
    main()
