"""Report on the compiled kernels without a GPU: compile them ahead of time, read the binaries, compare figures."""
