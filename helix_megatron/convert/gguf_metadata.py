"""What the metadata of a GGUF file says of its model, as a transformers configuration.

Every key of the architecture is a setting that is taken over, is off, says nothing about what the model
computes, or is refused by name. transformers' own reader drops the keys it does not know; llama.cpp, whose
format this is, computes what they say. Those of the tokenizer: gguf_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from helix_megatron.convert import gguf_tokenizer
from helix_megatron.convert.families import refuse_family

_CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
# The key after the architecture's name → the configuration's name for it. The first six have no default.
_SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_NEEDED = 6
# Checked against the settings.
_CHECKED = ("vocab_size", "attention.value_length", "attention.sliding_window", "attention.scale",
            "rope.dimension_count")  # fmt: skip
# What GPTModel lacks → the values with which llama.cpp does not do it.
_OFF: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
}
# Of training, or of what is off; the layout is that of every file of the `llama` architecture.
_NOTES = ("rope.scaling.finetuned", "rope.scaling.original_context_length")
_LAYOUT = ("tensor_data_layout", "Meta AI original pth")
# Namespaces without a function: the reader's, the author's, those of quantization.
_APART = ("GGUF", "general", "quantize", "mradermacher")
_REALS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "attention.scale")
_ZERO_IS_UNSET = ("attention.scale", "attention.sliding_window")


def architecture(file: Path, fields: dict[str, Any]) -> str:
    """The architecture of the file's model.

    Args:
        file: for messages.
        fields: the file's metadata, key → value.

    Raises:
        ValueError: it cannot be converted, or the file is not a whole model.
    """
    kind = fields.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{file} holds no model: its general.type is {kind!r}.")
    parts = fields.get("split.count", 1)
    if parts not in (0, 1):
        raise ValueError(
            f"{file} is part {fields.get('split.no', 0) + 1} of {parts} of a model; merge them into one file "
            "first: llama-gguf-split --merge FIRST_PART OUT.gguf."
        )
    arch = fields.get("general.architecture")
    if arch is None:
        raise ValueError(f"{file} names no architecture (general.architecture); download it again.")
    if arch not in _CONFIGS:
        refuse_family({"gemma3": "gemma3_text"}.get(arch, arch))
        raise ValueError(f"{file} has the architecture {arch!r}; {', '.join(_CONFIGS)} can be converted.")
    return arch


def configuration(
    file: Path, fields: dict[str, Any], rows: int, tied: bool, tokens: Iterable[str] = ()
) -> Any:
    """The transformers configuration of the file's model.

    Args:
        file: for messages.
        fields: the file's metadata, key → value.
        rows: of the embedding.
        tied: it has no output matrix of its own.
        tokens: its vocabulary.

    Raises:
        ValueError: a key is missing or is no number, or says what GPTModel does not compute.
    """
    import transformers

    arch = architecture(file, fields)
    _refuse_others(file, arch, fields)
    own = {key.removeprefix(f"{arch}."): _uniform(value) for key, value in fields.items()}
    missing = [key for key in list(_SETTINGS)[:_NEEDED] if key not in own]
    if missing:
        raise ValueError(f"{file} lacks {arch}.{missing[0]}, without which the model is unknown.")
    _refuse_no_numbers(file, arch, own)
    found = {name: own[key] for key, name in _SETTINGS.items() if key in own}
    # Stored as float32: 1e-05 arrives as 9.999999747378752e-06, the same number to a float32 model.
    found["rms_norm_eps"] = float(str(np.float32(found["rms_norm_eps"])))
    heads = found["num_attention_heads"]
    found.setdefault("num_key_value_heads", heads)
    if "head_dim" not in found and found["hidden_size"] % heads:
        raise ValueError(
            f"{file}: {heads} of {arch}.attention.head_count do not divide {found['hidden_size']} of "
            f"{arch}.embedding_length, and there is no {arch}.attention.key_length."
        )
    found.setdefault("head_dim", found["hidden_size"] // heads)
    _check(file, arch, own, found, rows)
    theta = found.pop("rope_theta", 10000.0)
    config = getattr(transformers, _CONFIGS[arch])
    return config(
        **found,
        rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
        vocab_size=rows,
        tie_word_embeddings=tied,
        architectures=[config.__name__.replace("Config", "ForCausalLM")],
        **gguf_tokenizer.token_ids(fields, tokens),
    )


def _uniform(value: Any) -> Any:
    """A value, or that of every layer where they are all the same."""
    return value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value


def _refuse_others(file: Path, arch: str, fields: dict[str, Any]) -> None:
    """ValueError naming every key that is not understood, and its value."""
    linear = fields.get(f"{arch}.rope.scaling.factor", 1) in (0, 1)
    refused = []
    for name, value in fields.items():
        space, _, key = name.partition(".")
        if space == "tokenizer":
            fine = gguf_tokenizer.understands(key, value)
        elif space != arch:
            fine = space in _APART or name.startswith("split.")
        elif key in _OFF:
            unscaled = key == "rope.scaling.type" and value == "linear" and linear
            fine = unscaled or _uniform(value) in _OFF[key]
        else:
            fine = key in _SETTINGS or key in _CHECKED or key in _NOTES
            fine |= (key, value, arch) == (*_LAYOUT, "llama")
        if not fine:
            refused.append(f"{name} {value!r}" if len(repr(value)) < 80 else name)
    if refused:
        raise ValueError(
            f"{file} has {', '.join(refused)}: Megatron's GPTModel does not compute that, or it is not known "
            "here what it means; the model cannot be converted exactly."
        )


def _refuse_no_numbers(file: Path, arch: str, own: dict[str, Any]) -> None:
    """ValueError for a size that is none, or that is another in every layer."""
    for key in (*_SETTINGS, *_CHECKED):
        value, real = own.get(key, 1), key in _REALS
        if isinstance(value, list):
            why = f"another {_SETTINGS.get(key, 'value')} in every layer, and GPTModel's layers are all alike"
            raise ValueError(f"{file} has {arch}.{key} {value!r}, {why}; it cannot be converted exactly.")
        number = isinstance(value, int | float if real else int) and not isinstance(value, bool)
        unset = key in _ZERO_IS_UNSET and value == 0
        if not unset and not (number and 0 < value < float("inf")):
            raise ValueError(
                f"{file} has {arch}.{key} {value!r}; it is a {'' if real else 'whole '}number above 0."
            )


def _check(file: Path, arch: str, own: dict[str, Any], found: dict[str, Any], rows: int) -> None:
    """ValueError for a key that does not agree with the settings `found`, or goes beyond them."""

    def refuse(key: str, why: str) -> None:
        raise ValueError(f"{file} has {arch}.{key} {own[key]!r}, {why}; it cannot be converted exactly.")

    head = found["head_dim"]
    if own.get("attention.value_length", head) != head:
        refuse("attention.value_length", f"but keys of {head} dimensions")
    if own.get("rope.dimension_count", head) != head:
        refuse("rope.dimension_count", f"but heads of {head} dimensions: RoPE on a part of them")
    if own.get("vocab_size", rows) != rows:
        refuse("vocab_size", f"but an embedding of {rows} rows")
    scale = own.get("attention.scale", 0)
    if scale and not np.isclose(scale, head**-0.5, rtol=1e-6):
        refuse("attention.scale", f"and GPTModel scales scores by 1/sqrt({head})")
    positions = found["max_position_embeddings"]
    if 0 < own.get("attention.sliding_window", 0) < positions:
        refuse("attention.sliding_window", f"and Helix attends to all {positions} positions")

