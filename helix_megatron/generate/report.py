"""What is said of answers: their text as it comes, and the report of times and of the cache after them."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean
from typing import Any, TextIO

from helix_megatron import compat
from helix_megatron.generate.graphs import Steps
from helix_megatron.generate.kv_bytes import readable
from helix_megatron.generate.prompts import TextStream


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


class AnswerPrinter:
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


def summarise(
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


def describe_attention(config: Any, impl: str) -> str:
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
            f"{report['dtype']}, {report['device']}; {Steps(**report['steps'])}",
            f"{count} prompt{'s' * (count > 1)}, {made} tokens in {report['seconds']:.2f} s: TTFT "
            f"{1e3 * report['ttft_s']:.0f} ms, TPOT {tpot}, {report['tokens_per_s']:.1f} tokens/s",
            f"KV cache at its fullest, {kv['peak_blocks']} blocks of {kv['block_tokens']} tokens: "
            f"{readable(kv['peak_bytes_per_rank'])} on each rank, 1/{share:.4g} of "
            f"{readable(kv['peak_bytes_whole_model'])}; Megatron's replication: "
            f"{readable(kv['peak_bytes_per_rank_megatron'])} on each rank",
        ]
    )
