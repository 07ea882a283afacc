"""Explain a model's answer with attention maps and the attributions of tokens."""
