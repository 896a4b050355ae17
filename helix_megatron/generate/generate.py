"""`helix generate`: prompts through the dynamic engine, with what a user and a benchmark want to know.

Times are taken on rank 0 around the engine's steps: TTFT, from the moment all prompts are handed over to the
first token of a prompt; TPOT, the mean time between the tokens of an answer after its first.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, TextIO

from helix_megatron import compat
from helix_megatron.generate import model as models
from helix_megatron.generate.kv_bytes import readable
from helix_megatron.generate.prompts import TextStream
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

    @property
    def sequence(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(map(len, self.tokens)) + self.new_tokens


@dataclass
class Answer:
    """One prompt's way."""

    prompt: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Seconds from the start, of every token."""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.times[0]

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None


def rank_generate(terminal: TextIO, job: Job) -> None:
    """What a rank does; rank 0 streams and reports."""
    first = os.environ.get("RANK", "0") == "0"
    model, tokenizer = models.load(
        job.checkpoint, job.layout, job.tokenizer, job.sequence, ["--seed", str(job.sampling.seed)]
    )
    report = answer(model, tokenizer, job, None if job.as_json or not first else terminal)
    if first:
        print(json.dumps(report) if job.as_json else text_report(report), file=terminal, flush=True)


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
        show = None if terminal is None else _AnswerPrinter(terminal, tokenizer, len(job.prompts), stop)
        answers, seconds, peak = serve_all(engine, job, show)
    refuse_disagreement(answers)
    return {
        "model": job.model,
        "tensor_parallel_size": job.layout.tensor_parallel,
        "attention": _attention(model.config, job.layout.attention),
        "dtype": job.layout.dtype,
        "device": "host" if job.layout.on_host else torch.cuda.get_device_name(),
        **summary(answers, seconds, tokenizer, stop),
        "kv_cache": kv_report(engine, peak),
    }


def refuse_vocabulary(prompts: list[list[int]], top_k: int, vocabulary: int) -> None:
    """ValueError for a prompt with a token that the model has not, or for more top tokens than it has."""
    if top_k >= vocabulary:
        raise ValueError(f"--top-k {top_k}: this model has {vocabulary} tokens; give fewer, or 0 for all.")
    for number, tokens in enumerate(prompts):
        if tokens and not 0 <= max(tokens) < vocabulary:
            raise ValueError(
                f"prompt {number} has token {max(tokens)}, this model has {vocabulary}: the tokenizer is "
                "another model's (--tokenizer)."
            )


def refuse_too_long(prompts: list[list[int]], new_tokens: int, limit: int) -> None:
    """ValueError for the first prompt of no token, or one that leaves no room in the model's positions.

    Args:
        prompts: their tokens.
        new_tokens: of each answer.
        limit: positions that the model knows.
    """
    for number, tokens in enumerate(prompts):
        if not tokens:
            raise ValueError(f"prompt {number} has no tokens; a model needs one to go on from.")
        if len(tokens) + new_tokens > limit:
            raise ValueError(
                f"prompt {number} has {len(tokens)} tokens, with --max-new-tokens {new_tokens} more than the "
                f"{limit} positions this model knows; shorten the prompt or generate fewer."
            )


def serve_all(engine: Any, job: Job, show: Any = None) -> tuple[list[Answer], float, int]:
    """Answers to all prompts, the seconds it took, and the largest number of cache blocks in use."""
    import torch

    from helix_megatron.generate.engine import generated_tokens

    answers = [Answer(text, len(tokens)) for text, tokens in zip(job.prompts, job.tokens, strict=True)]
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


class _AnswerPrinter:
    """Prints answers in the order of their prompts, each as it comes."""

    def __init__(self, terminal: TextIO, tokenizer: Any, count: int, stop: tuple[int, ...]):
        self._terminal, self._headings, self._stop = terminal, count > 1, stop
        decode = lambda tokens: tokenizer.detokenize(tokens, skip_special_tokens=True)  # noqa: E731
        self._streams = [TextStream(decode) for _ in range(count)]
        self._text = [""] * count
        self._ended = [False] * count
        self._current = -1
        self._next()

    def step(self, number: int, tokens: list[int], ended: bool) -> None:
        """New tokens of an answer."""
        stream = self._streams[number]
        self._text[number] += "".join(stream.push(token) for token in tokens if token not in self._stop)
        if ended:
            self._text[number] += stream.close()
            self._ended[number] = True
        while self._current < len(self._text):
            self._terminal.write(self._text[self._current])
            self._text[self._current] = ""
            self._terminal.flush()
            if not self._ended[self._current]:
                return
            self._terminal.write("\n")
            self._next()

    def _next(self) -> None:
        self._current += 1
        if self._headings and self._current < len(self._text):
            self._terminal.write(f"--- {self._current}\n")


def refuse_disagreement(answers: list[Answer]) -> None:
    """RuntimeError when the ranks have not chosen the same tokens. One gather of a hash each."""
    import torch.distributed as dist

    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hash(tuple(tuple(answer.tokens) for answer in answers)))
    if len(set(digests)) > 1:
        raise RuntimeError("the ranks have chosen different tokens; please report this with the command used")


def summary(
    answers: list[Answer], seconds: float, tokenizer: Any, stop: tuple[int, ...]
) -> dict[str, Any]:
    """What the report says of the answers; `stop` are the tokens that end one."""
    outputs = []
    for answer in answers:
        stopped = bool(answer.tokens) and answer.tokens[-1] in stop
        kept = answer.tokens[:-1] if stopped else answer.tokens
        outputs.append(
            {
                "prompt": answer.prompt,
                "text": tokenizer.detokenize(kept, skip_special_tokens=True),
                "tokens": answer.tokens,
                "prompt_tokens": answer.prompt_tokens,
                "finish_reason": "stop" if stopped else "length",
                "ttft_s": answer.ttft_s,
                "tpot_s": answer.tpot_s,
            }
        )
    later = [answer.tpot_s for answer in answers if answer.tpot_s is not None]
    return {
        "outputs": outputs,
        "seconds": seconds,
        "ttft_s": mean(answer.ttft_s for answer in answers),
        "tpot_s": mean(later) if later else None,
        "tokens_per_s": sum(len(answer.tokens) for answer in answers) / seconds,
    }


def kv_report(engine: Any, peak_blocks: int) -> dict[str, Any]:
    """The cache: what this rank's engine holds for a token, asked of its buffer; and what it is part of."""
    from helix_megatron.generate.engine import kv_bytes

    context, config = engine.context, engine.controller.inference_wrapped_model.model.config
    blocks = compat.cache_blocks(context.kv_block_allocator)
    one = context.memory_buffer.nbytes // blocks
    kv, block = kv_bytes(config), context.block_size_tokens
    replicated = kv.replicated_bytes(config.tensor_model_parallel_size, block)
    return {
        "block_tokens": block,
        "peak_blocks": peak_blocks,
        "bytes_per_token_per_rank": one / block,
        "bytes_per_token_whole_model": kv.total_bytes(),
        "bytes_per_token_per_rank_megatron": replicated / block,
        "peak_bytes_per_rank": one * peak_blocks,
        "peak_bytes_whole_model": kv.total_bytes(block) * peak_blocks,
        "peak_bytes_per_rank_megatron": replicated * peak_blocks,
    }


