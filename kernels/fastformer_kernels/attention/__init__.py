"""Scaled-dot-product attention: one kernel family in which every feature composes with every other."""
