"""Benchmarks of fastattn against other exact attention, correctness first: `python -m benchmarks --list`."""
