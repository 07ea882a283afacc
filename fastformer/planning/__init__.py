"""Computes what a model and its training need: parameters, operations, memory, time. Nothing is measured."""
