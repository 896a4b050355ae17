"""`helix compare CONFIG.yaml`: the same model trained and decoded by several layouts, next to each other.

config.py    what a comparison is (YAML → dataclass)
comm.py      counts every collective of a rank: calls, bytes, seconds
start.py     one start for every layout: the same weights at any TP, PP and Helix grid
measure.py   what one rank of one variant does: train, forward, decode, memory
memory.py    bytes that a rank holds
decode.py    greedy decode with a KV cache
launching.py starts the ranks of one variant, on CPU cores or GPUs
harness.py   runs the variants, one after the other, and keeps what each gave
report.py    rows, losses compared, the table, report.md
findings.py  what the numbers say, in sentences
"""
