"""Lightning data modules: batches of `data`, for each rank, resumable in the middle of an epoch."""
