"""Report on the compiled kernels without a GPU, and find the fastest launch configurations with one."""
