"""Explains a model's answer: attention maps and the attributions of tokens."""
