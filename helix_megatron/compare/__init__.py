"""`helix compare CONFIG.yaml`: the same model trained and decoded by several layouts, next to each other.

command.py      its flags
config.py       what a comparison is (YAML → dataclass)
variants.py     ways to run one model
harness.py      runs the variants in turn, in fresh processes, and keeps what each run gave
records.py        one file for each run, and what may be put together
launching.py      starts the ranks of one run
nodes.py          several machines in step
progress.py       what is shown meanwhile
measure.py      what one rank of one run does: train, then
workloads.py      prefill, first token, decode, mixed, iteration by iteration
decode.py         a batch of sequences and its KV cache
accuracy.py       logits against the same weights on one rank in fp32
stats.py        the statistics, pure
selfcheck.py    can the harness tell a difference, and can it tell none?
summary.py      from samples to numbers
predicted.py    what the planner predicts of the same
comparisons.py  who is faster, and whether that is more than noise
findings.py     what the numbers say, in sentences
paper.py        the paper's numbers, checked by arithmetic
scaling.py      weak and strong scaling
tables.py       the tables as text
plots.py        the figures
markdown.py     report.md
html.py         report.html, from report.html.j2
reporting.py    everything that is written and shown
"""