def _attention(config: Any, impl: str) -> str:
    from helix_megatron.megatron import integrate
    from helix_megatron.partition.derived import plan_for

    if impl == "megatron" or integrate._active is None:
        return "megatron"
    return "helix " + plan_for(integrate._active, config, config.tensor_model_parallel_size).describe()


def text_report(report: dict[str, Any]) -> str:
    """The lines under the answers."""
    kv, count = report["kv_cache"], len(report["outputs"])
    made = sum(len(output["tokens"]) for output in report["outputs"])
    tpot = "none (one token each)" if report["tpot_s"] is None else f"{1e3 * report['tpot_s']:.1f} ms"
    share = kv["peak_bytes_whole_model"] / kv["peak_bytes_per_rank"]
    return "\n".join(
        [
            "",
            f"{report['attention']}, tensor-parallel size {report['tensor_parallel_size']}, "
            f"{report['dtype']}, {report['device']}",
            f"{count} prompt{'s' * (count > 1)}, {made} tokens in {report['seconds']:.2f} s: TTFT "
            f"{1e3 * report['ttft_s']:.0f} ms, TPOT {tpot}, {report['tokens_per_s']:.1f} tokens/s",
            f"KV cache at its fullest, {kv['peak_blocks']} blocks of {kv['block_tokens']} tokens: "
            f"{readable(kv['peak_bytes_per_rank'])} on each rank, 1/{share:.4g} of "
            f"{readable(kv['peak_bytes_whole_model'])}; Megatron's replication: "
            f"{readable(kv['peak_bytes_per_rank_megatron'])} on each rank",
        ]
    )
