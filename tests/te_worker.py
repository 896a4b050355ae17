"""Runs training cases with Transformer Engine stood in for, in a process of its own (test_te.py starts it).

Reads {name: [ranks, flags]} from stdin and prints {name: {"losses": [...], "modules": [...]}} as its last line.
The fork server of the test process has imported Megatron without Transformer Engine; this one imports it with.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from test_training import MODEL, rank_train

from helix_megatron.launch import run_ranks


def rank_modules(arguments):
    """Train; the names of every class whose forward ran, their bases included."""
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.update(cls.__name__ for cls in type(module).__mro__)
    )
    rank_train(arguments)
    hook.remove()
    return sorted(seen)


def train(ranks: int, flags: str, folder: Path) -> dict:
    """One run of Megatron's loop: the losses it printed, and the classes that took part on rank 0."""
    arguments = [*MODEL, "--transformer-impl", "transformer_engine", "--data-cache-path", str(folder.parent)]
    modules = run_ranks(rank_modules, ranks, [*arguments, *flags.split()], timeout_s=300, log_dir=folder)[0]
    text = (folder / f"rank_{ranks - 1}.log").read_text()
    return {"losses": [float(x) for x in re.findall(r"lm loss: (\S+) ", text)], "modules": modules}


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: train(ranks, flags, Path(folder) / name) for name, (ranks, flags) in cases.items()
        }
    print(json.dumps(results))
