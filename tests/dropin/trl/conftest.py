"""The tests inside TRL cannot even be imported without it."""

from importlib.util import find_spec

if find_spec("trl") is None:
    collect_ignore_glob = ["test_*.py"]
