"""`helix generate`: prompts through the dynamic engine, with what a user and a benchmark want to know.

Times are taken on rank 0 around the engine's steps: TTFT, from the moment all prompts are handed over to the
first token of a prompt; TPOT, the mean time between the tokens of an answer after its first.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from helix_megatron.generate import model as models
from helix_megatron.generate import report
from helix_megatron.generate.graphs import EAGER, Steps
from helix_megatron.generate.requests import COLDEST, HOTTEST, LEAST_TOP_P


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedy by default.

    Args:
        temperature: 0 is greedy.
        top_k: the most likely ones only; 0 for all.
        top_p: the most likely ones that have this probability together; 0 for all.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature} is negative; 0 is greedy.")
        if self.temperature and not COLDEST <= self.temperature <= HOTTEST:
            raise ValueError(
                f"--temperature {self.temperature:g}: logits divided by it may not be numbers; give 0 "
                f"(greedy), or {COLDEST:g} to {HOTTEST:g}."
            )
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(
                f"--top-k {self.top_k} --top-p {self.top_p}: a count from 0, and a probability up to 1."
            )
        if not 1 <= self.seed < 2**31:
            raise ValueError(f"--seed {self.seed}: a number from 1 to {2**31 - 1}.")
        if 0 < self.top_p < LEAST_TOP_P:
            raise ValueError(
                f"--top-p {self.top_p:g} is less than {LEAST_TOP_P:g}; 0 is all tokens, --top-k 1 the best."
            )
        if self.top_k and self.top_p:
            raise ValueError("--top-k and --top-p together are not supported by Megatron; give one of them.")
        if self.temperature == 0 and (self.top_k > 1 or self.top_p):
            raise ValueError(
                "--top-k and --top-p do nothing at --temperature 0 (greedy); give a temperature."
            )

    def params(self, new_tokens: int, ignore_eos: bool) -> Any:
        """Megatron's SamplingParams."""
        from megatron.core.inference.sampling_params import SamplingParams

        greedy = self.temperature == 0
        return SamplingParams(
            temperature=1.0 if greedy else self.temperature,
            top_k=1 if greedy else self.top_k,
            top_p=0.0 if greedy else self.top_p,
            num_tokens_to_generate=new_tokens,
            termination_id=-1 if ignore_eos else None,  # None: the model's
        )


@dataclass(frozen=True)
class Job:
    """What `helix generate` was asked for."""

    model: str
    """What the user calls it."""
    checkpoint: Path
    """Megatron's, of that model."""
    layout: models.Layout
    prompts: list[str]
    tokens: list[list[int]]
    """Of the prompts."""
    new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    tokenizer: str | None = None
    """Folder of a tokenizer other than the model's."""
    ignore_eos: bool = False
    at_once: int = 64
    """Prompts generated for at the same time."""
    block_tokens: int | None = None
    """Of a block of the cache."""
    as_json: bool = False
    steps: Steps = EAGER

    @property
    def sequence(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(map(len, self.tokens)) + self.new_tokens


def rank_generate(terminal: TextIO, job: Job) -> None:
    """What a rank does; rank 0 streams and reports."""
    first = os.environ.get("RANK", "0") == "0"
    model, tokenizer = models.load(
        job.checkpoint, job.layout, job.tokenizer, job.sequence, ["--seed", str(job.sampling.seed)]
    )
    found = answer(model, tokenizer, job, None if job.as_json or not first else terminal)
    if first:
        print(json.dumps(found) if job.as_json else report.text_report(found), file=terminal, flush=True)


def answer(model: Any, tokenizer: Any, job: Job, terminal: TextIO | None = None) -> dict[str, Any]:
    """All answers, with their text streamed to `terminal`, and what is to be reported."""
    import torch

    from helix_megatron.generate import engine as engines

    model.config.inference_sampling_seed = job.sampling.seed
    block = job.block_tokens or engines.default_block_tokens(model.config, job.layout.on_host)
    size = engines.size_for([len(tokens) for tokens in job.tokens], job.new_tokens, job.at_once, block)
    stop = models.stop_tokens(job.checkpoint, tokenizer, job.tokenizer)
    with torch.inference_mode():
        engine = engines.build(model, tokenizer, size)
        engines.end_at_tokens(engine, stop)
        show = None if terminal is None else report.AnswerPrinter(terminal, tokenizer, len(job.prompts), stop)
        answers, seconds, peak = serve_all(engine, job, show)
    refuse_disagreement(answers)
    return {
        "model": job.model,
        "tensor_parallel_size": job.layout.tensor_parallel,
        "attention": report.describe_attention(model.config, job.layout.attention),
        "dtype": job.layout.dtype,
        "device": "host" if job.layout.on_host else torch.cuda.get_device_name(),
        "steps": asdict(job.steps),
        **report.summarise(answers, seconds, tokenizer, stop),
        "kv_cache": report.kv_report(engine, peak),
    }


def serve_all(engine: Any, job: Job, show: Any = None) -> tuple[list[report.Answer], float, int]:
    """Answers to all prompts, the seconds it took, and the largest number of cache blocks in use."""
    import torch

    from helix_megatron.generate.engine import generated_tokens

    answers = [report.Answer(text, len(tokens)) for text, tokens in zip(job.prompts, job.tokens, strict=True)]
    allocator = engine.context.kv_block_allocator
    waiting, peak, start = deque(enumerate(job.tokens)), 0, time.perf_counter()
    while waiting or engine.requests:
        while waiting and len(engine.requests) < job.at_once:
            number, tokens = waiting.popleft()
            engine.add_request(number, tokens, job.sampling.params(job.new_tokens, job.ignore_eos))
        result = engine.step_modern()
        torch.cuda.synchronize()
        now = time.perf_counter() - start
        ended = {record.request_id: record for record in result["finished_request_records"]}
        running = {number: engine.requests[number].record for number in result["active_request_ids"]}
        block = engine.context.block_size_tokens
        held = sum(-(-_cached_tokens(record) // block) for record in ended.values())
        peak = max(peak, allocator.get_total_used() + held)
        for number, record in {**running, **ended}.items():
            new = generated_tokens(record)[len(answers[number].tokens) :]
            answers[number].tokens += new
            answers[number].times += [now] * len(new)
            if show is not None:
                show.step(number, new, number in ended)
    return answers, time.perf_counter() - start, peak


def _cached_tokens(record: Any) -> int:
    """Tokens that a request held when it ended: the last one was never put into the cache."""
    request = record.requests[-1]
    return len(request.prompt_tokens) + len(request.generated_tokens) - 1


def refuse_disagreement(answers: list[report.Answer]) -> None:
    """RuntimeError when the ranks have not chosen the same tokens. One gather of a hash each."""
    import torch.distributed as dist

    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hash(tuple(tuple(answer.tokens) for answer in answers)))
    if len(set(digests)) > 1:
        raise RuntimeError("the ranks have chosen different tokens; please report this with the command used")
