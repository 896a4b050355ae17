"""What one rank of one run does: train with Megatron's `pretrain`, then the other workloads, and memory.

Every number here is measured on this rank; the summary takes the slowest rank for times and the mean for
bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helix_megatron import pretrain_gpt
from helix_megatron.compare import accuracy, memory, nvml, workloads
from helix_megatron.compare.comm import CommMeter
from helix_megatron.compare.start import same_weights_at_any_layout
from helix_megatron.megatron import entry


@dataclass(frozen=True)
class Task:
    """What the harness asks of every rank of a run; plain JSON types only."""

    argv: list[str]
    """Flags for helix_megatron.pretrain_gpt."""
    folder: str
    """Where rank r writes rank-<r>.json, or error-<r>.json, and rank 0 its progress."""
    host: bool
    workloads: dict[str, list[int]]
    """Name → [warm-up iterations, measured iterations]."""
    prompt_length: int = 16
    batch_size: int = 1
    mixed_decode_steps: int = 4
    slow_down: float = 0.0
    reference: str | None = None
    """Path of the fp32 reference's logits, to write or to compare with; None for neither."""
    reference_of: str | None = None
    """This run is the reference, of a model whose weights have this torch dtype."""
    reference_grid: list[int] | None = None
    """And (n, m) of the grid when that model has per-slice softmax."""

    def count(self, name: str) -> int:
        """Iterations of a workload, warm-up included."""
        return sum(self.workloads[name])

    def samples(self, name: str) -> workloads.Samples:
        """An empty record of a workload's iterations."""
        return workloads.Samples(self.workloads[name][0], self.host, self.slow_down)


@dataclass
class Recorder:
    """Filled by the wrapped `train_step`: losses, samples of each step, and the objects."""

    samples: workloads.Samples
    losses: list[float] = field(default_factory=list)
    model: list[torch.nn.Module] = field(default_factory=list)
    optimizer: Any = None


