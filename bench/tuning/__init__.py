"""The experiments of ``python -m bench.search``."""
