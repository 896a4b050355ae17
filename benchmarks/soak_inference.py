"""Long soak of the dynamic engine with a sharded KV cache: random requests against a cache too small for all.

    python benchmarks/soak_inference.py --requests 2000 --seed 1

The same random requests (prompts of 1 to 2,000 tokens, random arrivals and cancellations) go through
Megatron's engine at T = 1, vanilla, with room for every request that runs, and through Helix at T = 4 with so
few blocks that requests are paused and evicted. Checked: every answer is that of T = 1 (a cancelled one as
far as it goes), every block is free at the end, and all ranks had the same requests in the same blocks after
every step.

A tiny random model has near-ties between tokens that float32 cannot decide: where T = 1 gives the two best
logits within 1e-3 of their spread, another choice is counted as a tie, and answers are compared up to there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY, BLOCK, LONGEST, TIE = 256, 32, 2000, 1e-3


@dataclass(frozen=True)
class Request:
    """A prompt, tokens to generate, the step at which it comes, the steps until it is cancelled (if ever)."""

    prompt: list[int]
    new_tokens: int
    arrives: int
    cancelled_after: int | None


def requests(count: int, seed: int, longest: int = LONGEST) -> list[Request]:
    """Random requests: lengths from 1 to `longest`, evenly on a log scale; one in ten is cancelled."""
    draw, made, step = random.Random(seed), [], 0
    for _ in range(count):
        length = min(longest, int(longest ** draw.random()))
        prompt = [draw.randrange(VOCABULARY) for _ in range(length)]
        step += draw.choice((0, 0, 0, 1, 2))
        cancelled = draw.randrange(30) if draw.random() < 0.1 else None
        made.append(Request(prompt, draw.randint(1, 40), step, cancelled))
    return made


class _Numbers:
    """The tokenizer that the engine asks for."""

    vocab_size, eod, bos = VOCABULARY, VOCABULARY - 1, None

    def detokenize(self, tokens: list[int], **kwargs: Any) -> str:
        return " ".join(map(str, tokens))


def tiny_model(tp: int) -> Any:
    """A random model of 4 heads and 2 KV heads, the same at every T; at T = 4 with Helix 2x2."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from helix_megatron.megatron import integrate
    from helix_megatron.partition.config import HelixConfig

    torch.distributed.init_process_group("nccl")
    if tp > 1:
        helix = HelixConfig(kv_interleave_size=4)
        integrate.enable(helix, helix.resolve(4, 2, 16, tp).grid)
    parallel_state.initialize_model_parallel(tp)
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2,
        kv_channels=16, tensor_model_parallel_size=tp, use_cpu_initialization=True,
        pipeline_dtype=torch.float32, masked_softmax_fusion=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False, init_method_std=0.3,
        attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    return GPTModel(
        config, get_gpt_layer_local_spec(), VOCABULARY, LONGEST + 64, position_embedding_type="rope"
    ).eval()


