"""The Transformer with a head for each task."""
