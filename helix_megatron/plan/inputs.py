"""What is planned and where: models and clusters from presets, files, flags, or this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from helix_megatron.megatron import yaml_config
from helix_megatron.models import hf_config, presets
from helix_megatron.models.shape import ModelShape
from helix_megatron.plan import clusters, machine
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.megatron_flags import (
    Flags,
    parse_bool_flag,
    parse_choice_flag,
    parse_float_flag,
    parse_int_flag,
)

_NEEDED = ("--num-layers", "--hidden-size", "--num-attention-heads")
_REFUSED = ("--multi-latent-attention", "--heterogeneous-layers-config-path", "--hybrid-layer-pattern",
            "--moe-latent-size")  # fmt: skip
_SOFTMAX = ("vanilla", "off-by-one", "learnable")
_GDN = {"linear_attention_freq": None, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}  # fmt: skip
_YAML = (".yaml", ".yml")


def load_model(name: str) -> ModelShape:
    """A preset, a Hugging Face config.json (or its folder), or a YAML file with Megatron's flags.

    Raises:
        ValueError: neither of these, or a model that is no dense GPT.
    """
    if Path(name).suffix in _YAML:
        return shape_from_flags(read_flags_file(name), Path(name).stem, name)
    if name.endswith(".json") or Path(name).is_dir():
        return hf_config.read(name)
    return presets.find(name)


def read_model_flags(name: str | None, words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Megatron's flags that describe the model, and where from; none with a preset or a config.json."""
    if words:
        return parse_flags(words), "the flags after --"
    return (read_flags_file(name), name) if name and Path(name).suffix in _YAML else ({}, "")


def read_flags_file(path: str) -> dict[str, Any]:
    """MODEL_ARGS of a YAML file, `--name` to value. ValueError where there are none."""
    document = yaml_config.read_yaml(path)
    if not document.get("MODEL_ARGS"):
        close = yaml_config.nearest("MODEL_ARGS", map(str, document)) if "MODEL_ARGS" not in document else ""
        raise ValueError(f"{path} has no MODEL_ARGS, the model as Megatron's flags{close or '.'}")
    return yaml_config.model_args(document["MODEL_ARGS"], f"{path}: MODEL_ARGS")


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
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


