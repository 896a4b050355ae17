"""What one rank does after training, iteration by iteration: prefill, first token, decode, mixed.

Shape legend: b sequences, s sequence.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from helix_megatron import pretrain_gpt
from helix_megatron.compare.decode import Session
from helix_megatron.measure import kernels
from helix_megatron.measure.comm import CommMeter


class Samples:
    """One workload on this rank: seconds of each iteration, and the collectives of the counted ones."""

    def __init__(self, warmup_iterations: int, host: bool, slow_down: float = 0.0) -> None:
        self.warmup, self.host, self.slow_down = warmup_iterations, host, slow_down
        self.all_seconds: list[float] = []
        self.comm_seconds: list[float] = []
        self.comm: dict[str, dict[str, float]] = {}
        self.counted = 0
        self.split: dict[str, float] | None = None

    def iteration(self, body: Callable[[], Any], meter: CommMeter) -> Any:
        """Run `body` once, timed; returns what it returns.

        On the host every iteration is both timed and counted (counting costs microseconds). On GPUs the
        measured ones run untouched: the last warm-up iteration is the counted one, each collective on its
        own, and the one before it runs under the profiler (kernels.py).
        """
        number = len(self.all_seconds)
        counts = self.host or number == self.warmup - 1
        torch.cuda.synchronize()
        start = time.perf_counter()
        if counts:
            with meter.counting(blocking=not self.host):
                result = body()
        elif number == self.warmup - 2:
            result, self.split = kernels.profile_iteration(body)
        else:
            result = body()
        torch.cuda.synchronize()
        if self.slow_down:
            time.sleep(self.slow_down * (time.perf_counter() - start))
        self.all_seconds.append(time.perf_counter() - start)
        if counts and (number >= self.warmup or not self.host):
            self._add(meter)
        return result

    def _add(self, meter: CommMeter) -> None:
        self.counted += 1
        self.comm_seconds.append(meter.seconds)
        for kind, tally in meter.as_json().items():
            sums = self.comm.setdefault(kind, dict.fromkeys(tally, 0.0))
            for unit, value in tally.items():
                sums[unit] = max(sums[unit], value) if unit == "largest" else sums[unit] + value

    def as_json(self, tokens: float, flops: float) -> dict[str, Any]:
        """tokens, flops: of one iteration, on all ranks together.

        comm holds sums over comm_iterations iterations; comm_seconds the total of each of them; split_seconds
        is there where the profiler saw kernels.
        """
        return ({"split_seconds": self.split} if self.split else {}) | {
            "warmup_seconds": self.all_seconds[: self.warmup],
            "seconds": self.all_seconds[self.warmup :],
            "comm": self.comm,
            "comm_iterations": self.counted,
            "comm_seconds": self.comm_seconds,
            "tokens": tokens,
            "flops": flops,
        }


def count_flops(tokens: float, squares: float) -> float:
    """Floating-point operations of a forward pass, by Megatron's own count (a third of a training step's).

    Args:
        tokens: positions that pass through the model.
        squares: sum of squared lengths of causal sequences; a token that sees L others counts 2 L.
    """
    from megatron.training import get_args
    from megatron.training.training import num_floating_point_operations

    return num_floating_point_operations(get_args(), 1, squares, tokens) / 3


def repeat_batch() -> Iterator[dict[str, torch.Tensor]]:
    """The same micro-batch of random tokens for ever, in the form that a data loader yields."""
    from megatron.training import get_args

    args = get_args()
    shape = (args.micro_batch_size, args.seq_length)  # [b, s]
    tokens = draw_tokens(*shape)
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


def draw_tokens(rows: int, columns: int, seed: int = 1234) -> torch.Tensor:
    """The same random tokens [rows, columns] (int64) on every rank and in every variant."""
    from megatron.training import get_args

    args = get_args()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, args.vocab_size or args.padded_vocab_size, (rows, columns), generator=generator)


def draw_replica_tokens(rows: int, columns: int, seed: int = 1234) -> torch.Tensor:
    """This data-parallel replica's share [rows / DP, columns] of random tokens. ValueError when uneven."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    replicas = parallel_state.get_data_parallel_world_size()
    if rows % replicas:
        raise ValueError(f"batch_size {rows} cannot be split over {replicas} data-parallel replicas.")
    share = rows // replicas
    return draw_tokens(rows, columns, seed)[rank * share : (rank + 1) * share].cuda()


def repeat_batches(model: list[torch.nn.Module]) -> Any:
    """Data iterators of `repeat_batch` as Megatron's schedules take them: one for each of several chunks."""
    return [repeat_batch() for _ in model] if len(model) > 1 else repeat_batch()


