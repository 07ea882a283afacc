"""The steps of the GPU benchmark, one module each, with a `STEP`."""
