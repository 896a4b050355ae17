"""A real model's answers from a sharded KV cache against transformers: the same tokens, the same logits.

    python -m helix_megatron.generate.check --model SmolLM2.gguf --tp 1 2 3 4 6 8 --out results.json

A batch of prompts of different lengths is generated for greedily, in float32 on the host. T = 1 is vanilla
Megatron, every other T Helix on the grid it chooses. Every step's logits are compared, not only the tokens:
`sequence` in Megatron's dynamic engine, `dim` in its static context (where m > 1), in which a sequence that
is still inside its prompt takes the prompt's next token instead of the chosen one. At the end, a sentence
hidden in a long text is asked for (`--needle-tokens 0` leaves that out).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helix_megatron.generate import generate, model
from helix_megatron.generate.engine import build, default_block_tokens, size_for

LENGTHS = (2, 5, 9, 16, 23, 31, 40, 57)
DEPTHS = (0.1, 0.5, 0.9)
NEEDLE = " The secret number of the old library is 7481. "
QUESTION = "\n\nQuestion: What is the secret number of the old library?\nAnswer: The secret number is"
TOLERANCE = 5e-4


@dataclass(frozen=True)
class Reference:
    """What transformers generates.

    Args:
        prompts: tokens.
        answers: greedy tokens, equally many for each.
        logits_file: .npy of [prompts, new tokens, V] float32, before each token.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits_file: str


@torch.no_grad()
def reference(theirs: Any, prompts: list[list[int]], new_tokens: int, logits_file: Path) -> Reference:
    """Run transformers, prompt by prompt, with its own cache; an end of text is a token like another."""
    answers, logits = [], []
    for prompt in prompts:
        out = theirs(torch.tensor([prompt]), use_cache=True)
        steps = [out.logits[0, -1]]
        for _ in range(new_tokens - 1):
            token = steps[-1].argmax().reshape(1, 1)
            out = theirs(token, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, -1])
        answers.append([int(step.argmax()) for step in steps])
        logits.append(torch.stack(steps).float().numpy())
    np.save(logits_file, np.stack(logits))
    return Reference(prompts, answers, str(logits_file))


class _Comparison:
    """The largest difference of a logit from the reference's, over the steps up to the first other token."""

    def __init__(self, expected: Reference):
        self._expected, self._theirs = expected, np.load(expected.logits_file, mmap_mode="r")
        self._steps = [0] * len(expected.prompts)
        self.worst = 0.0
        self.tokens: list[list[int]] = [[] for _ in expected.prompts]

    def see(self, requests: list[int], logits: torch.Tensor) -> None:
        """The logits [requests, V] of a step."""
        for request, row in zip(requests, logits, strict=True):
            step = len(self.tokens[request])
            same_so_far = self.tokens[request] == self._expected.answers[request][:step]
            if step < self._theirs.shape[1] and same_so_far:
                theirs = torch.from_numpy(self._theirs[request, step].copy())
                self.worst = max(self.worst, float((row[: len(theirs)].float() - theirs).abs().max()))
            self.tokens[request].append(int(row.argmax()))


def dynamic(loaded: tuple[Any, Any], job: generate.Job, expected: Reference) -> dict[str, Any]:
    """In a rank: the batch through the dynamic engine."""
    comparison = _Comparison(expected)
    network, tokenizer = loaded
    block = default_block_tokens(network.config, on_host=True)
    size = size_for([len(tokens) for tokens in job.tokens], job.new_tokens, job.at_once, block)
    with torch.inference_mode():
        engine = build(network, tokenizer, size, comparison.see)
        answers, seconds, _ = generate.serve_all(engine, job)
    generate.agree(answers)
    return {
        "tokens": [answer.tokens for answer in answers],
        "max_difference": comparison.worst,
        "seconds": seconds,
        "kv_bytes_per_token": generate.kv_report(engine, 0)["bytes_per_token_per_rank"],
    }


