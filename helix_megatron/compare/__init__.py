"""`helix compare CONFIG.yaml`: the same model trained and decoded by several layouts, next to each other.

It runs the variants in turn, in fresh processes or in kept ones (run), makes numbers and intervals of what
their ranks measured (statistics), and writes what can be said of them for terminal, Markdown and HTML
(report). Every number is measured, but for what the planner predicts and what is the paper's.

run         command.py      the flags of `helix compare`, and what they make of the file
            config.py       what a comparison is (YAML → dataclass)
            variants.py     ways to run one model
            tasks.py        what is run: references, flags, what a rank is asked for
            harness.py      runs the variants in turn, and keeps what each run gave
            records.py      one file for each run, and what may be put together
            launch.py       starts the ranks of one run; keeps several machines in step
            kept.py         ranks that are started once and measure in turns
            turns.py        whose turn it is
            rank.py         what one rank of one run does: train, then
            workloads.py    prefill, first token, decode, mixed, iteration by iteration
            decode.py       a batch of sequences and its KV cache
            accuracy.py     logits against the same weights on one rank in fp32
statistics  summary.py      from the samples of the ranks to the numbers of a variant
            stats.py        intervals, tests, bootstrap
            comparisons.py  who is faster, and whether that is more than noise; scaling
            predictions.py  what the planner predicts of the same
            paper.py        the paper's numbers, checked by arithmetic
report      overview.py     the five points that a report may open with
            expectations.py what to expect on GPUs: predicted, and measured on one H200
            findings.py     what the numbers say, in sentences
            table.py        one model of a table for every form
            tables.py       the tables
            figures.py      the figures, and drawing.py what they share
            report.py       results.json, report.md, report.html (report.html.j2), the terminal
"""
