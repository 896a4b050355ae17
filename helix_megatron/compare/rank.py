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
from unittest import mock

import torch

from helix_megatron import pretrain_gpt
from helix_megatron.compare import accuracy, workloads
from helix_megatron.compare.turns import TurnClient
from helix_megatron.measure import memory, nvml
from helix_megatron.measure.comm import CommMeter
from helix_megatron.measure.machine import pin_to_core
from helix_megatron.measure.start import same_weights_at_any_layout
from helix_megatron.megatron import entry


@dataclass(frozen=True)
class Task:
    """What the harness asks of every rank of a run; plain JSON types only."""

    argv: list[str]
    """Flags for helix_megatron.pretrain_gpt."""
    folder: str
    """Where rank r writes rank-<r>.json, or error-<r>.json."""
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
    turns: dict[str, Any] | None = None
    """Stay alive and measure again in turns: what `TurnServer.place` says; None: return after one run."""

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
    step: Callable[[], Any] = lambda: None
    """One more training step, on a batch that is always the same."""


def run(task: Task) -> None:
    """Measure this rank's part of a run and write it to the task's folder; raises what went wrong."""
    rank = int(os.environ["RANK"])
    if task.host:
        pin_to_core(rank)
    folder = Path(task.folder)
    try:
        result, repeat = measure(task)
        (folder / f"rank-{rank}.json").write_text(json.dumps(result))
        if task.turns is not None:
            client = TurnClient(**task.turns)
            client.finish_turn()
            while client.await_turn():
                turn = json.dumps(result | {"workloads": repeat()})
                folder_of_turn(folder, client.number).joinpath(f"rank-{rank}.json").write_text(turn)
                client.finish_turn()
    except BaseException as error:
        cause = entry.configuration_error(error) or _describe(error)
        report = {"time": time.time(), "rank": rank, "cause": cause, "traceback": traceback.format_exc()}
        (folder / f"error-{rank}.json").write_text(json.dumps(report))
        raise


def folder_of_turn(first: Path, number: int) -> Path:
    """Where turn `number` is written, of a variant whose first run is in `first`."""
    return first.with_name(f"{first.name.rpartition('-')[0]}-{number}")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def measure(task: Task) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Train, then measure the trained model.

    Returns this rank's samples as JSON types, and what takes the samples of all workloads again.
    """
    argv = entry.prepare_argv(task.argv)
    meter = CommMeter()
    recorder = Recorder(workloads.Samples(task.workloads.get("train", [1, 0])[0], task.host, task.slow_down))
    seed = int(argv[argv.index("--seed") + 1]) if "--seed" in argv else 1234
    result: dict[str, Any] = {}
    with (
        same_weights_at_any_layout(seed),
        accuracy.compare_at_start(task, result),
        nvml.watch_gpu(result, task.host) as watch,
        record_training(recorder, meter, watch),
    ):
        try:
            pretrain_gpt.train(argv)
        except accuracy.ReferenceDone:
            return {"reference": task.reference}, dict
        measured = measure_trained(task, recorder, meter)
    result |= measured
    return result, lambda: measure_again(task, recorder, meter, result["workloads"])


def measure_trained(task: Task, recorder: Recorder, meter: CommMeter) -> dict[str, Any]:
    """Everything measured once the model is there and trained."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.training import get_args

    get_rerun_state_machine().set_mode(RerunMode.DISABLED)  # it watches training steps only
    args, model = get_args(), recorder.model
    held = memory.state_bytes(model, recorder.optimizer)
    # Megatron's interleaved schedule takes no fewer micro-batches than there are stages.
    together = args.pipeline_model_parallel_size if len(model) > 1 else 1
    held["saved_for_backward"] = memory.activation_bytes(
        model, lambda: workloads.run_forward(model, together), together
    )
    measured: dict[str, Any] = {}
    if "train" in task.workloads:
        tokens = args.global_batch_size * args.seq_length
        work = 3 * workloads.count_flops(tokens, tokens * args.seq_length)
        measured["train"] = recorder.samples.as_json(tokens, work) | {"losses": recorder.losses}
    measured |= measure_inference(task, model, meter)
    if "kv_cache_bytes" in measured.get("decode", {}):
        held["kv_cache"] = measured["decode"]["kv_cache_bytes"]
    kinds = [kind for one in measured.values() for kind in one.get("comm", {}).values()]
    held["communication"] = max((kind["largest"] for kind in kinds), default=0)
    if torch.cuda.max_memory_allocated():
        held["device_peak"] = torch.cuda.max_memory_allocated()
    return {
        "layers": sum(isinstance(m, TransformerLayer) for chunk in model for m in chunk.modules()),
        "args": layout_of(args),
        "helix": grid_of(model),
        "workloads": measured,
        "memory_bytes": held,
        "megatron_estimate_bytes": memory.estimate_bytes(),
    }


