"""Speed, memory and learning beside the peers, measured in one run: the command ``fastformer bench``.

A study (`fastformer.benchmarking.studies`) has cases; in each case Fastformer and its peers do the same work in turns.
"""
