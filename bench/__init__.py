"""Benchmarks of the ops against plain torch and the peers: ``python -m bench``, ``pytest bench --benchmark-only``.

A variant is timed only after its outputs have been held against float64; rows go to ``bench/results``, and
``python -m bench.report`` makes RESULTS.md and the roofline picture from them.
"""
