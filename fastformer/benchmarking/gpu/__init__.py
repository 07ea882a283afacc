"""The benchmark for a few minutes on a GPU: steps in order of importance, each in a separate process."""
