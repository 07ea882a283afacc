"""Checks this machine: a self-test of every operator, and the numerical error of each."""
