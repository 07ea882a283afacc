"""Reports what the kernels become on a GPU, without one: compiled ahead of time, read and compared."""
