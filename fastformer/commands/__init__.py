"""The `fastformer` commands: `fastformer X` is `main` of `commands/X.py`, which reads options, calls, and shows."""
