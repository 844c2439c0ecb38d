"""Benchmarks of fastattn against other exact attention: `python -m benchmarks --list`.

A result is checked before it is timed.

* cases, suites, data, costs: what is measured
* gate, harness, timing, memory, peaks, machine: how it is measured
* measurements: what a run found; report/ prints and plots it
* rivals/: one file for each way to compute attention
* models/: whole models instead of single calls
* inspect/: what compilers made of the kernels, without any timing
* results/: runs and reports that the documents cite
"""