def static(network: Any, expected: Reference) -> dict[str, Any]:
    """In a rank: the batch in one static context, its prompts fed token by token after the shortest one's."""
    from megatron.core.inference.contexts import StaticInferenceContext

    comparison = _Comparison(expected)
    prompts, new = expected.prompts, len(expected.answers[0])
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    context = StaticInferenceContext(len(prompts), longest + new)
    tokens = torch.tensor([prompt[:shortest] for prompt in prompts])
    started = time.perf_counter()
    for end in range(shortest, longest + new):  # `end` tokens of every sequence are known to the model
        begin = context.sequence_len_offset
        positions = torch.arange(begin, end).expand(len(prompts), -1)
        with torch.no_grad():
            logits = network(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        context.sequence_len_offset = end
        context.enable_decode_mode()
        answering = [number for number, prompt in enumerate(prompts) if len(prompt) <= end]
        comparison.see(answering, logits[answering, -1])
        following = [
            prompt[end] if end < len(prompt) else comparison.tokens[number][-1]
            for number, prompt in enumerate(prompts)
        ]
        tokens = torch.tensor(following)[:, None]
    cached = sum(cache.nbytes for pair in context.key_value_memory_dict.values() for cache in pair)
    return {
        "tokens": [tokens[:new] for tokens in comparison.tokens],
        "max_difference": comparison.worst,
        "seconds": time.perf_counter() - started,
        "kv_bytes_per_token": cached / len(prompts) / (longest + new),
    }


def rank_check(job: generate.Job, expected: Reference, dim: bool, needles: generate.Job | None) -> dict:
    """In a rank: what is asked for with one loaded model."""
    sequence = max(job.sequence, needles.sequence if needles else 0)
    loaded = model.load(job.checkpoint, job.layout, None, sequence)
    if dim:
        return {"dim": static(loaded[0], expected)}
    found = {"sequence": dynamic(loaded, job, expected)}
    if needles:
        found["needles"] = [output["tokens"] for output in generate.answer(*loaded, needles)["outputs"]]
    return found


def check(
    job: generate.Job, expected: Reference, dim: bool = False, needles: generate.Job | None = None
) -> dict[str, Any]:
    """Rank 0's findings for one size and cache; the ranks have agreed on the tokens."""
    from helix_megatron.launch import run_ranks

    return run_ranks(rank_check, job.layout.tensor_parallel, job, expected, dim, needles, timeout_s=7200)[0]


def jobs_for(
    checkpoint: Path, tp: int, prompts: list[list[int]], new_tokens: int, dim: bool = False
) -> generate.Job:
    """The job of a size: vanilla at T = 1."""
    more = ("--helix-kv-cache", "dim") if dim else ()
    layout = model.Layout(tp, "helix" if tp > 1 else "megatron", "float32", True, more)
    texts = [""] * len(prompts)
    return generate.Job("", checkpoint, layout, texts, prompts, new_tokens, ignore_eos=True)


def needle_prompts(tokenizer: Any, text: list[int], total: int) -> list[list[int]]:
    """Prompts of `total` tokens: the text with the needle at each depth, and the question."""
    needle, question = tokenizer.tokenize(NEEDLE), tokenizer.tokenize(QUESTION)
    hay = text[: total - len(needle) - len(question)]
    assert len(hay) + len(needle) + len(question) == total, "the text is too short"
    cuts = [int(depth * len(hay)) for depth in DEPTHS]
    return [[*hay[:cut], *needle, *hay[cut:], *question] for cut in cuts]


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 when anything differs."""
    from helix_megatron.convert.check import open_model, text_tokens

    parser = argparse.ArgumentParser(prog="python -m helix_megatron.generate.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder or .gguf")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--no-dim", action="store_true", help="leave the dim cache out")
    parser.add_argument("--needle-tokens", type=int, default=4096, help="0: no needle")
    parser.add_argument("--needle-tp", type=int, nargs="+", help="sizes of the needle (default: all)")
    parser.add_argument("--cache-dir", type=Path, default=model.default_cache())
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    options = parser.parse_args(argv)
    checkpoint = model.prepared(options.model, "float32", options.cache_dir)
    tokenizer = model.open_tokenizer(checkpoint, None)
    theirs, their_tokenizer = open_model(options.model)
    text = text_tokens(their_tokenizer, max(options.needle_tokens, 1024))
    starts = np.cumsum([0, *LENGTHS])
    prompts = [text[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]
    hidden = needle_prompts(tokenizer, text, options.needle_tokens) if options.needle_tokens else []
    rows, good, needle_of_1 = [], True, None
    with tempfile.TemporaryDirectory(prefix="helix-check-") as folder:
        expected = reference(theirs, prompts, options.new_tokens, Path(folder, "logits.npy"))
        del theirs
        print(f"transformers: {len(prompts)} prompts of {LENGTHS} tokens, {options.new_tokens} new each")
        for tp in options.tp:
            needles = None
            if hidden and tp in (options.needle_tp or options.tp):
                needles = replace(jobs_for(checkpoint, tp, hidden, 12), at_once=1)
            job = jobs_for(checkpoint, tp, prompts, options.new_tokens)
            found = check(job, expected, needles=needles)
            if tp > 1 and not options.no_dim and not _is_megatron(checkpoint, tp):
                dim_job = jobs_for(checkpoint, tp, prompts, options.new_tokens, dim=True)
                found |= check(dim_job, expected, dim=True)
            for kind in ("sequence", "dim"):
                if kind in found:
                    row = found[kind]
                    same = row.pop("tokens") == expected.answers
                    fine = same and row["max_difference"] <= TOLERANCE
                    rows.append({"tp": tp, "cache": kind, "same_tokens": same, **row})
                    good &= fine
                    print(
                        f"T={tp} {kind}: tokens {'the same' if same else 'DIFFERENT'}, logits differ by at "
                        f"most {row['max_difference']:.1e}, {row['kv_bytes_per_token']:g} KV bytes a token "
                        f"and rank, {row['seconds']:.0f} s: {'equal' if fine else 'NOT EQUAL'}",
                        flush=True,
                    )
            if needles:
                answers = [tokenizer.detokenize(tokens) for tokens in found["needles"]]
                needle_of_1 = needle_of_1 or found["needles"]
                same = found["needles"] == needle_of_1
                good &= same
                rows.append({"tp": tp, "needle_answers": answers, "same_as_first": same})
                print(f"T={tp} needle: {answers} {'the same' if same else 'DIFFERENT'}", flush=True)
    if options.out:
        settings = {"lengths": LENGTHS, "new_tokens": options.new_tokens, "tolerance": TOLERANCE}
        settings |= {"model": options.model.name, "needle_tokens": options.needle_tokens, "depths": DEPTHS}
        options.out.write_text(
            json.dumps({"settings": settings, "rows": rows, "equal": good}, indent=1) + "\n"
        )
    return 0 if good else 1


def _is_megatron(checkpoint: Path, tp: int) -> bool:
    """Whether Helix's grid at this size has m = 1: then the cache is Megatron's, of neither kind."""
    from helix_megatron.config import HelixConfig

    args = model.Checkpoint(checkpoint).args
    heads = args.num_attention_heads, args.num_query_groups, args.kv_channels
    return HelixConfig(rotary_percent=args.rotary_percent).resolve(*heads, tp).grid.dim_parallel_size == 1


if __name__ == "__main__":
    from helix_megatron.generate.check import main as _main  # ranks import its functions by name

    sys.exit(_main())
