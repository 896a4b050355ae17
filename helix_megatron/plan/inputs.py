"""What is planned and where, from presets, files, flags, or this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from helix_megatron.megatron import yaml_config
from helix_megatron.models import presets
from helix_megatron.models.presets import ModelShape
from helix_megatron.plan import clusters, given
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.nvml import gpus, of_gpus

_NEEDED = ("--num-layers", "--hidden-size", "--num-attention-heads")
_REFUSED = ("--num-experts", "--multi-latent-attention", "--heterogeneous-layers-config-path")


def model(name: str) -> ModelShape:
    """A preset, a Hugging Face config.json (or its folder), or a YAML file with Megatron's flags.

    Raises:
        ValueError: neither of these, or a model that is no dense GPT.
    """
    if is_yaml(name):
        return model_of_flags(flags_of_file(name), Path(name).stem, name)
    if name.endswith(".json") or Path(name).is_dir():
        return presets.from_hf_config(name)
    return presets.find(name)


def is_yaml(name: str) -> bool:
    """Whether a model's name is that of a YAML file."""
    return Path(name).suffix in (".yaml", ".yml")


def flags_of(name: str | None, words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Megatron's flags that describe the model, and where from; none with a preset or a config.json."""
    if words:
        return flags_of_words(words), "the flags after --"
    return (flags_of_file(name), name) if name and is_yaml(name) else ({}, "")


def flags_of_file(path: str) -> dict[str, Any]:
    """MODEL_ARGS of a YAML file, `--name` to value. ValueError where there are none."""
    document = yaml_config.read_yaml(path)
    if not document.get("MODEL_ARGS"):
        close = yaml_config.nearest("MODEL_ARGS", map(str, document)) if "MODEL_ARGS" not in document else ""
        raise ValueError(f"{path} has no MODEL_ARGS, the model as Megatron's flags{close or '.'}")
    return yaml_config.model_args(document["MODEL_ARGS"], f"{path}: MODEL_ARGS")


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
        elif flags[name] is True:
            flags[name] = word
        else:
            before = flags[name]
            flags[name] = [*(before if isinstance(before, list) else [before]), word]
    return flags


def model_of_flags(flags: Mapping[str, Any], name: str, where: str, length: int | None = None) -> ModelShape:
    """The shape that Megatron's flags describe, with Megatron's own defaults.

    Args:
        length: positions of a sequence, where the flags do not say how many there are at most.
    Raises:
        ValueError: a flag is missing or has a value that no model has, or a model that is no dense GPT.
    """
    whole, real, on = (partial(check, flags, where=where) for check in (given.whole, given.real, given.on))
    for flag in _NEEDED:
        if flag not in flags:
            raise ValueError(f"{where} has no {flag}; the planner needs {', '.join(_NEEDED)}.")
    for flag in _REFUSED:
        if flags.get(flag):
            raise ValueError(f"{where}: {flag} is given; only dense GPT models are planned.")
    hidden, heads = whole("--hidden-size"), whole("--num-attention-heads")
    if "--kv-channels" not in flags and hidden % heads:
        raise ValueError(
            f"{where}: --num-attention-heads {heads} does not divide --hidden-size {hidden}; give "
            "--kv-channels, the dimension of a head."
        )
    groups = whole("--num-query-groups", default=1) if on("--group-query-attention") else heads
    if heads % groups:
        raise ValueError(
            f"{where}: --num-query-groups {groups} does not divide --num-attention-heads {heads}; it must."
        )
    swiglu = on("--swiglu")
    ffn = int(4 * hidden * 2 / 3 / 64) * 64 if swiglu else 4 * hidden
    vocab = next((flag for flag in ("--padded-vocab-size", "--vocab-size") if flag in flags), None)
    positions = given.one_of(
        flags, "--position-embedding-type", where, ("learned_absolute", "rope", "none", "yarn")
    )
    notes = [] if vocab else ["no vocabulary was given: GPT-2's 50257 tokens are assumed"]
    if positions == "yarn":
        notes.append("--position-embedding-type yarn (planned: rope)")
    if groups == heads and "--num-query-groups" in flags and str(flags["--num-query-groups"]) != str(heads):
        notes.append("--num-query-groups, which Megatron ignores without --group-query-attention")
    rope = positions == "yarn" or on("--use-rotary-position-embeddings")
    seq_length = length or whole("--seq-length", default=2048)
    return ModelShape(
        name=name,
        num_layers=whole("--num-layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=whole("--kv-channels", default=hidden // heads),
        ffn_hidden_size=whole("--ffn-hidden-size", default=ffn),
        vocab_size=whole(vocab) if vocab else 50257,
        swiglu=swiglu,
        tied_embeddings=not on("--untie-embeddings-and-output-weights"),
        position_embedding_type="rope" if rope else positions,
        rotary_percent=real("--rotary-percent", default=1.0, most=1.0),
        rotary_base=whole("--rotary-base", default=10000),
        use_rope_scaling=on("--use-rope-scaling"),
        normalization=given.one_of(flags, "--normalization", where, ("LayerNorm", "RMSNorm")),
        norm_epsilon=real("--norm-epsilon", default=1e-5),
        qk_layernorm=on("--qk-layernorm"),
        add_bias_linear=not on("--disable-bias-linear"),
        add_qkv_bias=on("--add-qkv-bias"),
        max_position_embeddings=whole("--max-position-embeddings", default=seq_length),
        make_vocab_size_divisible_by=1
        if "--padded-vocab-size" in flags
        else whole("--make-vocab-size-divisible-by", default=128),
        notes=tuple(notes),
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