def shape_from_flags(flags: Flags, name: str, where: str, length: int | None = None) -> ModelShape:
    """The shape that Megatron's flags describe, with Megatron's own defaults.

    Args:
        length: positions of a sequence, where the flags do not say how many there are at most.
    Raises:
        ValueError: a flag is missing or has a value that no model has, or a model that is no dense GPT.
    """
    for flag in _NEEDED:
        if flag not in flags:
            raise ValueError(f"{where} has no {flag}; the planner needs {', '.join(_NEEDED)}.")
    for flag in _REFUSED:
        if flags.get(flag):
            raise ValueError(f"{where}: {flag} is given; such models are not planned.")
    number, real = partial(parse_int_flag, flags, where), partial(parse_float_flag, flags, where)
    switch, choice = partial(parse_bool_flag, flags, where), partial(parse_choice_flag, flags, where)
    hidden, heads = number("--hidden-size"), number("--num-attention-heads")
    if "--kv-channels" not in flags and hidden % heads:
        raise ValueError(
            f"{where}: --num-attention-heads {heads} does not divide --hidden-size {hidden}; give "
            "--kv-channels, the dimension of a head."
        )
    groups = number("--num-query-groups", default=1) if switch("--group-query-attention") else heads
    if heads % groups:
        raise ValueError(
            f"{where}: --num-query-groups {groups} does not divide --num-attention-heads {heads}; it must."
        )
    swiglu = switch("--swiglu")
    ffn = number("--ffn-hidden-size", default=int(4 * hidden * 2 / 3 / 64) * 64 if swiglu else 4 * hidden)
    positions = choice("--position-embedding-type", "learned_absolute", "rope", "none", "yarn")
    rope = positions == "yarn" or switch("--use-rotary-position-embeddings")
    padded = "--padded-vocab-size" in flags
    vocab = "--padded-vocab-size" if padded else "--vocab-size"
    notes = [] if vocab in flags else ["no vocabulary was given: GPT-2's 50257 tokens are assumed"]
    if positions == "yarn":
        notes.append("--position-embedding-type yarn (planned: rope)")
    if groups == heads and str(flags.get("--num-query-groups", heads)) != str(heads):
        notes.append("--num-query-groups, which Megatron ignores without --group-query-attention")
    return ModelShape(
        name=name,
        num_layers=number("--num-layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=number("--kv-channels", default=hidden // heads),
        ffn_hidden_size=ffn,
        vocab_size=number(vocab, default=50257),
        swiglu=swiglu,
        tied_embeddings=not switch("--untie-embeddings-and-output-weights"),
        position_embedding_type="rope" if rope else positions,
        rotary_percent=real("--rotary-percent", default=1.0, most=1.0),
        rotary_base=number("--rotary-base", default=10000),
        use_rope_scaling=switch("--use-rope-scaling"),
        normalization=choice("--normalization", "LayerNorm", "RMSNorm"),
        norm_epsilon=real("--norm-epsilon", default=1e-5),
        qk_layernorm=switch("--qk-layernorm"),
        add_bias_linear=not switch("--disable-bias-linear"),
        add_qkv_bias=switch("--add-qkv-bias"),
        max_position_embeddings=number(
            "--max-position-embeddings", default=length or number("--seq-length", default=2048)
        ),
        make_vocab_size_divisible_by=0 if padded else number("--make-vocab-size-divisible-by", default=128),
        notes=tuple(notes),
        **_attention_kinds(flags, where),
        **_experts(flags, where, ffn),
    )


def _attention_kinds(flags: Flags, where: str) -> dict[str, Any]:
    """Fields of what attention layers have besides, and of gated delta nets between them."""
    number, switch = partial(parse_int_flag, flags, where), partial(parse_bool_flag, flags, where)
    found: dict[str, Any] = {
        "quick_geglu": switch("--quick-geglu"),
        "attention_output_gate": switch("--attention-output-gate"),
        "layernorm_zero_centered_gamma": switch("--apply-layernorm-1p"),
        "softmax_type": parse_choice_flag(flags, where, "--softmax-type", *_SOFTMAX),
    }
    if "--window-size" in flags:
        window = str(flags["--window-size"]).strip("()[] ").split(",")
        if len(window) != 2 or not window[0].strip().isdigit() or window[1].strip() != "0":
            raise ValueError(
                f"{where}: --window-size is {flags['--window-size']!r}; the planner needs positions looked "
                "back on and 0 ahead, as in 127,0."
            )
        found["window_size"] = int(window[0])
        if "--window-attn-skip-freq" in flags:
            found["window_attn_skip_freq"] = number("--window-attn-skip-freq")
    if "--experimental-attention-variant" in flags:
        parse_choice_flag(flags, where, "--experimental-attention-variant", "gated_delta_net")
        for name, default in _GDN.items():
            found[name] = number(f"--{name.replace('_', '-')}", default=default)
    return found


def _experts(flags: Flags, where: str, ffn: int) -> dict[str, Any]:
    """Fields of the experts; none without --num-experts."""
    if "--num-experts" not in flags:
        return {}
    number = partial(parse_int_flag, flags, where)
    parse_choice_flag(flags, where, "--moe-layer-freq", 1, "1")
    shared = "--moe-shared-expert-intermediate-size"
    return {
        "num_moe_experts": number("--num-experts"),
        "moe_router_topk": number("--moe-router-topk", default=2),
        "moe_ffn_hidden_size": number("--moe-ffn-hidden-size", default=ffn),
        "moe_shared_expert_intermediate_size": number(shared) if shared in flags else 0,
        "moe_shared_expert_gate": parse_bool_flag(flags, where, "--moe-shared-expert-gate"),
    }


def load_cluster(name: str) -> Cluster:
    """A preset, a YAML file (written by --probe or by hand), or "this" machine."""
    if name == "this":
        return machine.detect_machine()
    if Path(name).suffix in _YAML:
        return clusters.from_dict(yaml_config.read_yaml(name), name)
    return clusters.find(name)
