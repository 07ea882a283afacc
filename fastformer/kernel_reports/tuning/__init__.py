"""Measure on the user's GPU which launch configurations are fastest. The shipped defaults come from a model."""
