"""Text to pretraining batches, in this order:

1. `sources` opens files, folders and datasets as streams of documents; `python_documentation` is the default text.
2. `corpus` divides documents into sentences.
3. `splitting` holds documents out, by their content alone.
4. `tokenizer` trains a vocabulary on the rest; `encoding` turns text into token ids with it.
5. `store` keeps the ids on the disk (`tokenized` holds them in memory). `preparation` runs steps 1 to 5, once.
6. `objectives` draws examples from a store and says what of them is predicted; `bert`, `windows` and `corruption` have
   the parts of single objectives.
7. `batches` collects examples into packed batches of a number of tokens.
"""
