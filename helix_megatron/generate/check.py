"""A real model's answers from a sharded KV cache against transformers: the same tokens, the same logits.

    python -m helix_megatron.generate.check --model SmolLM2.gguf --tp 1 2 3 4 6 8 --out results.json

A batch of prompts of different lengths is generated for greedily by Megatron's dynamic engine, in float32 on
the host. T = 1 is vanilla Megatron, every other T Helix on the grid it chooses, with KV cache `sequence` and,
where m > 1, `dim`. Every step's logits are compared, not only the tokens. Then a sentence hidden in a long
text is asked for (`--needle-tokens 0` leaves that out).

Every finding goes to the file `--out` at once, and one that is there already is not made again: a run that
was interrupted goes on where it stopped. Findings of another code, or of other versions, are refused there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helix_megatron.generate import generate, model, report
from helix_megatron.generate.engine import build, default_block_tokens, size_for

LENGTHS = (2, 5, 9, 16, 23, 31, 40, 57)
DEPTHS = (0.1, 0.5, 0.9)
NEEDLE = " The secret number of the old library is 7481. "
QUESTION = "\n\nQuestion: What is the secret number of the old library?\nAnswer: The secret number is"
NEEDLE_TOKENS = 12
"""Of the answer."""
TOLERANCE = 5e-4
KINDS = ("sequence", "dim", "needle")


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
        self.worst = 0.0
        self.tokens: list[list[int]] = [[] for _ in expected.prompts]

    def see(self, requests: list[int], logits: torch.Tensor) -> None:
        """The logits [requests, V] of a step."""
        for request, row in zip(requests, logits, strict=True):
            step = len(self.tokens[request])
            same_so_far = self.tokens[request] == self._expected.answers[request][:step]
            if step < self._theirs.shape[1] and same_so_far:
                theirs = torch.from_numpy(self._theirs[request, step].copy())
                difference = float((row[: len(theirs)].float() - theirs).abs().max())
                self.worst = max(self.worst, math.inf if math.isnan(difference) else difference)
            self.tokens[request].append(int(row.argmax()))


def run_dynamic_engine(loaded: tuple[Any, Any], job: generate.Job, expected: Reference) -> dict[str, Any]:
    """In a rank: the batch through the dynamic engine."""
    comparison = _Comparison(expected)
    network, tokenizer = loaded
    block = default_block_tokens(network.config, on_host=True)
    size = size_for([len(tokens) for tokens in job.tokens], job.new_tokens, job.at_once, block)
    with torch.inference_mode():
        engine = build(network, tokenizer, size, comparison.see)
        answers, seconds, _ = generate.serve_all(engine, job)
    generate.refuse_disagreement(answers)
    return {
        "tokens": [answer.tokens for answer in answers],
        "max_difference": comparison.worst,
        "seconds": seconds,
        "kv_bytes_per_token": report.kv_report(engine, 0)["bytes_per_token_per_rank"],
    }


def rank_check(job: generate.Job, expected: Reference | None, kind: str) -> dict[str, Any]:
    """In a rank: one finding. `kind` is one of KINDS; a needle needs no reference."""
    loaded = model.load(job.checkpoint, job.layout, None, job.sequence)
    if kind == "needle":
        return {"tokens": [output["tokens"] for output in generate.answer(*loaded, job)["outputs"]]}
    assert expected is not None
    return run_dynamic_engine(loaded, job, expected)


def check(job: generate.Job, expected: Reference | None, kind: str) -> dict[str, Any]:
    """Rank 0's finding for one size; the ranks have agreed on the tokens."""
    from helix_megatron.host.launcher import run_ranks

    return run_ranks(rank_check, job.layout.tensor_parallel, job, expected, kind, timeout_s=7200)[0]


def jobs_for(
    checkpoint: Path, tp: int, prompts: list[list[int]], new_tokens: int, dim: bool = False
) -> generate.Job:
    """The job of a size: vanilla at T = 1."""
    more = ("--helix-kv-cache", "dim" if dim else "sequence") if tp > 1 else ()
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


class Results:
    """The findings so far, in a file when there is one.

    Args:
        path: JSON; None keeps nothing.
        settings: of the run. Findings of other settings are not mixed with these: ValueError.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != self._settings:
                raise ValueError(
                    f"{path} holds findings of {found['settings']}, and this run is of {self._settings}; "
                    "choose another --out, or remove the file"
                )
            self.rows = found["rows"]

    def has(self, tp: int, kind: str) -> bool:
        """Whether that finding is there."""
        return any((row["tp"], row["kind"]) == (tp, kind) for row in self.rows)

    @property
    def equal(self) -> bool:
        """Whether there are findings and all are what they should be; needles are compared with the smallest
        size's."""
        needles = [row["tokens"] for row in self.rows if row["kind"] == "needle"]
        batches = [row["equal"] for row in self.rows if row["kind"] != "needle"]
        return bool(self.rows) and all(batches) and all(tokens == needles[0] for tokens in needles)

    def add(self, row: dict[str, Any]) -> None:
        """Take a finding and write all of them."""
        self.rows = sorted([*self.rows, row], key=lambda row: (KINDS.index(row["kind"]), row["tp"]))
        if self._path is not None:
            document = {"settings": self._settings, "equal": self.equal, "rows": self.rows}
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            partial.replace(self._path)


