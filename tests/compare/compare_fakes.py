"""A comparison without ranks: runs that write what a test says, for the harness and the reports."""

import copy
import io
import json
from pathlib import Path

from rich.console import Console

from helix_megatron.compare import config as configuration
from helix_megatron.compare import harness, launch, report, tasks

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


SIZES = {"micro_batch_size": 1, "global_batch_size": 2, "seq_length": 16}


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
        "args": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "data_parallel_size": 1}
        | SIZES,
        "helix": None,
        "workloads": {"train": train},
        "memory_bytes": {"parameters": 1e6 * (rank + 1), "saved_for_backward": 1e6},
        "megatron_estimate_bytes": {"weights_and_optimizer": 18e6, "activations": 1e6},
    }


def rich_samples(ranks, factor, tp=16, pp=1, dp=1, cp=1, grid=None):
    """What the ranks of a run write when all workloads run, `factor` times as slow as the first variant."""
    kinds = [f"all_reduce x{tp}", f"broadcast x{tp}"] + ([f"all_to_all x{grid[1]}"] if grid else [])

    def workload(seconds, tokens, iterations=3):
        tally = {"calls": 3, "bytes": 6e5, "payload": 4e5, "seconds": 0.3 * seconds, "largest": 65536}
        return {
            "warmup_seconds": [9.0],
            "seconds": [factor * seconds * (1 + 0.02 * k) for k in range(iterations)],
            "comm": {kind: tally for kind in kinds},
            "comm_iterations": iterations,
            "comm_seconds": [0.4 * factor * seconds] * iterations,
            "tokens": tokens,
            "flops": 1e9 * tokens,
        }

    sample = samples(1)
    sample["args"] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "data_parallel_size": dp,
        "context_parallel_size": cp,
    } | SIZES
    if grid:
        sample["helix"] = {
            "n": grid[0],
            "m": grid[1],
            "comm": "a2a",
            "placement": "heads",
            "cache": "sequence",
        }
    sample["error"] = {"relative": 3e-7, "max_abs": 2e-6}
    sizes = {"gradients": 2e6, "optimizer": 4e6, "kv_cache": 5e5, "communication": 65536}
    sample["memory_bytes"] = sample["memory_bytes"] | sizes
    decode = {"kv_cache_bytes": 500_000, "tokens_chosen": [[1, 2, 3, 4]], "replica": 0}
    sample["workloads"] = {
        "train": workload(2.0, 128) | {"losses": [5.5, 5.1, 4.8, 4.4]},
        "prefill": workload(0.7, 128),
        "first_token": workload(0.5, 64),
        "decode": workload(0.4, 2) | decode,
        "mixed": workload(1.1, 68) | {"first_token_seconds": [0.5], "token_seconds": [0.4, 0.41]},
    }
    return [copy.deepcopy(sample) for _ in range(ranks)]


def variant(name, seed, **more):
    return {"name": name, "args": {"seed": seed}, **more}


class Launcher:
    """In place of launch.run_on_host: writes `answer(seed, run number of this variant)` for each rank."""

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


def install(monkeypatch, answer=None, page=False):
    """Use a Launcher instead of ranks; returns it. Figures take seconds: they are drawn only for a `page`."""
    if not page:
        monkeypatch.setattr(report, "render_page", lambda results: ("", {}))
    launcher = Launcher(answer)
    monkeypatch.setattr(launch, "run_on_host", launcher)
    monkeypatch.setattr(tasks, "megatron_flags", lambda: None)
    monkeypatch.setattr(
        tasks,
        "build_argv",
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