def run_forward(model: list[torch.nn.Module], microbatches: int) -> None:
    """Forward `microbatches` through the whole pipeline with Megatron's own schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import get_args

    args = get_args()
    get_forward_backward_func()(
        forward_step_func=pretrain_gpt.forward_step,
        data_iterator=repeat_batches(model),
        model=model,
        num_microbatches=microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
    )


def _iterate(task: Any, name: str, meter: CommMeter, prepare: Callable[[], Callable[[], Any]]) -> Samples:
    """Iterations of a workload, each begun by all ranks together; `prepare` makes what is timed."""
    samples = task.samples(name)
    for _ in range(task.count(name)):
        body = prepare()
        torch.distributed.barrier()
        samples.iteration(body, meter)
    return samples


def train(
    model: list[torch.nn.Module], task: Any, meter: CommMeter, step: Callable[[], Any]
) -> dict[str, Any]:
    """Training steps of a trained model, by `step`."""
    from megatron.core.transformer.utils import set_model_to_sequence_parallel
    from megatron.training import get_args

    args = get_args()
    for chunk in model:
        chunk.train()
        if args.sequence_parallel:  # which inference has switched off
            set_model_to_sequence_parallel(chunk, True)
    tokens = args.global_batch_size * args.seq_length
    work = 3 * count_flops(tokens, tokens * args.seq_length)
    return _iterate(task, "train", meter, lambda: step).as_json(tokens, work)


def prefill(model: list[torch.nn.Module], task: Any, meter: CommMeter) -> dict[str, Any]:
    """Forward passes of a global batch by the pipeline's schedule: prompts at the highest throughput."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    args = get_args()
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        samples = _iterate(task, "prefill", meter, lambda: lambda: run_forward(model, get_num_microbatches()))
    tokens = args.global_batch_size * args.seq_length
    return samples.as_json(tokens, count_flops(tokens, tokens * args.seq_length))


def first_token(model: list[torch.nn.Module], task: Any, meter: CommMeter) -> dict[str, Any]:
    """From a batch of prompts to the first token of each: the time to first token."""
    prompt = draw_replica_tokens(task.batch_size, task.prompt_length)
    samples = _iterate(task, "prefill", meter, lambda: Session(model, prompt, 1).step)
    return samples.as_json(*_prompt_work(task))


def _prompt_work(task: Any) -> tuple[float, float]:
    """Tokens and operations of prefilling the batch once."""
    tokens = task.batch_size * task.prompt_length
    return tokens, count_flops(tokens, tokens * task.prompt_length)


def _decode_flops(task: Any, tokens: float, steps: int) -> float:
    """Operations of decoding `tokens` in the middle of so many steps after the prompts."""
    return count_flops(tokens, tokens * 2 * (task.prompt_length + 1 + steps / 2))


def decode(model: list[torch.nn.Module], task: Any, meter: CommMeter) -> dict[str, Any]:
    """One token after the other for a batch whose cache holds the prompts; the tokens are kept as well."""
    from megatron.core import parallel_state

    count = task.count("decode")
    session = Session(model, draw_replica_tokens(task.batch_size, task.prompt_length), 1 + count)
    made, samples = [session.step()], task.samples("decode")
    torch.distributed.barrier()
    made += [samples.iteration(session.step, meter) for _ in range(count)]
    return samples.as_json(task.batch_size, _decode_flops(task, task.batch_size, count)) | {
        "kv_cache_bytes": session.cache_bytes(),
        "tokens_chosen": torch.cat(made, dim=1).tolist(),
        "replica": parallel_state.get_data_parallel_rank(),
    }


def mixed(model: list[torch.nn.Module], task: Any, meter: CommMeter) -> dict[str, Any]:
    """As in a server: a batch of new prompts is prefilled, then another batch decodes some tokens.

    Beside the iterations, the seconds of each first token and of each decode step are kept.
    """
    count, steps = task.count("mixed"), task.mixed_decode_steps
    running = Session(model, draw_replica_tokens(task.batch_size, task.prompt_length), 1 + count * steps)
    running.step()
    first_seconds: list[float] = []
    token_seconds: list[float] = []

    def timed_step(session: Session, seconds: list[float]) -> None:
        start = time.perf_counter()
        session.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    def arrive() -> Callable[[], None]:
        seed = 4321 + len(first_seconds)
        arrived = Session(model, draw_replica_tokens(task.batch_size, task.prompt_length, seed), 1)

        def body() -> None:
            timed_step(arrived, first_seconds)
            for _ in range(steps):
                timed_step(running, token_seconds)

        return body

    samples = _iterate(task, "mixed", meter, arrive)
    tokens, work = _prompt_work(task)
    decoded = steps * task.batch_size
    measured = samples.as_json(tokens + decoded, work + _decode_flops(task, decoded, count * steps))
    return measured | {
        "first_token_seconds": first_seconds[samples.warmup :],
        "token_seconds": token_seconds[samples.warmup * steps :],
    }
