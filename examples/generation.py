"""Generate text: many prompts of different lengths run together, and text comes as it is generated.

A small GPT first learns one sentence by heart, so that its text can be read. Then `Generator` continues beginnings of
that sentence in two slots: when one prompt is finished, the next takes its place. Hugging Face's own `generate` gives
the same tokens. `fastformer generate` does this from the command line.

    pip install -e . && python examples/generation.py
"""

import torch

from fastformer.generation import Generator, SamplingParameters
from fastformer.models import FastformerConfig, FastformerForCausalLM

SENTENCE = "the early bird may catch the worm , but the second mouse gets all of the cheese in a trap ."
WORDS = list(dict.fromkeys(SENTENCE.split()))
TOKENS = [WORDS.index(word) for word in SENTENCE.split()]


def words(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def trained_model() -> FastformerForCausalLM:
    torch.manual_seed(0)
    config = FastformerConfig(
        stack="decoder", vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, norm_placement="pre", position_embedding="rotary", hidden_dropout_prob=0.0,
        type_vocab_size=0, eos_token_id=WORDS.index("."),
    )  # fmt: skip
    model, row = FastformerForCausalLM(config), torch.tensor([TOKENS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> tuple[list[list[int]], list[list[int]], list[int]]:
    model = trained_model()
    generator = Generator(model, slots=2, page_size=4)
    prompts = [TOKENS[:length] for length in (3, 5, 9, 12)]
    greedy = SamplingParameters(max_new_tokens=20)
    ours = [generation.tokens for generation in generator.generate(prompts, greedy)]
    rows = [torch.tensor([prompt]) for prompt in prompts]
    theirs = [model.generate(row, max_new_tokens=20, do_sample=False)[0, row.shape[1] :].tolist() for row in rows]
    for prompt, tokens in zip(prompts, ours, strict=True):
        print(f"{words(prompt)} -> {words(tokens)}")
    streamed: list[int] = []
    for piece in generator.stream(prompts[:1], greedy):  # each step's tokens at once
        print(words(piece.tokens), end=" ", flush=True)
        streamed += piece.tokens
    print()
    return ours, theirs, streamed


if __name__ == "__main__":
    main()
