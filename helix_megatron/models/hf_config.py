"""The shape of a Hugging Face model, from its config.json alone.

    hf_config.read("config.json")        a file, the folder that holds it, or its contents

What a config.json may hold that has no shape here (latent attention, some dense layers among experts, ...) is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helix_megatron.models.shape import ModelShape

# Keys of a config.json that mean a model this does not describe, and what they stand for.
_REFUSED = {
    "n_routed_experts": "experts beside dense layers",
    "mlp_only_layers": "dense layers among those with experts",
    "kv_lora_rank": "heads of multi-latent attention",
    "is_encoder_decoder": "encoder-decoder models",
}
_EXPERTS = ("num_experts", "num_local_experts")
_EXPERT_KEYS = {
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
_GDN_KEYS = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
)  # fmt: skip
_QWEN3_NEXT: dict[str, Any] = {
    "qk_layernorm": True, "attention_output_gate": True, "layernorm_zero_centered_gamma": True,
}  # fmt: skip
# Families whose config.json does not say everything: model_type -> what it leaves unsaid.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "phi3": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "qwen3_moe": {"qk_layernorm": True},
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "gpt_oss": {"swiglu": False, "quick_geglu": True, "add_bias_linear": True, "softmax_type": "learnable"},
}  # fmt: skip
_OF_EXPERTS = ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "gpt_oss")
_OF_GDN = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_ROPE_THETA = 10000.0
_COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", *_EXPERTS, *_EXPERT_KEYS.values(),
    *_GDN_KEYS,
)  # fmt: skip
_REALS = {"rms_norm_eps": 1.0, "rope_theta": 1e12, "partial_rotary_factor": 1.0}  # above 0, and up to this


def read(source: str | Path | Mapping[str, Any], name: str | None = None) -> ModelShape:
    """The shape in a Hugging Face config.json.

    Args:
        source: the file, the folder that holds it, or its contents.
        name: how to call the model; by default its folder's name.
    Raises:
        ValueError: no such file, a key is missing, or a model that has no shape here.
    """
    if isinstance(source, Mapping):
        config, where = dict(source), name or "config.json"
    else:
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        config, where = _read_json(path), str(path)
        name = name or path.resolve().parent.name
    config = config.get("text_config", config)
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(
            f"{where}: model_type {kind!r} is not known here; families: {', '.join(_FAMILIES)}. "
            "Describe the shape by Megatron's flags instead."
        )
    refused = dict(_REFUSED)
    if kind not in _OF_EXPERTS:
        refused |= dict.fromkeys(_EXPERTS, "experts")
    if kind not in _OF_GDN:
        refused["linear_num_value_heads"] = "heads of linear attention"
    if kind not in ("llama", "gpt_oss"):
        refused["attention_bias"] = "biases of attention"
    for key, meaning in refused.items():
        if config.get(key):
            raise ValueError(f"{where}: {key} is {config[key]!r}: {meaning} have no shape here.")

    def need(key: str) -> Any:
        if config.get(key) is None:
            raise ValueError(f"{where} has no {key}, which a {kind} model needs.")
        return config[key]

    _check_numbers(config, where)
    heads = need("num_attention_heads")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    scaling_type = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    notes = [] if scaling_type in ("default", "llama3") else [f"RoPE scaling of type {scaling_type!r}"]
    window = config.get("sliding_window") if config.get("use_sliding_window", kind != "qwen2") else None
    if window and kind != "gpt_oss" and window < need("max_position_embeddings"):
        notes.append(f"attention looks back {window} positions only (--window-size)")
    biases = kind == "llama" and bool(config.get("attention_bias"))
    if kind == "llama" and biases != bool(config.get("mlp_bias")):
        raise ValueError(
            f"{where}: attention_bias is {config.get('attention_bias')}, mlp_bias {config.get('mlp_bias')};"
            " Megatron has biases everywhere (--add-bias-linear) or in q, k and v alone."
        )
    return ModelShape(
        name=name or kind,
        num_layers=need("num_hidden_layers"),
        hidden_size=need("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or need("hidden_size") // heads,
        ffn_hidden_size=need("moe_intermediate_size" if kind == "qwen3_5_moe_text" else "intermediate_size"),
        vocab_size=need("vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rotary_percent=float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0),
        rotary_base=int(rope.get("rope_theta") or config.get("rope_theta") or _ROPE_THETA),
        use_rope_scaling=scaling_type == "llama3",
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=need("max_position_embeddings"),
        notes=tuple(notes),
        window_size=window - 1 if window and kind == "gpt_oss" else 0,
        **(_FAMILIES[kind] | ({"add_bias_linear": True} if biases else {})),
        **(_experts(config, kind, where) if kind in _OF_EXPERTS else {}),
        window_attn_skip_freq=_full_attention_interval(config, where) if kind == "gpt_oss" else 0,
        linear_attention_freq=_full_attention_interval(config, where) if kind in _OF_GDN else 0,
        **({name: need(name) for name in _GDN_KEYS} if kind in _OF_GDN else {}),
    )


def _full_attention_interval(config: Mapping[str, Any], where: str) -> int:
    """Every how many layers one attends to all positions, the last of each turn. ValueError where not so."""
    kinds = config.get("layer_types") or []
    every = config.get("full_attention_interval") or [*kinds, "full_attention"].index("full_attention") + 1
    full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if not kinds and "full_attention_interval" not in config:
        raise ValueError(f"{where} has no layer_types, which say which layers attend to all positions.")
    if kinds and full != list(range(every, len(kinds) + 1, every)):
        raise ValueError(f"{where}: layer_types: full_attention in layers {full}, not in every {every}th.")
    return int(every)


def _experts(config: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Fields of the experts. ValueError where some layers have none."""
    count = config.get("num_experts") or config.get("num_local_experts")
    one_width = kind in ("mixtral", "gpt_oss")
    keys = _EXPERT_KEYS | ({"moe_ffn_hidden_size": "intermediate_size"} if one_width else {})
    missing = [key for key in keys.values() if config.get(key) is None]
    if missing or not count:
        raise ValueError(f"{where} has no {[*missing, 'num_experts'][0]}, which a {kind} model needs.")
    step = config.get("decoder_sparse_step", 1)
    if step != 1:
        raise ValueError(f"{where}: decoder_sparse_step is {step}: dense layers among them have no shape.")
    shared = config.get("shared_expert_intermediate_size") or 0
    return {
        "num_moe_experts": count,
        **{name: config[key] for name, key in keys.items()},
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": bool(shared),
    }


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    """ValueError naming the first key whose number no model has."""
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{where}: {key} is {value!r}; it is a whole number of at least 1.")
    rope = config.get("rope_parameters") or {}
    for key, most in _REALS.items():
        value = config.get(key, rope.get(key))
        if value is not None and not (isinstance(value, int | float) and 0 < value <= most):
            raise ValueError(f"{where}: {key} is {value!r}; it is a number above 0, up to {most:g}.")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ValueError(
            f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}."
        )
    hidden = config.get("hidden_size")
    if hidden and heads and not config.get("head_dim") and hidden % heads:
        raise ValueError(
            f"{where}: num_attention_heads {heads} does not divide hidden_size {hidden}, and there is no "
            "head_dim, the dimension of a head; give one."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds {type(document).__name__}, not a configuration.")
    return document
