"""Instruments that plan/, compare/, generate/ and the benchmarks share; they import nothing of these.

comm.py      counts every collective of a rank: calls, bytes, seconds
operations.py  kernels that torch dispatches, what they read and write
memory.py    bytes that a rank holds: parameters, gradients, optimizer, activations
nvml.py      what NVML says of a rank's GPU while it works
kernels.py   where a GPU's time goes, from the profiler's kernels
machine.py   hardware, versions and source of what ran; pins a rank to a core
start.py     one start for every layout: the same weights at any TP, PP and Helix grid
"""
