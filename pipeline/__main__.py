"""``python -m pipeline``: the command line."""

from pipeline.main import console

console()
