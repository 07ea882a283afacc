"""The command ``fastformer bench``: speed, memory and learning, compared with the peers in the same run.

A study (`fastformer.benchmarking.studies`) has cases. In each case Fastformer and its peers do the same work in turns.
"""
