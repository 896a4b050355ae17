"""A converted model against transformers: the same logits, perplexity and greedy tokens, at any layout.

    python -m helix_megatron.convert.check --checkpoint OUT --hf MODEL --tp 1 2 4 8

Runs on the CPU (host mode), in float32, on English text that every Python carries. T = 1 is vanilla
Megatron; every other T is Helix on the grid it chooses.

Greedy tokens: transformers decodes N tokens after a prompt; Megatron gets prompt and tokens in one forward
pass, and the token it finds most likely after each must be the next one. For a causal model that is what
decoding token by token means, at a fraction of the time. `--decode` decodes with Megatron's KV cache too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HOST_FLAGS = """--transformer-impl local --attention-backend unfused --no-masked-softmax-fusion
    --no-rope-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm""".split()
HELIX_FLAGS = ["--attention-impl", "helix"]
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Reference:
    """What transformers computes.

    Args:
        tokens: the text, [s].
        logits_file: its logits, a .npy of [s, V] float32.
        perplexity: of tokens[1:] given those before.
        prompt: the first tokens of the text, [p].
        greedy: the tokens decoded after the prompt, [new].
    """

    tokens: list[int]
    logits_file: str
    perplexity: float
    prompt: list[int]
    greedy: list[int]


def open_model(source: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or GGUF file, by transformers alone, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **file)


def text_tokens(tokenizer: Any, count: int) -> list[int]:
    """The first `count` tokens of the Python language reference (`pydoc_data.topics`)."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return tokenizer(text[: 8 * count + 1000])["input_ids"][:count]


@torch.no_grad()
def reference(model: Any, tokens: list[int], new_tokens: int, logits_file: Path) -> Reference:
    """Run transformers on `tokens`; its logits go to `logits_file`."""
    ids = torch.tensor([tokens])
    logits = model(ids).logits[0].float()
    np.save(logits_file, logits.numpy())
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    prompt = tokens[:PROMPT_TOKENS]
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # a greedy end of text is a token like another here
        do_sample=False,
        repetition_penalty=1.0,
    )
    return Reference(tokens, str(logits_file), float(loss.exp()), prompt, out[0, len(prompt) :].tolist())


def model_flags(checkpoint: Path, tp: int, sequence: int, more: list[str] = ()) -> list[str]:
    """Flags that load a checkpoint in host mode: sizes by `--use-checkpoint-args`, which restores a part of
    what else the weights mean, and all of that as flags.
    """
    from helix_megatron.checkpoint import compatibility
    from helix_megatron.convert.torch_dist import Checkpoint

    args = Checkpoint(checkpoint).args
    own = compatibility.format_flags(compatibility.non_default_arguments(args))
    return [
        *HOST_FLAGS,
        *(HELIX_FLAGS if tp > 1 else []),
        *f"--load {checkpoint} --use-checkpoint-args --exit-on-missing-checkpoint".split(),
        *own,
        *f"--tensor-model-parallel-size {tp} --seq-length {sequence} --micro-batch-size 1".split(),
        *f"--tokenizer-type NullTokenizer --vocab-size {args.padded_vocab_size}".split(),
        *more,
    ]


def build_and_load(argv: list[str], refuse: Callable[[Any], None] | None = None) -> Any:
    """In a rank: the model that the flags describe, with the weights of `--load`, in eval mode.

    Args:
        refuse: called with the TransformerConfig before anything is built.
    """
    from helix_megatron import pretrain_gpt
    from helix_megatron.megatron import entry, integrate

    entry.use_built_helpers()
    integrate.install()
    sys.argv = ["check", *argv]
    config = pretrain_gpt.build_config()
    if refuse is not None:
        refuse(config.model.transformer)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    initialize_megatron()
    builder = config.model.get_builder_cls()(config.model)
    models = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    load_checkpoint(models, None, None)
    for model in models:
        model.eval()
    return models


@torch.no_grad()
def forward(model: Any, tokens: list[int]) -> Tensor:
    """Logits of this rank's part of the vocabulary, [s, V/T]."""
    ids = torch.tensor([tokens])
    return model(ids, torch.arange(len(tokens))[None], None)[0].float()


