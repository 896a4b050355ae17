"""Runs training cases with Transformer Engine stood in for, in a process of its own (test_te.py starts it).

Reads {name: [ranks, flags]} from stdin; its last line is {name: {"losses": [...], "modules": [...]}}. The
fork server of the test process has imported Megatron without Transformer Engine, that of this one with it.
"""

import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path

import torch

from helix_megatron.host.launcher import run_ranks
from tests.training import MODEL, rank_train


def rank_modules(arguments):
    """Train; the names of every class whose forward ran, their bases included."""
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.update(cls.__name__ for cls in type(module).__mro__)
    )
    if "--fp8-format" in arguments:
        os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # Python code in place of a kernel
        claim_hopper(lambda tensor, dtype: seen.add(f"quantised to {dtype}"))
    rank_train(arguments)
    hook.remove()
    return sorted(seen)


def claim_hopper(note):
    """FP8 is refused below compute capability 8.9, host mode is 8.0; note(tensor, dtype): made FP8."""
    import transformer_engine_torch

    properties, quantize = torch.cuda.get_device_properties(0), transformer_engine_torch.quantize
    hopper = types.SimpleNamespace(**{**vars(properties), "major": 9, "minor": 0})
    torch.cuda.get_device_properties = lambda *args: hopper
    torch.cuda.get_device_capability = lambda *args: (9, 0)

    def noted(tensor, quantizer, *args):
        note(tensor, quantizer.dtype.name)
        return quantize(tensor, quantizer, *args)

    transformer_engine_torch.quantize = noted


def train(ranks: int, flags: str, folder: Path) -> dict:
    """One run of Megatron's loop: the losses it printed, and the classes that took part on rank 0."""
    arguments = [*MODEL, "--transformer-impl", "transformer_engine", "--data-cache-path", str(folder.parent)]
    modules = run_ranks(rank_modules, ranks, [*arguments, *flags.split()], timeout_s=300, log_dir=folder)[0]
    text = (folder / f"rank_{ranks - 1}.log").read_text()
    return {"losses": [float(x) for x in re.findall(r"lm loss: (\S+) ", text)], "modules": modules}


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        results = {name: train(ranks, flags, Path(folder) / name) for name, (ranks, flags) in cases.items()}
    print(json.dumps(results))
