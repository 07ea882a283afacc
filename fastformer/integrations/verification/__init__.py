"""Verification of a Hugging Face model on Fastformer: outputs, gradients and generation compared with its own."""
