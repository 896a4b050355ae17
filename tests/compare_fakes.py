"""A comparison without ranks: runs that write what a test says, for the harness and the reports."""

import copy
import io
import json
from pathlib import Path

from rich.console import Console

from helix_megatron.compare import config as configuration
from helix_megatron.compare import harness, launching

DOCUMENT = {
    "name": "tiny",
    "host": True,
    "world_size": 2,
    "runs": 1,
    "warmup_iterations": 1,
    "iterations": 2,
    "prompt_length": 4,
    "run_timeout_s": 60,
    "reference": False,
    "MODEL_ARGS": {
        "num-layers": 2,
        "hidden-size": 32,
        "num-attention-heads": 4,
        "seq-length": 16,
        "max-position-embeddings": 16,
        "micro-batch-size": 1,
        "global-batch-size": 2,
        "lr": 1e-3,
        "min-lr": 1e-3,
        "lr-decay-style": "constant",
        "padded-vocab-size": 272,
        "transformer-impl": "local",
        "position-embedding-type": "rope",
        "no-gradient-accumulation-fusion": True,
        "no-masked-softmax-fusion": True,
        "no-rope-fusion": True,
        "no-bias-dropout-fusion": True,
        "no-bias-gelu-fusion": True,
        "no-persist-layer-norm": True,
        "no-create-attention-mask-in-dataloader": True,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "num-workers": 0,
    },
    "variants": [{"name": "one"}],
}


def document(**changes):
    return {**copy.deepcopy(DOCUMENT), **changes}


def samples(rank, shift=0.0, slower=1.0):
    """What one of two ranks writes, with round numbers."""
    tally = {"calls": 8, "bytes": 200.0 + 2 * rank, "payload": 400.0, "seconds": 1.0, "largest": 50.0}
    train = {
        "warmup_seconds": [9.0],
        "seconds": [slower * (1.0 + rank), slower * (2.0 + rank)],
        "comm": {"all_reduce x2": tally},
        "comm_iterations": 2,
        "comm_seconds": [0.25 + 0.5 * rank, 0.25 + 0.5 * rank],
        "tokens": 30,
        "flops": 6e12,
        "losses": [5.0, 4.0 + shift, 3.0] if rank == 1 else [],
    }
    return {
        "layers": 2,
        "args": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
        "helix": None,
        "workloads": {"train": train},
        "memory_bytes": {"parameters": 1e6 * (rank + 1), "saved_for_backward": 1e6},
        "megatron_estimate_bytes": {"weights_and_optimizer": 18e6, "activations": 1e6},
    }


def variant(name, seed, **more):
    return {"name": name, "args": {"seed": seed}, **more}


class Launcher:
    """In place of launching.on_host: writes `answer(seed, run number of this variant)` for each rank."""

    def __init__(self, answer=None):
        self.answer = answer or (lambda seed, run: [samples(0), samples(1)])
        self.launched = []
        """(seed, run) of every launch, in order."""

    def __call__(self, config, task, ranks):
        seed = task.argv[task.argv.index("--seed") + 1]
        run = int(task.folder.rpartition("-")[2])
        self.launched.append((seed, run))
        written = self.answer(seed, run)
        if isinstance(written, tuple):  # (status, cause)
            return written
        for rank, sample in enumerate(written[:ranks]):
            Path(task.folder, f"rank-{rank}.json").write_text(json.dumps(sample))
        return "ok", ""


def install(monkeypatch, answer=None):
    """Use a Launcher instead of ranks; returns it."""
    launcher = Launcher(answer)
    monkeypatch.setattr(launching, "on_host", launcher)
    monkeypatch.setattr(harness, "megatron_flags", lambda: None)
    monkeypatch.setattr(
        harness,
        "argv_of",
        lambda config, variant, out, known: ["--seed", str(variant.args.get("--seed", "0"))],
    )
    monkeypatch.setattr(configuration.CompareConfig, "model_key", lambda self, variant: "one")
    return launcher


def compare(out, options=None, **changes):
    """Run harness.compare; returns exit code, results.json, report.md, what was shown."""
    config = configuration.parse(document(**changes), "file.yaml")
    console = Console(file=io.StringIO(), width=250)
    code = harness.compare(config, out, console, options or harness.Options())
    results = json.loads((out / "results.json").read_text())
    return code, results, (out / "report.md").read_text(), console.file.getvalue()