def soak(tp: int, count: int, seed: int, longest: int, blocks: int) -> dict[str, Any]:
    """In a rank: all requests. Returns answers, their margins, and the state of the engine."""
    import torch
    from megatron.core.inference.sampling_params import SamplingParams

    from helix_megatron.generate.engine import CacheSize, block_bytes, build, cancel, generated_tokens

    wanted = requests(count, seed, longest)
    margins: dict[int, list[float]] = {}
    answers: dict[int, list[int]] = {}

    def watch(ids: list[int], logits: Any) -> None:
        best = logits.topk(2, dim=-1).values
        spread = logits.max(dim=-1).values - logits.min(dim=-1).values
        for number, margin in zip(ids, ((best[:, 0] - best[:, 1]) / spread).tolist(), strict=True):
            margins.setdefault(number, []).append(margin)

    state, following, step, started = hashlib.sha256(), 0, 0, time.perf_counter()
    paused, cancelled, due = 0, [], {}
    with torch.inference_mode():
        size = CacheSize(BLOCK, blocks, 32, LONGEST + 64, LONGEST + 64)
        model = tiny_model(tp)
        # A quarter of the blocks is for requests that are paused; without it they are evicted at once.
        waiting = (blocks // 4 + 0.5) * block_bytes(model.config, tp > 1, BLOCK) / 2**30
        engine = build(model, _Numbers(), size, watch, paused_buffer_size_gb=waiting)
        context = engine.context
        while following < count or engine.requests:
            while following < count and wanted[following].arrives <= step:
                request = wanted[following]
                params = SamplingParams(num_tokens_to_generate=request.new_tokens, top_k=1, termination_id=-1)
                engine.add_request(following, request.prompt, params)
                if request.cancelled_after is not None:
                    due.setdefault(step + request.cancelled_after, []).append(following)
                following += 1
            for number in due.pop(step, []):
                if number in engine.requests:
                    answers[number] = generated_tokens(engine.requests[number].record)
                    cancelled.append(number)
                    cancel(engine, number)
            if engine.has_unfinished_requests():
                result = engine.step_modern()
                for record in result["finished_request_records"]:
                    answers[record.request_id] = generated_tokens(record)
                paused = max(paused, context.paused_request_count)
                running = slice(0, context.total_request_count)
                state.update(context.request_ids[running].numpy().tobytes())
                state.update(context.request_to_kv_block_ids[running].numpy().tobytes())
            step += 1
    return {
        "answers": answers, "margins": margins if tp == 1 else {}, "cancelled": sorted(cancelled),
        "steps": step, "paused": paused, "evicted": engine.evicted_request_count,
        "leaked_blocks": context.kv_block_allocator.get_total_used(), "state": state.hexdigest(),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def differences(alone: dict[str, Any], ours: dict[str, Any], wanted: list[Request]) -> tuple[list[int], int]:
    """(requests answered otherwise than at T = 1, ties)."""
    wrong, ties = [], 0
    for number, request in enumerate(wanted):
        a, b = alone["answers"][number], ours["answers"][number]
        over = number in alone["cancelled"] or number in ours["cancelled"]
        if not over and not len(a) == len(b) == request.new_tokens:
            wrong.append(number)
            continue
        length = min(len(a), len(b))
        first = next((place for place in range(length) if a[place] != b[place]), None)
        if first is not None and alone["margins"][number][first] < TIE:
            ties += 1
        elif first is not None:
            wrong.append(number)
    return wrong, ties


def run(count: int, seed: int, longest: int = LONGEST, blocks: int = 96, tp: int = 4) -> dict[str, Any]:
    """The whole soak; its findings, `failures` among them."""
    from helix_megatron.host.launcher import run_ranks

    wanted = requests(count, seed, longest)
    (alone,) = run_ranks(soak, 1, 1, count, seed, longest, 32 * -(-(LONGEST + 64) // BLOCK), timeout_s=7200)
    ranks = run_ranks(soak, tp, tp, count, seed, longest, blocks, timeout_s=7200)
    ours = ranks[0]
    wrong, ties = differences(alone, ours, wanted)
    failures = [f"request {number} is answered otherwise than at T = 1" for number in wrong]
    if any(rank["state"] != ours["state"] or rank["answers"] != ours["answers"] for rank in ranks):
        failures.append("ranks were out of step")
    for name, found in (("T = 1", alone), (f"T = {tp}", ours)):
        if found["leaked_blocks"]:
            failures.append(f"{name}: {found['leaked_blocks']} blocks were not given back")
    return {
        "requests": count, "seed": seed, "tp": tp, "blocks": blocks, "block_tokens": BLOCK,
        "prompt_tokens": sum(len(request.prompt) for request in wanted),
        "tokens": sum(map(len, ours["answers"].values())), "cancelled": len(ours["cancelled"]),
        "ties": ties, "failures": failures,
        **{name: ours[name] for name in ("steps", "paused", "evicted", "seconds")},
        "paused_alone": alone["paused"], "seconds_alone": alone["seconds"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=int, default=LONGEST, help="prompt, in tokens")
    parser.add_argument("--blocks", type=int, default=96, help=f"of {BLOCK} tokens, at T = 4")
    parser.add_argument("--out", type=Path, help="JSON file of the findings")
    options = parser.parse_args(argv)
    if options.blocks * BLOCK < options.longest + 64:
        parser.error(f"--blocks {options.blocks}: the longest request alone does not fit")
    found = run(options.requests, options.seed, options.longest, options.blocks)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from soak_inference import main as _main  # ranks import its functions by name

    sys.exit(_main())
