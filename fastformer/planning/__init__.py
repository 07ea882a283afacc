"""Compute the parameters, operations, memory and time of a model and its training. Nothing is measured."""
