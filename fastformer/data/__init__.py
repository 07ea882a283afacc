"""Data, from text to batches. Nothing here knows a model or a trainer.

`pretraining` turns raw text into batches of a pretraining objective. `labelled` turns labelled examples into features
and batches for fine-tuning; it may import from `pretraining`. The files at this level serve both.
"""
