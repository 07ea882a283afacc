"""What the kernels become on a GPU, found out without one."""
