"""What is printed to be pasted: Megatron's flags of a layout, and on a host the whole command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from helix_megatron.models.presets import ModelShape
from helix_megatron.plan import given
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, Workload

_DATA = ("--mock-data", "--data-path", "--train-data-path", "--data-args-path", "--per-split-data-args-path")
_TRAINING = {"--lr": 1e-4, "--eval-iters": 0, "--eval-interval": 1000, "--log-interval": 1}


def flags(layout: Layout, workload: Workload, cluster: Cluster) -> dict[str, Any]:
    """Megatron's flags of a layout, `--name` to value, with those that the cluster needs."""
    found = layout.flags(workload)
    if not workload.fused:
        found |= {"--transformer-impl": "local"} | dict.fromkeys(sorted(given.UNFUSED), True)
    if cluster.slots:
        found["--helix-host-mode"] = True
    return found


def line(found: Mapping[str, Any]) -> str:
    """Flags as words of a shell."""
    words = []
    for flag, value in found.items():
        items = value if isinstance(value, list) else [value]
        words += [flag] if value is True else [flag, *map(str, items)]
    return shlex.join(words)


def command(
    shape: ModelShape, model: Mapping[str, Any], layout: Layout, workload: Workload, cluster: Cluster
) -> str | None:
    """The command that trains this layout on a host as it stands; None for other work and other machines.

    Args:
        model: the flags that came with the model; empty for a preset or a config.json. Those of another
            layout are left out. Data, learning rate and number of steps are filled in where they say none.
    """
    if workload.kind != "train" or not cluster.slots or cluster.nodes > 1:
        return None
    dropped = given.WORK | given.LAYOUT | given.UNFUSED | {"--transformer-impl", "--helix-host-mode"}
    words = {flag: value for flag, value in model.items() if flag not in dropped and value is not False}
    if not words:
        words = shape.model_args(shape.padded_vocab_size(layout.tp))
    learned = shape.position_embedding_type == "learned_absolute"
    positions = shape.max_position_embeddings  # RoPE has as many as are asked for
    words["--max-position-embeddings"] = positions if learned else max(positions, workload.length)
    if not any(flag in words for flag in _DATA):
        words["--mock-data"] = True
    if "--tokenizer-type" not in words:
        words |= {"--tokenizer-type": "NullTokenizer", "--vocab-size": shape.vocab_size}
    if "--train-samples" not in words:
        words.setdefault("--train-iters", 10)
    for flag, value in _TRAINING.items():
        words.setdefault(flag, value)
    started = (
        f"python -m helix_megatron.launch --nproc-per-node {layout.world} -m helix_megatron.pretrain_gpt"
    )
    return f"{started} {line(words | flags(layout, workload, cluster))}"
