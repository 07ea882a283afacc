"""The `fastformer` commands: `fastformer X` runs `main` of `commands/X.py`, which reads options and shows results."""
