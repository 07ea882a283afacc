"""Learn sentence embeddings: a sentence and its translation come close together, all other sentences stay away.

The loss is InfoNCE: of all translations in a batch, each sentence's own must be the most similar. Half of the pairs are
trained on. Then the other half, whose words are known but not in this combination, find each other. Sentences are
packed, so different lengths need no padding. `fastformer finetune embed` does this with your own pairs.

    pip install -e . && python examples/sentence_embeddings.py
"""

import torch

from fastformer.models import FastformerConfig, FastformerForEmbedding

PLACES = {"garden": "Garten", "kitchen": "Küche", "harbour": "Hafen", "station": "Bahnhof", "museum": "Museum"}
PEOPLE = {"a painter": "Maler", "the teacher": "Lehrerin", "my sister": "meine Schwester", "an old man": "ein Greis"}
VERBS = {"waits": "wartet", "sleeps": "schläft"}
PAIRS = [
    (f"{who} {does} in the {place}", f"{PLACES[place]} {VERBS[does]} {PEOPLE[who]}")
    for who in PEOPLE for does in VERBS for place in PLACES
]  # fmt: skip
WORDS = {word: number for number, word in enumerate(dict.fromkeys(" ".join(map(" ".join, PAIRS)).split()))}


def packed(sentences: list[str]) -> dict:
    """Return the sentences one after the other, and the place where each begins."""
    tokens = [[WORDS[word] for word in sentence.split()] for sentence in sentences]
    lengths = torch.tensor([0, *map(len, tokens)])
    ids = torch.tensor([number for row in tokens for number in row])
    return {"input_ids": ids, "cu_seqlens": lengths.cumsum(0).int(), "max_seqlen": int(lengths.max())}


def recall(model: FastformerForEmbedding, pairs: list[tuple[str, str]]) -> float:
    """Return the share of the sentences whose most similar translation is their own."""
    with torch.no_grad():
        left, right = (model(**packed(list(side))).embeddings for side in zip(*pairs, strict=True))
    return ((left @ right.T).argmax(dim=1) == torch.arange(len(pairs))).float().mean().item()


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    model = FastformerForEmbedding(FastformerConfig(vocab_size=len(WORDS), pooling="mean", **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = [PAIRS[number] for number in torch.randperm(len(PAIRS))]
    training, held_out = order[:20], order[20:]
    before = recall(model, held_out)
    for _ in range(40):
        left, right = (model(**packed(list(side))).embeddings for side in zip(*training, strict=True))
        loss = torch.nn.functional.cross_entropy(left @ right.T / 0.05, torch.arange(len(training)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = recall(model, held_out)
    print(f"new pairs that find each other: {before:.0%} before, {after:.0%} after training")
    return before, after


if __name__ == "__main__":
    main()
