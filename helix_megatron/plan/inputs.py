"""What is planned and where, from presets, files, flags, or this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from helix_megatron import presets, yaml_config
from helix_megatron.plan import clusters
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.nvml import gpus, of_gpus
from helix_megatron.presets import ModelShape

_NEEDED = ("--num-layers", "--hidden-size", "--num-attention-heads")
_REFUSED = ("--num-experts", "--multi-latent-attention", "--heterogeneous-layers-config-path")


def model(name: str) -> ModelShape:
    """A preset, a Hugging Face config.json (or its folder), or a YAML file with Megatron's flags.

    Raises:
        ValueError: neither of these, or a model that is no dense GPT.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        document = yaml_config.read_yaml(path)
        flags = yaml_config.model_args(document.get("MODEL_ARGS"), f"{path}: MODEL_ARGS")
        return model_of_flags(flags, path.stem, str(path))
    if path.suffix == ".json" or path.is_dir():
        return presets.from_hf_config(path)
    return presets.find(name)


def flags_of_words(words: Sequence[str]) -> dict[str, Any]:
    """Megatron's command line to `--name` to value; a flag without a value is true."""
    flags: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flags[name] = value if equals else True
        elif not name:
            raise ValueError(f"{word!r} stands before any flag; after -- come Megatron's flags.")
        else:
            flags[name] = word if flags[name] is True else [flags[name], word]
    return flags


def model_of_flags(flags: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """The shape that Megatron's flags describe, with Megatron's own defaults.

    Raises:
        ValueError: a flag is missing or no number, or a model that is no dense GPT.
    """

    def number(flag: str, default: int | None = None) -> int:
        value = flags.get(flag, default)
        try:
            return int(value)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {flag} is {value!r}; the planner needs a whole number.") from error

    def on(flag: str) -> bool:
        return flags.get(flag) is True

    for flag in _NEEDED:
        if flag not in flags:
            raise ValueError(f"{where} has no {flag}; the planner needs {', '.join(_NEEDED)}.")
    for flag in _REFUSED:
        if flags.get(flag):
            raise ValueError(f"{where}: {flag} is given; only dense GPT models are planned.")
    hidden, heads = number("--hidden-size"), number("--num-attention-heads")
    swiglu = on("--swiglu")
    ffn = int(4 * hidden * 2 / 3 / 64) * 64 if swiglu else 4 * hidden
    vocab = flags.get("--padded-vocab-size", flags.get("--vocab-size"))
    return ModelShape(
        name=name,
        num_layers=number("--num-layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=number("--num-query-groups", heads) if on("--group-query-attention") else heads,
        kv_channels=number("--kv-channels", hidden // heads),
        ffn_hidden_size=number("--ffn-hidden-size", ffn),
        vocab_size=50257 if vocab is None else int(vocab),
        swiglu=swiglu,
        tied_embeddings=not on("--untie-embeddings-and-output-weights"),
        position_embedding_type=str(flags.get("--position-embedding-type", "learned_absolute")),
        rotary_percent=float(flags.get("--rotary-percent", 1.0)),
        rotary_base=number("--rotary-base", 10000),
        use_rope_scaling=on("--use-rope-scaling"),
        normalization=str(flags.get("--normalization", "LayerNorm")),
        norm_epsilon=float(flags.get("--norm-epsilon", 1e-5)),
        qk_layernorm=on("--qk-layernorm"),
        add_bias_linear=not on("--disable-bias-linear"),
        add_qkv_bias=on("--add-qkv-bias"),
        max_position_embeddings=number("--max-position-embeddings", number("--seq-length", 2048)),
        make_vocab_size_divisible_by=1
        if "--padded-vocab-size" in flags
        else number("--make-vocab-size-divisible-by", 128),
        notes=() if vocab is not None else ("no vocabulary was given: GPT-2's 50257 tokens are assumed",),
    )


def cluster(name: str) -> Cluster:
    """A preset, a YAML file (written by --probe or by hand), or "this" machine."""
    if name == "this":
        return this_machine()
    if Path(name).suffix in (".yaml", ".yml"):
        return clusters.from_dict(yaml_config.read_yaml(name), name)
    return clusters.find(name)


def this_machine() -> Cluster:
    """This machine's devices: GPUs as NVML names and counts them, with a preset's rates; else its cores."""
    found = gpus()
    return of_gpus(found) if found else of_cores()


def of_cores() -> Cluster:
    """The host preset with this machine's cores and memory."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return replace(
        clusters.find("host"),
        name=f"this machine ({cores} cores)",
        memory=psutil.virtual_memory().total / cores,  # a core's share
        gpus_per_node=cores,
        slots=cores,
    )
