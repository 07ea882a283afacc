"""The way from labelled examples to batches, in this order:

1. `sets` finds a set by name: `defaults` makes some from Python's documentation (with `catalogues`), `fetch` gets
   others from a package registry. `readers` reads the user's files (with `rows`, `conll` and `tmx`).
2. `examples` defines the class of example of each task.
3. `splitting` divides a set into training, validation and test examples.
4. `features` turns examples into token ids and labels.
5. `collation` turns features into batches.

The way back from a model's results to answers is in `answers`.
"""