def measure_inference(task: Task, model: list[torch.nn.Module], meter: CommMeter) -> dict[str, Any]:
    """name → samples of every workload besides training, or the cause why there are none."""
    measured: dict[str, Any] = {}
    for body in (workloads.prefill, workloads.first_token, workloads.decode, workloads.mixed):
        name = body.__name__
        if ("prefill" if name == "first_token" else name) in task.workloads:
            try:
                measured[name] = body(model, task, meter)
            except (NotImplementedError, ValueError, AssertionError) as error:  # the rest still counts
                measured[name] = {"cause": _describe(error)}
    return measured


def measure_again(task: Task, recorder: Recorder, meter: CommMeter, first: dict[str, Any]) -> dict[str, Any]:
    """All workloads once more. Losses and tokens stay those of `first`: the model trains on meanwhile."""
    model, measured = recorder.model, {}
    if "train" in task.workloads:
        measured["train"] = workloads.train(model, task, meter, recorder.step)
    measured |= measure_inference(task, model, meter)
    for name, key in (("train", "losses"), ("decode", "tokens_chosen")):
        if key in first.get(name, {}):
            measured[name][key] = first[name][key]
    return measured


_LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("data_parallel_size", "context_parallel_size", "num_layers", "hidden_size", "ffn_hidden_size"),
    *("num_attention_heads", "num_query_groups", "kv_channels", "seq_length", "micro_batch_size"),
    *("global_batch_size", "padded_vocab_size", "world_size"),
)


def layout_of(args: Any) -> dict[str, Any]:
    """What Megatron and Helix settled on, for the row."""
    names = [*_LAYOUT, *sorted(name for name in vars(args) if name.startswith("helix_"))]
    plain = (str, int, float, bool, type(None))
    return {name: value for name in names if isinstance(value := getattr(args, name, None), plain)}


def grid_of(model: list[torch.nn.Module]) -> dict[str, Any] | None:
    """The grid and the choices that Helix has settled on, from a layer; None without Helix."""
    plans = (getattr(module, "helix_plan", None) for chunk in model for module in chunk.modules())
    plan = next((plan for plan in plans if plan is not None), None)
    if plan is None:
        return None
    sliced, per_slice = not plan.is_megatron, plan.layout.per_slice
    return {
        "n": plan.grid.head_parallel_size,
        "m": plan.grid.dim_parallel_size,
        "comm": plan.comm_type if sliced and not per_slice else None,
        "placement": plan.layout.query_placement if sliced else None,
        "cache": plan.kv_cache if sliced and not per_slice else None,
    }


@contextmanager
def record_training(
    recorder: Recorder, meter: CommMeter, watch: nvml.GpuSampler | None = None
) -> Iterator[None]:
    """Wrap Megatron's `train_step` while entered: each call is one iteration of the recorder's samples.

    `watch` begins anew with the first measured one.
    """
    from megatron.training import training

    original = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        recorder.model, recorder.optimizer = args[2], args[3]
        recorder.step = lambda: original(args[0], workloads.repeat_batches(args[2]), *args[2:], **kwargs)
        if watch is not None and len(recorder.samples.all_seconds) == recorder.samples.warmup:
            watch.restart()
        result = recorder.samples.iteration(lambda: original(*args, **kwargs), meter)
        if "lm loss" in result[0]:
            recorder.losses.append(result[0]["lm loss"].item())
        return result

    with mock.patch.object(training, "train_step", train_step):
        yield


def main() -> None:
    """One GPU rank: `python -m torch.distributed.run … -m helix_megatron.compare.rank TASK`, as JSON."""
    from helix_megatron.host.processes import die_with_parent

    die_with_parent()  # a harness that is killed leaves no ranks on the GPUs
    run(Task(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
