"""Which models can be converted, and what they are called in Megatron.

The Llama family: RMSNorm before attention and MLP, SwiGLU, rotate-half RoPE on whole heads, grouped queries,
and, a family each, biases of q, k and v (Qwen2) or RMSNorm of every query and key head (Qwen3). What
Megatron's GPTModel would compute differently is refused by name, never approximated.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from helix_megatron.checkpoint import compatibility

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Families people will try, and the first thing in the way.
_LACKING = {
    "gemma": "its embeddings are multiplied by sqrt(hidden size), which GPTModel does not do",
    "gemma2": "it has norms after attention and MLP too, and soft-caps its logits; GPTModel has neither",
    "gemma3_text": "its local layers have a RoPE base of their own (rope_local_base_freq), it has norms "
    "after attention and MLP too, and multiplies embeddings by sqrt(hidden size); GPTModel has one RoPE "
    "base for all layers, norms only before, and does not scale embeddings",
    "phi3": "its checkpoints store q, k, v and gate, up as single tensors, which is not written here",
    "mixtral": "it has experts, and only dense models are converted here; Megatron-LM's "
    "tools/checkpoint/convert.py has a loader for it (mixtral_hf)",
    "qwen2_moe": "it has experts, and only dense models are converted here",
    **dict.fromkeys(
        ("qwen3_moe", "gpt_oss", "qwen3_5_text"),
        "it has experts, sinks or linear attention, and only dense models of ordinary attention are "
        "converted here; go by Megatron-Bridge (helix_megatron.with_helix), which reads and writes it",
    ),
}
# A stack of layers by their letters.
HYBRID_WAY_OUT = (
    "; Megatron-LM's tools/checkpoint/gpt_hybrid_conversion.py hybrid-to-gpt makes a GPT of it where every * "
    "is followed by a -"
)
# What --use-rope-scaling computes. Megatron 0.19 has --rope-scaling-factor too, but it does not reach a GPT:
# `gpt_config_from_args` leaves it out, so the model keeps its default of 8.
_LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Megatron's argument → the flag that sets it. None: derived, or a default of every model here.
_FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "group_query_attention": "--group-query-attention",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "max_position_embeddings": "--max-position-embeddings",
    "position_embedding_type": "--position-embedding-type",
    "rotary_base": "--rotary-base",
    "use_rope_scaling": "--use-rope-scaling",
    "normalization": "--normalization",
    "layernorm_epsilon": "--norm-epsilon",
    "qk_layernorm": "--qk-layernorm",
    "swiglu": "--swiglu",
    "add_qkv_bias": "--add-qkv-bias",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "make_vocab_size_divisible_by": "--make-vocab-size-divisible-by",
    "attention_dropout": "--attention-dropout",
    "hidden_dropout": "--hidden-dropout",
}
# What Megatron's --use-checkpoint-args leaves to the command line.
_NOT_RESTORED = ("--norm-epsilon", "--qk-layernorm", "--use-rope-scaling")

# Arguments of a Megatron model that a Llama-family model cannot have: name → the values that are fine.
_PLAIN: dict[str, tuple] = {
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "swiglu": (True,),
    "rotary_percent": (1, None),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (1, None),
    "no_rope_freq": (None,),
    "layernorm_zero_centered_gamma": (False, None),
    "apply_layernorm_1p": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "multi_latent_attention": (False, None),
    "attention_output_gate": (False, None),
    "experimental_attention_variant": (None,),
    "softmax_type": ("vanilla", None),
    "qk_l2_norm": (False, None),
    "window_size": (None,),
    "num_experts": (0, None),
    "mtp_num_layers": (0, None),
    "hybrid_layer_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "use_mup": (False, None),
    "glu_linear_offset": (0, None),
    "activation_func_clamp_value": (None,),
    "helix_slices_as_heads": (1, None),
}


def refuse_family(model_type: str) -> None:
    """ValueError for a model type this cannot convert, with the reason where it is known."""
    if model_type in FAMILIES:
        return
    reason = _LACKING.get(model_type, "its architecture is not known here")
    raise ValueError(
        f"model type {model_type!r} cannot be converted: {reason}. Families that can: {', '.join(FAMILIES)}."
    )


def to_megatron(config: Any, divisible_by: int = 128) -> Namespace:
    """Megatron's arguments for a Hugging Face configuration.

    Args:
        config: a transformers configuration.
        divisible_by: the padded vocabulary is the next multiple of it.

    Raises:
        ValueError: the family is unknown, or the model has a feature that GPTModel computes differently.
    """
    kind = config.model_type
    refuse_family(kind)
    _refuse_features(config, kind)
    rope = dict(config.rope_parameters)
    heads = config.num_attention_heads
    args = Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        group_query_attention=True,
        num_query_groups=config.num_key_value_heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_position_embeddings=config.max_position_embeddings,
        seq_length=config.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=_rotary_base(rope["rope_theta"]),
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=False,
        rope_scaling_factor=8.0,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        apply_layernorm_1p=False,
        qk_layernorm=kind == "qwen3",
        swiglu=True,
        squared_relu=False,
        add_bias_linear=kind == "llama" and config.attention_bias,
        add_qkv_bias=kind == "qwen2",
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        vocab_size=config.vocab_size,
        padded_vocab_size=-(-config.vocab_size // divisible_by) * divisible_by,
        make_vocab_size_divisible_by=divisible_by,
        ckpt_format="torch_dist",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
    if rope.get("rope_type", "default") == "llama3":
        args.use_rope_scaling = True
    return args


def _rotary_base(theta: Any) -> int:
    if not _is_positive(theta):
        raise ValueError(f"rope_theta is {theta!r}; it is a number above 0.")
    if theta != int(theta):
        raise ValueError(f"rope_theta is {theta}; Megatron's --rotary-base is a whole number.")
    return int(theta)


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < float("inf")


def _refuse_features(config: Any, kind: str) -> None:
    """ValueError naming the first feature of a known family that GPTModel lacks."""

    def refuse(what: str, why: str) -> None:
        raise ValueError(f"this {kind} model has {what}, and {why}; it cannot be converted exactly.")

    value = lambda name: getattr(config, name, None)  # noqa: E731
    if value("quantization_config"):
        refuse("quantized weights (quantization_config)", "Megatron needs them in floating point")
    if config.hidden_act != "silu":
        refuse(f"hidden_act {config.hidden_act!r}", "Megatron's --swiglu uses silu")
    layer_types = set(value("layer_types") or ())
    sliding = kind == "mistral" and value("sliding_window") is not None
    if layer_types - {"full_attention"} or (
        sliding and config.sliding_window < config.max_position_embeddings
    ):
        refuse(
            f"sliding-window attention (sliding_window {value('sliding_window')} of "
            f"{config.max_position_embeddings} positions)",
            "Helix attends to all positions; up to the window both are the same model, so set "
            "sliding_window to null and max_position_embeddings to the window in config.json",
        )
    for name in ("rms_norm_eps", "max_position_embeddings"):
        if not _is_positive(value(name)):
            refuse(f"{name} {value(name)!r}", "it is a number above 0")
    rope = dict(config.rope_parameters)
    kind_of_rope = rope.get("rope_type", "default")
    if kind_of_rope == "llama3":
        outside = "original_max_position_embeddings"  # which counts more in a model of transformers
        rope[outside] = rope[outside] if value(outside) is None else value(outside)
        for name, wanted in _LLAMA3_ROPE.items():
            if rope[name] != wanted:
                refuse(
                    f"llama3 RoPE scaling with {name} {rope[name]}",
                    f"Megatron's --use-rope-scaling always has {wanted} (its --rope-scaling-factor does not "
                    "reach the model)",
                )
    elif kind_of_rope != "default":
        refuse(f"RoPE scaling of type {kind_of_rope!r}", "only default and llama3 equal Megatron's")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(f"partial_rotary_factor {rope['partial_rotary_factor']}", "its layout is not written here")
    if kind != "qwen2" and bool(value("attention_bias")) != bool(value("mlp_bias")):
        refuse(
            f"attention_bias {value('attention_bias')} and mlp_bias {value('mlp_bias')}",
            "Megatron has biases everywhere (--add-bias-linear) or in q, k and v alone",
        )


def flags(args: Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """The command-line flags of the model, `--name` → value (True: the flag alone), in a fixed order."""
    found: dict[str, Any] = {}
    for name, flag in _FLAGS.items():
        value = getattr(args, name)
        if value is not False:
            found[flag] = value
    if not args.add_bias_linear:
        found["--disable-bias-linear"] = True
    half = {torch.bfloat16: "--bf16", torch.float16: "--fp16"}.get(dtype)
    if half:
        found[half] = True
    return found


def not_restored(found: dict[str, Any]) -> dict[str, Any]:
    """Those of `flags` that Megatron's --use-checkpoint-args does not restore: forget one, and the model
    loads and computes something else.
    """
    return {flag: value for flag, value in found.items() if flag in _NOT_RESTORED}


def format_flags(found: dict[str, Any]) -> list[str]:
    """`flags` as a command line."""
    return [
        word for flag, value in found.items() for word in ([flag] if value is True else [flag, str(value)])
    ]


def to_hf(args: Namespace, dtype: torch.dtype) -> Any:
    """A transformers configuration for Megatron's arguments: Llama, Qwen2 or Qwen3, by the model's features.

    Raises:
        ValueError: the model has a feature that this family lacks; the message names the argument.
    """
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    for name, fine in _PLAIN.items():
        value = getattr(args, name, fine[-1])
        if value not in fine:
            raise ValueError(
                f"the checkpoint's {name} is {value!r}; a model of the Llama family has "
                f"{' or '.join(map(repr, fine))}, so it cannot be converted to Hugging Face"
                f"{HYBRID_WAY_OUT if name == 'hybrid_layer_pattern' else ''}."
            )
    for name, value in compatibility.non_default_arguments(args).items():
        if name not in {*_PLAIN, *_FLAGS, "add_bias_linear"}:
            raise ValueError(
                f"the checkpoint's {name} is {value!r}, which no model of the Llama family has, so it cannot "
                "be converted to Hugging Face."
            )
    if args.qk_layernorm and (args.add_qkv_bias or args.add_bias_linear):
        raise ValueError("the checkpoint has qk_layernorm and biases; Qwen3 has no biases, Qwen2 no QK-norm.")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if getattr(args, "use_rope_scaling", False):
        rope |= {"rope_type": "llama3", **_LLAMA3_ROPE}
    settings: dict[str, Any] = {
        "num_hidden_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups
        if args.group_query_attention
        else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "max_position_embeddings": args.max_position_embeddings,
        "rope_parameters": rope,
        "rms_norm_eps": args.layernorm_epsilon,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "vocab_size": _vocabulary(args),
        "dtype": dtype,
        **{name: getattr(args, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if args.qk_layernorm:
        return Qwen3Config(**settings, attention_bias=False, architectures=["Qwen3ForCausalLM"])
    if args.add_qkv_bias and not args.add_bias_linear:
        return Qwen2Config(**settings, architectures=["Qwen2ForCausalLM"])
    biases = {"attention_bias": args.add_bias_linear, "mlp_bias": args.add_bias_linear}
    return LlamaConfig(**settings, **biases, architectures=["LlamaForCausalLM"])


def _vocabulary(args: Namespace) -> int:
    """Tokens without padding, as far as the checkpoint knows. ValueError when there are more than rows."""
    tokens = getattr(args, "vocab_size", None) or args.padded_vocab_size
    if tokens > args.padded_vocab_size:
        raise ValueError(
            f"the checkpoint's tokenizer has {tokens} tokens, its embedding only {args.padded_vocab_size} "
            "rows; give the folder of the model's own config.json and tokenizer with --like."
        )
    return tokens


def check_like(config: Any, args: Namespace) -> None:
    """ValueError naming the first difference between a given configuration and a checkpoint's arguments."""
    wanted = to_megatron(config, 1)
    ignored = ("attention_dropout", "hidden_dropout", "make_vocab_size_divisible_by")
    for name in [*(name for name in _FLAGS if name not in ignored), "add_bias_linear"]:
        theirs, ours = getattr(wanted, name), getattr(args, name, None)
        if theirs != ours:
            raise ValueError(
                f"the given config.json says {name} is {theirs!r}, the checkpoint says {ours!r}: it is "
                "another model's; leave --like out to write a new config.json from the checkpoint."
            )
    if config.vocab_size > args.padded_vocab_size:
        raise ValueError(
            f"the given config.json has a vocabulary of {config.vocab_size}, the checkpoint only "
            f"{args.padded_vocab_size} rows."
        )