def run(task: Task) -> None:
    """Measure this rank's part of a run and write it to the task's folder; raises what went wrong."""
    rank = int(os.environ["RANK"])
    if task.host:
        pin(rank)
    folder = Path(task.folder)
    try:
        result = measure(task, folder if rank == 0 else None)
        (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    except BaseException as error:
        cause = entry.configuration_error(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        report = {"time": time.time(), "rank": rank, "cause": cause, "traceback": traceback.format_exc()}
        (folder / f"error-{rank}.json").write_text(json.dumps(report))
        raise


def pin(rank: int) -> None:
    """Keep this process on one core, neighbours on different ones.

    Work goes from neighbour to neighbour in gloo's rings and in pipelines; with 16 ranks on two cores gloo's
    all-reduce of 64 kB takes 45 ms like this and 70 ms when ranks wander between the cores.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def measure(task: Task, progress: Path | None) -> dict[str, Any]:
    """Train, then measure the trained model. Returns this rank's samples as JSON types."""

    def say(stage: str) -> None:
        if progress is not None:
            (progress / "progress").write_text(stage)

    say("starting")
    argv = entry.prepare(task.argv)
    meter = CommMeter()
    recorder = Recorder(workloads.Samples(task.workloads.get("train", [1, 0])[0], task.host, task.slow_down))
    seed = int(argv[argv.index("--seed") + 1]) if "--seed" in argv else 1234
    result: dict[str, Any] = {}
    with (
        same_weights_at_any_layout(seed),
        accuracy.compared_at_start(task, result, workloads.random_tokens),
        nvml.watched(result, task.host) as watch,
        recorded_training(recorder, meter, say, watch),
    ):
        try:
            pretrain_gpt.train(argv)
        except accuracy.ReferenceDone:
            return {"reference": task.reference}
        measured = after_training(task, recorder, meter, say)
    return result | measured


def after_training(
    task: Task, recorder: Recorder, meter: CommMeter, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything measured once the model is there and trained."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training import get_args

    get_rerun_state_machine().set_mode(RerunMode.DISABLED)  # it watches training steps only
    args, model = get_args(), recorder.model
    held = memory.held(model, recorder.optimizer)
    say("activations")
    # Megatron's interleaved schedule takes no fewer micro-batches than there are stages.
    together = args.pipeline_model_parallel_size if len(model) > 1 else 1
    held["saved_for_backward"] = memory.saved_for_backward(
        model, lambda: workloads.one_pass(model, together), together
    )
    measured: dict[str, Any] = {}
    if "train" in task.workloads:
        tokens = args.global_batch_size * args.seq_length
        work = 3 * workloads.flops(tokens, tokens * args.seq_length)
        measured["train"] = recorder.samples.as_json(tokens, work)
        measured["train"]["losses"] = recorder.losses
    steps: list[tuple[str, str, Callable[..., dict[str, Any]]]] = [
        ("prefill", "prefill", workloads.prefill),
        ("prefill", "first_token", workloads.first_token),
        ("decode", "decode", workloads.decode),
        ("mixed", "mixed", workloads.mixed),
    ]
    for asked, name, body in steps:
        if asked in task.workloads:
            say(name.replace("_", " "))
            try:
                measured[name] = body(model, task, meter)
            except (NotImplementedError, ValueError, AssertionError) as error:  # the rest still counts
                measured[name] = {"cause": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    if "kv_cache_bytes" in measured.get("decode", {}):
        held["kv_cache"] = measured["decode"]["kv_cache_bytes"]
    kinds = [kind for one in measured.values() for kind in one.get("comm", {}).values()]
    held["communication"] = max((kind["largest"] for kind in kinds), default=0)
    if torch.cuda.max_memory_allocated():
        held["device_peak"] = torch.cuda.max_memory_allocated()
    say("done")
    return {
        "layers": len(layer_numbers(model)),
        "args": chosen_args(args),
        "helix": helix_plan(model),
        "workloads": measured,
        "memory_bytes": held,
        "megatron_estimate_bytes": memory.megatron_estimate(),
    }


def chosen_args(args: Any) -> dict[str, Any]:
    """What Megatron and Helix settled on, for the row."""
    names = [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "data_parallel_size",
        "context_parallel_size",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "padded_vocab_size",
        "world_size",
        *sorted(name for name in vars(args) if name.startswith("helix_")),
    ]
    plain = (str, int, float, bool, type(None))
    return {name: value for name in names if isinstance(value := getattr(args, name, None), plain)}


def helix_plan(model: list[torch.nn.Module]) -> dict[str, Any] | None:
    """The grid and the choices that Helix has settled on, from a layer; None without Helix."""
    for plan in (getattr(m, "helix_plan", None) for chunk in model for m in chunk.modules()):
        if plan is not None:
            sliced, per_slice = not plan.is_megatron, plan.layout.per_slice
            return {
                "n": plan.grid.head_parallel_size,
                "m": plan.grid.dim_parallel_size,
                "comm": plan.comm_type if sliced and not per_slice else None,
                "placement": plan.layout.query_placement if sliced else None,
                "cache": plan.kv_cache if sliced and not per_slice else None,
            }
    return None


def layer_numbers(model: list[torch.nn.Module]) -> list[int]:
    """Numbers (from 1, in the whole model) of the transformer layers on this rank."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    return [m.layer_number for chunk in model for m in chunk.modules() if isinstance(m, TransformerLayer)]


@contextmanager
def recorded_training(
    recorder: Recorder, meter: CommMeter, say: Callable[[str], None], watch: nvml.Watch | None = None
) -> Iterator[None]:
    """Wrap Megatron's `train_step` while entered: each call is one iteration of the recorder's samples.

    `watch` begins anew with the first measured one.
    """
    from megatron.training import training

    original = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        say(f"training step {len(recorder.samples.all_seconds) + 1}")
        recorder.model, recorder.optimizer = args[2], args[3]
        if watch is not None and len(recorder.samples.all_seconds) == recorder.samples.warmup:
            watch.restart()
        result = recorder.samples.iteration(lambda: original(*args, **kwargs), meter)
        if "lm loss" in result[0]:
            recorder.losses.append(result[0]["lm loss"].item())
        return result

    training.train_step = train_step
    try:
        yield
    finally:
        training.train_step = original


def main() -> None:
    """One GPU rank: `python -m torch.distributed.run … -m helix_megatron.compare.measure TASK`, as JSON."""
    from helix_megatron.host.processes import die_with_parent

    die_with_parent()  # a harness that is killed leaves no ranks on the GPUs
    run(Task(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
