"""What one rank of one variant does: train with Megatron's `pretrain`, then forward, decode, memory.

Every number here is measured on this rank; the harness takes the slowest rank for times and the mean for
bytes. Shape legend: s sequence, b micro-batch.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helix_megatron import entry, pretrain_gpt
from helix_megatron.compare import decode, memory
from helix_megatron.compare.comm import CommMeter
from helix_megatron.compare.start import same_weights_at_any_layout


@dataclass(frozen=True)
class Task:
    """What the harness asks of every rank of a variant; plain JSON types only."""

    argv: list[str]
    """Flags for helix_megatron.pretrain_gpt."""
    folder: str
    """Where rank r writes rank-<r>.json, or error-<r>.json, and rank 0 its progress."""
    host: bool
    steps: int
    warmup_steps: int
    forward_iterations: int
    prompt_length: int
    decode_tokens: int
    decode_batch_size: int


@dataclass
class Recorder:
    """Filled by the wrapped `train_step`: losses, seconds and collectives of each step, and the objects."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    step_comm: list[dict[str, Any]] = field(default_factory=list)
    model: list[torch.nn.Module] = field(default_factory=list)
    optimizer: Any = None
    config: Any = None


def run(task: Task) -> None:
    """Measure this rank's part of a variant and write it to the task's folder; raises what went wrong."""
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

    A gloo ring hands work from neighbour to neighbour; with 16 ranks on two cores an all-reduce of 64 kB
    takes 45 ms like this and 70 ms when ranks wander between the cores.
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
    recorder, meter = Recorder(), CommMeter()
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training import get_args

    seed = int(argv[argv.index("--seed") + 1]) if "--seed" in argv else 1234
    with same_weights_at_any_layout(seed), recorded_training(recorder, meter, task, say):
        pretrain_gpt.train(argv)
    get_rerun_state_machine().set_mode(RerunMode.DISABLED)  # it watches training steps only
    args = get_args()
    result: dict[str, Any] = {
        "layers": len(layer_numbers(recorder.model)),
        "args": chosen_args(args),
        "helix": helix_plan(recorder.model),
        "losses": recorder.losses,
        "train_step_seconds": recorder.step_seconds,
        "train_step_comm": recorder.step_comm,
        "tokens_per_step": args.global_batch_size * args.seq_length,
        "memory_bytes": memory.held(recorder.model, recorder.optimizer),
    }
    say("forward")
    result["memory_bytes"]["saved_for_backward"] = memory.saved_for_backward(
        recorder.model, lambda: one_pass(recorder, microbatches=1)
    )
    result["forward_seconds"], result["forward_comm"] = forward(recorder, meter, task)
    if task.decode_tokens:
        say("decode")
        try:
            prompt = random_tokens(task.decode_batch_size, task.prompt_length).cuda()
            counter = meter if task.host else None
            result["decode"] = decode.decode(recorder.model, prompt, task.decode_tokens, counter)
        except (NotImplementedError, ValueError, AssertionError) as error:  # training still counts
            result["decode"] = {"cause": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    if torch.cuda.max_memory_allocated():
        result["memory_bytes"]["device_peak"] = torch.cuda.max_memory_allocated()
    say("done")
    return result


def chosen_args(args: Any) -> dict[str, Any]:
    """What Megatron and Helix settled on, for the row."""
    names = [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "data_parallel_size",
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
        *sorted(name for name in vars(args) if name.startswith("helix_")),
    ]
    plain = (str, int, float, bool, type(None))
    return {name: value for name in names if isinstance(value := getattr(args, name, None), plain)}


def helix_plan(model: list[torch.nn.Module]) -> dict[str, Any] | None:
    """The grid and the choices that Helix has settled on, from a layer; None without Helix."""
    for plan in (getattr(m, "helix_plan", None) for chunk in model for m in chunk.modules()):
        if plan is not None:
            sliced = not plan.is_megatron
            return {
                "n": plan.grid.head_parallel_size,
                "m": plan.grid.dim_parallel_size,
                "comm": plan.comm_type if sliced else None,
                "placement": plan.layout.query_placement if sliced else None,
            }
    return None


def layer_numbers(model: list[torch.nn.Module]) -> list[int]:
    """Numbers (from 1, in the whole model) of the transformer layers on this rank."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    return [m.layer_number for chunk in model for m in chunk.modules() if isinstance(m, TransformerLayer)]


@contextmanager
def recorded_training(recorder: Recorder, meter: CommMeter, task: Task, say: Any) -> Iterator[None]:
    """Wrap Megatron's `train_step` while entered.

    On the host every step is both timed and counted (counting costs microseconds). On GPUs the measured
    steps run untouched, and the last warm-up step is the counted one, with each collective on its own.
    """
    from megatron.training import training

    original = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        number = len(recorder.step_seconds)
        say(f"training step {number + 1}/{task.warmup_steps + task.steps}")
        recorder.model, recorder.optimizer, recorder.config = args[2], args[3], args[5]
        counted = task.host or number == max(0, task.warmup_steps - 1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        if counted:
            with meter.counting(blocking=not task.host):
                result = original(*args, **kwargs)
            recorder.step_comm.append(meter.as_json())
        else:
            result = original(*args, **kwargs)
            recorder.step_comm.append({})
        torch.cuda.synchronize()
        recorder.step_seconds.append(time.perf_counter() - start)
        if "lm loss" in result[0]:
            recorder.losses.append(result[0]["lm loss"].item())
        return result

    training.train_step = train_step
    try:
        yield
    finally:
        training.train_step = original


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """The same micro-batch of random tokens for ever, in the form that a data loader yields."""
    from megatron.training import get_args

    args = get_args()
    shape = (args.micro_batch_size, args.seq_length)  # [b, s]
    tokens = random_tokens(*shape)
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(args.seq_length).repeat(args.micro_batch_size, 1),
    }
    if args.create_attention_mask_in_dataloader:
        mask = torch.tril(torch.ones(1, 1, args.seq_length, args.seq_length)) < 0.5
        batch["attention_mask"] = mask.repeat(args.micro_batch_size, 1, 1, 1)
    return itertools.repeat(batch)


def random_tokens(rows: int, columns: int) -> torch.Tensor:
    """The same random tokens [rows, columns] (int64) on every rank and in every variant."""
    from megatron.training import get_args

    args = get_args()
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(0, args.vocab_size or args.padded_vocab_size, (rows, columns), generator=generator)


def one_pass(recorder: Recorder, microbatches: int) -> None:
    """Forward `microbatches` through the whole pipeline with Megatron's own schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import get_args

    args = get_args()
    chunks = len(recorder.model)
    get_forward_backward_func()(
        forward_step_func=pretrain_gpt.forward_step,
        data_iterator=[batches() for _ in range(chunks)] if chunks > 1 else batches(),
        model=recorder.model,
        num_microbatches=microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
    )


def forward(recorder: Recorder, meter: CommMeter, task: Task) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each measured forward pass of a global batch, and the collectives of the last one."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    for chunk in recorder.model:
        chunk.eval()
    seconds: list[float] = []
    with torch.no_grad():
        for _ in range(task.forward_iterations):
            torch.cuda.synchronize()
            torch.distributed.barrier()
            start = time.perf_counter()
            with meter.counting() if task.host else nullcontext():
                one_pass(recorder, get_num_microbatches())
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds, meter.as_json() if task.host else {}


def main() -> None:
    """One GPU rank: `python -m torch.distributed.run … -m helix_megatron.compare.measure TASK`, as JSON."""
    run(Task(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
