"""The way from text to pretraining batches, in this order:

1. `sources` opens files, folders and datasets as streams of documents; `python_documentation` is the default text.
2. `corpus` divides documents into sentences.
3. `splitting` holds documents out; their content alone decides.
4. `tokenizer` trains a vocabulary on the rest; `encoding` turns text into token ids with it.
5. `store` keeps the ids on the disk (`tokenized` holds them in memory). `preparation` runs steps 1 to 5 once.
6. `objectives` draws examples from a store, `batches` collects them up to a given number of tokens, and the objective
   makes a packed batch of each collection, with what the model predicts. `bert`, `masked_batches`, `windows` and
   `corruption` hold the parts of single objectives.
"""
