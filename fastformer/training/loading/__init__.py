"""Lightning data modules: they give each rank its batches of `data`, and resume in the middle of an epoch."""