def next_tokens(logits: Tensor) -> list[int]:
    """The most likely token at every position, [s], from every rank's [s, V/T]. One all-gather of [s, 2]."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    best, index = logits.max(dim=-1)
    mine = torch.stack([best.double(), index.double() + group.rank() * logits.shape[-1]])
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(parts, mine, group=group)
    values = torch.stack(parts)  # [T, 2, s]
    winner = values[:, 0].argmax(dim=0)
    return values[:, 1].gather(0, winner[None])[0].long().tolist()


def rank_check(argv: list[str], expected: Reference, decode: bool) -> dict[str, Any]:
    """In a rank: how far this rank's results are from `expected`."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    models = build_and_load(argv)
    (model,) = models
    started = time.perf_counter()
    logits = forward(model, expected.tokens)
    seconds = time.perf_counter() - started
    rank, width = parallel_state.get_tensor_model_parallel_rank(), logits.shape[-1]
    theirs = np.load(expected.logits_file, mmap_mode="r")[:, rank * width : (rank + 1) * width]
    mine = logits[:, : theirs.shape[1]]  # padding of the vocabulary is not in transformers' logits
    worst = float((mine - torch.from_numpy(theirs.copy())).abs().max()) if theirs.shape[1] else 0.0
    labels = torch.tensor(expected.tokens[1:])
    loss = vocab_parallel_cross_entropy(logits[:-1, None].clone(), labels[:, None]).mean()
    found = next_tokens(forward(model, [*expected.prompt, *expected.greedy[:-1]]))
    result = {
        "max_difference": worst,
        "perplexity": float(loss.exp()),
        "greedy": found[len(expected.prompt) - 1 :],
        "forward_seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if decode:
        from helix_megatron.compare.decode import Session

        session = Session(models, torch.tensor([expected.prompt]), len(expected.greedy))
        result["decoded"] = [int(session.step()[0, 0]) for _ in expected.greedy]
    return result


def check(
    checkpoint: Path,
    tp: int,
    expected: Reference,
    decode: bool = False,
    more: list[str] = (),
    timeout_s: float = 1800,
) -> dict[str, Any]:
    """Compare a checkpoint at tensor-parallel size `tp` with transformers.

    Args:
        checkpoint: a converted model.
        expected: from `reference`.
        decode: decode token by token with a KV cache as well (slow on the CPU).
        more: further Megatron and Helix flags.

    Returns:
        max_difference (of logits, over all ranks), perplexity, greedy (tokens), forward_seconds (slowest
        rank), parameters (of rank 0), and decoded.
    """
    from helix_megatron.host.launcher import run_ranks

    length = max(len(expected.tokens), len(expected.prompt) + len(expected.greedy))
    argv = model_flags(checkpoint, tp, length, list(more))
    ranks = run_ranks(rank_check, tp, argv, expected, decode, timeout_s=timeout_s)
    assert all(other["greedy"] == ranks[0]["greedy"] for other in ranks)
    worst = {name: max(rank[name] for rank in ranks) for name in ("max_difference", "forward_seconds")}
    return ranks[0] | worst


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 when a layout differs."""
    parser = argparse.ArgumentParser(prog="python -m helix_megatron.convert.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", type=Path, required=True, help="converted Megatron checkpoint")
    parser.add_argument("--hf", type=Path, required=True, help="the model it came from: folder or .gguf")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4], help="tensor-parallel sizes")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the text")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded greedily")
    parser.add_argument("--decode", action="store_true", help="decode with a KV cache too")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a logit")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="helix-check-") as folder:
        model, tokenizer = open_model(options.hf)
        tokens = text_tokens(tokenizer, options.tokens)
        expected = reference(model, tokens, options.new_tokens, Path(folder, "logits.npy"))
        del model
        print(f"transformers: {len(tokens)} tokens, perplexity {expected.perplexity:.5g}")
        print(f"continues with {tokenizer.decode(expected.greedy)!r}")
        good = True
        for tp in options.tp:
            found = check(options.checkpoint, tp, expected, options.decode)
            same = found["greedy"] == expected.greedy
            same &= found.get("decoded", expected.greedy) == expected.greedy
            fine = same and found["max_difference"] <= options.tolerance
            fine &= abs(found["perplexity"] / expected.perplexity - 1) < 1e-5
            good &= fine
            print(
                f"T={tp}: logits differ by at most {found['max_difference']:.1e}, perplexity "
                f"{found['perplexity']:.5g}, {len(expected.greedy)} greedy tokens "
                f"{'the same' if same else 'DIFFERENT'}, {found['parameters'] / 1e6:.1f} M parameters a "
                f"rank, forward {found['forward_seconds']:.1f} s: {'equal' if fine else 'NOT EQUAL'}",
                flush=True,
            )
    return 0 if good else 1


if __name__ == "__main__":
    from helix_megatron.convert.check import main as _main  # ranks import its functions by name

    sys.exit(_main())
