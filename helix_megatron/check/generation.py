"""Text from a sharded KV cache: the greedy tokens of transformers, from a tiny random Llama.

transformers computes on the CPU in fp32. The engine does so on a host; on a GPU it computes in bf16, from
weights that are bf16 for both. There the greedy token of a random model may be a tie: the answer must agree
with transformers' up to a step whose two greatest logits are nearer than bf16 can tell.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from helix_megatron.check.rows import NO_TIME, Place, Rows, first_line
from helix_megatron.host.launcher import RankError

PROMPTS = (
    "hello there",
    "a",
    "é, and a third prompt, which is longer than one block of sixty-four tokens; yes",
)
NEW = 12
SIZES = (
    (4, "sequence", False, True),
    (4, "sequence", True, True),
    (4, "dim", False, False),
    (1, "", False, False),
    (2, "", False, False),
    (2, "", True, False),
    (6, "sequence", False, False),
)
"""Ranks, KV cache, CUDA graphs (on GPUs alone), whether `--quick` has it; 6 heads and 2 KV heads: T = 4 is
2x2, T = 1 and 2 have m = 1."""


def check(rows: Rows, place: Place) -> None:
    """transformers' tokens, then the engine's at each size."""
    missing = [name for name in ("transformers", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        rows.add("all", "skipped", f"{missing[0]} is not installed: pip install 'helix-megatron[convert]'")
        return
    from helix_megatron import compat

    if not compat.megatron().dynamic_engine:
        rows.add("all", "skipped", "this megatron-core has no dynamic engine that Helix serves")
        return
    from helix_megatron.check import tiny_model
    from helix_megatron.generate import model

    with tempfile.TemporaryDirectory(prefix="helix-check-") as folder:
        source = tiny_model.make(Path(folder, "llama"), half=not place.on_host)
        expected, margins = greedy(source)
        checkpoint = model.prepare_checkpoint(source, dtype_of(place), Path(folder))
        tokens = [tiny_model.tokenize(source, prompt) for prompt in PROMPTS]
        for ranks, cache, graphs, quick in SIZES:
            if (place.quick and not quick) or (place.on_host and graphs):
                continue
            name = f"T={ranks}{f', {cache} cache' if cache else ''}{', CUDA graphs' if graphs else ''}"
            if not place.has_time:
                rows.add(name, "skipped", NO_TIME)
                continue
            job = make_job(checkpoint, tokens, ranks, cache, place, graphs)
            try:
                found = place.run(rank_answers, ranks, job)[0]
            except RankError as error:
                print(error, flush=True)
                rows.add(name, *outcome_of(error))
                continue
            status, detail = judge(found, expected, margins, 0.0 if place.on_host else HALF_TIE)
            rows.add(name, status, f"{detail}; {place.words(ranks)}", tokens=found)


def outcome_of(error: RankError) -> tuple[str, str]:
    """(status, detail) of ranks that ended with an error: Megatron serves whole heads by flash-attn alone."""
    told = first_line(error)
    return "skipped" if "dynamic engine needs flash-attn" in told else "failed", told


HALF_TIE = 0.2
"""Logits of bf16 that are nearer than this may be equal: those of the model are about 3."""


def greedy(source: Path) -> tuple[list[list[int]], list[list[float]]]:
    """transformers' tokens for each prompt, and by how much each was the greatest logit."""
    import torch
    from transformers import AutoModelForCausalLM

    from helix_megatron.check import tiny_model

    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    answers, margins = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([tiny_model.tokenize(source, prompt)])
        answer: list[int] = []
        margin: list[float] = []
        for _ in range(NEW):
            with torch.no_grad():
                best = theirs(ids).logits[0, -1].topk(2)
            answer.append(int(best.indices[0]))
            margin.append(float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, best.indices[:1, None]], dim=1)
        answers.append(answer), margins.append(margin)
    return answers, margins


def judge(
    found: list[list[int]], expected: list[list[int]], margins: list[list[float]], tie: float
) -> tuple[str, str]:
    """(status, detail) of the answers; up to a step where the margin is not over `tie`, they must agree."""
    compared = 0
    for number, (mine, theirs, margin) in enumerate(zip(found, expected, margins, strict=True)):
        if len(mine) != len(theirs):
            return "failed", f"prompt {number} has {len(mine)} tokens, transformers {len(theirs)}"
        for step, (token, other) in enumerate(zip(mine, theirs)):
            if token != other and margin[step] > tie:
                return "failed", f"prompt {number}, token {step} is {token}, with transformers {other}"
            if token != other:
                break
            compared += 1
    if not compared:
        return "failed", "every answer begins with a tie: nothing was compared"
    return "ok", f"{compared} tokens of {len(found)} prompts as transformers"


def dtype_of(place: Place) -> str:
    """In which the engine computes."""
    return "float32" if place.on_host else "bfloat16"


def make_job(
    checkpoint: Path, tokens: list[list[int]], ranks: int, cache: str, place: Place, graphs: bool = False
) -> Any:
    """What `helix generate` would be asked for."""
    from helix_megatron.generate import generate, model
    from helix_megatron.generate.graphs import Steps

    more = ("--helix-kv-cache", cache) if cache else ()
    if graphs:
        more += Steps("local", "").flags(None, decode_only=True)
    layout = model.Layout(ranks, "helix", dtype_of(place), place.on_host, more)
    return generate.Job("tiny", checkpoint, layout, list(PROMPTS), tokens, NEW, ignore_eos=True)


def rank_answers(job: Any) -> list[list[int]]:
    """In a rank: the tokens of every prompt."""
    from helix_megatron.generate import generate, model

    loaded = model.load(job.checkpoint, job.layout, None, job.sequence)
    return [output["tokens"] for output in generate.answer(*loaded, job)["outputs"]]
