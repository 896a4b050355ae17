"""`helix check`: one command proves and measures Helix on this machine: a host, one GPU, several, many.

    command.py      the command line
    sections.py     the table of sections: what each proves, where it runs, how long it may take
    runner.py       a section in a fresh process with a time limit, on one machine or in torchrun
    worker.py       that process
    rows.py         what a section writes while it runs; where its ranks run
    results.py      check.json, check.md and the screen
    exactness.py, training.py, generation.py, kernels.py, graphs.py, layers.py,
    collectives.py    the sections
    reference.py    attention in float64 straight from the formula; tests compare with it too
    kernel_times.py the operations and kernels of a step, counted and by class
    layer.py        one attention layer of Megatron's with the weights of such a case
    paged.py        requests over a paged cache, and their attention in float64
    tiny_model.py   a tiny Llama as a Hugging Face folder
"""