def judge(job: generate.Job, expected: Reference | None, kind: str) -> dict[str, Any]:
    """check(), and whether it is what it should be; of a needle, Results says that."""
    row = {"tp": job.layout.tensor_parallel, "kind": kind, **check(job, expected, kind)}
    if expected is not None:
        row["same_tokens"] = row.pop("tokens") == expected.answers
        row["equal"] = row["same_tokens"] and row["max_difference"] <= TOLERANCE
    return row


def _line(row: dict[str, Any]) -> str:
    if row["kind"] == "needle":
        return f"T={row['tp']} needle: {row['answers']}"
    return (
        f"T={row['tp']} {row['kind']}: tokens {'the same' if row['same_tokens'] else 'DIFFERENT'}, logits "
        f"differ by at most {row['max_difference']:.1e}, {row['kv_bytes_per_token']:g} KV bytes a token and "
        f"rank, {row['seconds']:.0f} s: {'equal' if row['equal'] else 'NOT EQUAL'}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 when anything differs."""
    from helix_megatron.convert.check import open_model, text_tokens
    from helix_megatron.measure import machine

    parser = argparse.ArgumentParser(prog="python -m helix_megatron.generate.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder or .gguf")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to find out")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--needle-tokens", type=int, default=4096, help="0: no needle")
    parser.add_argument("--cache-dir", type=Path, default=model.default_cache())
    parser.add_argument("--out", type=Path, help="JSON file of the results; what it holds is not done again")
    options = parser.parse_args(argv)
    settings = {"model": options.model.name, "lengths": LENGTHS, "new_tokens": options.new_tokens}
    settings |= {"tolerance": TOLERANCE, "needle_tokens": options.needle_tokens, "depths": DEPTHS}
    settings |= {"source": machine.source_digest(), "versions": machine.versions()}
    results = Results(options.out, settings)
    checkpoint = model.prepare_checkpoint(options.model, "float32", options.cache_dir)
    wanted = [
        (tp, kind)
        for tp in options.tp
        for kind in options.kinds
        if not results.has(tp, kind)
        and (kind != "needle" or options.needle_tokens)
        and (kind != "dim" or not _is_megatron(checkpoint, tp))
    ]
    tokenizer = model.open_tokenizer(checkpoint, None)
    theirs, their_tokenizer = open_model(options.model)
    text = text_tokens(their_tokenizer, max(options.needle_tokens, 1024))
    starts = np.cumsum([0, *LENGTHS])
    prompts = [text[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]
    with tempfile.TemporaryDirectory(prefix="helix-check-") as folder:
        expected = None
        if any(kind != "needle" for _, kind in wanted):
            expected = reference(theirs, prompts, options.new_tokens, Path(folder, "logits.npy"))
            print(
                f"transformers: {len(prompts)} prompts of {LENGTHS} tokens, {options.new_tokens} new each",
                flush=True,
            )
        del theirs
        for tp, kind in wanted:
            if kind == "needle":
                hidden = needle_prompts(tokenizer, text, options.needle_tokens)
                job = replace(jobs_for(checkpoint, tp, hidden, NEEDLE_TOKENS), at_once=1)
                row = judge(job, None, kind)
                row["answers"] = [tokenizer.detokenize(tokens) for tokens in row["tokens"]]
            else:
                row = judge(
                    jobs_for(checkpoint, tp, prompts, options.new_tokens, kind == "dim"), expected, kind
                )
            results.add(row)
            print(_line(row), flush=True)
    print(f"{len(results.rows)} findings: {'equal' if results.equal else 'NOT EQUAL'}")
    return 0 if results.equal else 1


def _is_megatron(checkpoint: Path, tp: int) -> bool:
    """Whether Helix's grid at this size has m = 1: then the cache is Megatron's, of neither kind."""
    from helix_megatron.partition.config import HelixConfig

    args = model.Checkpoint(checkpoint).args
    heads = args.num_attention_heads, args.num_query_groups, args.kv_channels
    return HelixConfig(rotary_percent=args.rotary_percent).resolve(*heads, tp).grid.dim_parallel_size == 1


if __name__ == "__main__":
    from helix_megatron.generate.check import main as _main  # ranks import its functions by name

    sys.exit(_main())
