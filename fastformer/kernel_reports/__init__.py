"""Report on the compiled kernels without a GPU: compile ahead of time, read the binaries, compare; tune with one."""
