"""The arguments of Megatron 0.19 and 0.20 that change what a model's weights compute.

Group by group, each with the value that Megatron takes when it is not given. All its other arguments are in
tests/checkpoint/other_arguments.py, with the reason why weights mean the same whatever they are; a test says
where an argument of a newer Megatron must still be sorted in. Pure data: no torch, no Megatron.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Arguments that change the function of the weights, for one reason.

    Args:
        reason: how they change it.
        arguments: name in Megatron's arguments → what Megatron has when it is not given (None included).
        when: given effective values (see compatibility.effective), whether these arguments are read at all.
        sizes: they are in the shapes of the weights; an incomplete checkpoint may leave them out.
    """

    reason: str
    arguments: dict[str, Any]
    when: Callable[[Namespace], Any] = lambda args: True
    sizes: bool = False


def _rotates(args: Namespace) -> Any:
    return args.position_embedding_type in ("rope", "mrope", "yarn") or args.multi_latent_attention


def _plain_rope(args: Namespace) -> Any:
    return args.position_embedding_type == "rope" and not args.multi_latent_attention


def _yarn(args: Namespace) -> Any:
    return args.position_embedding_type == "yarn" and not args.multi_latent_attention


def _mla_yarn(args: Namespace) -> Any:
    return args.multi_latent_attention and args.rope_type == "yarn"


def _bends_the_gate(args: Namespace) -> bool:
    return args.activation_func_clamp_value is not None or bool(args.glu_linear_offset)


def _has_layers(letter: str, *variants: str) -> Callable[[Namespace], Any]:
    """Whether a hybrid model has layers of a letter, or every layer is one of these attention variants."""
    return lambda args: (
        letter in (args.hybrid_layer_pattern or "") or args.experimental_attention_variant in variants
    )


_STACKS = ("megatron.core.models.hybrid.hybrid_layer_specs", "megatron.core.models.mamba.mamba_layer_specs")
DEFAULT_SPECS = {
    ("helix_megatron.megatron.specs", "gpt_layer_spec"),
    ("helix_megatron.megatron.specs", "hybrid_stack_spec"),
    *((module, name) for module in _STACKS for name in ("hybrid_stack_spec", "mamba_stack_spec")),
}
"""Values of --spec whose layers are those that Megatron builds without it."""


FUNCTION = (
    Group(
        "sizes of the weights",
        dict(
            num_layers=None, hidden_size=None, ffn_hidden_size=None, num_attention_heads=None,
            num_query_groups=None, kv_channels=None,
        ),
        sizes=True,
    ),
    Group(
        "the kind of every layer",
        dict(
            num_experts=None, multi_latent_attention=False, experimental_attention_variant=None,
            hybrid_layer_pattern=None, heterogeneous_layers_config_encoded_json=None, spec=None,
            # No flag: two names of TransformerConfig that a program or a YAML configuration sets.
            num_moe_experts=None, heterogeneous_block_specs=False,
        ),
    ),
    Group(
        "norms",
        dict(
            normalization="LayerNorm", layernorm_epsilon=1e-5, layernorm_zero_centered_gamma=False,
            qk_layernorm=False, qk_l2_norm=False, apply_residual_connection_post_layernorm=False,
        ),
    ),
    Group(
        "positions",
        dict(position_embedding_type="learned_absolute", no_rope_freq=None),
    ),
    Group(
        "the table of learned positions",
        dict(max_position_embeddings=None),
        lambda args: args.position_embedding_type == "learned_absolute",
        sizes=True,
    ),
    Group(
        "buckets of relative positions",
        dict(relative_attention_num_buckets=32, relative_attention_max_distance=128),
        lambda args: args.position_embedding_type == "relative",
    ),
    Group("which RoPE multi-latent attention has", dict(rope_type="yarn"),
          lambda args: args.multi_latent_attention),
    Group(
        "angles of RoPE",
        dict(
            rotary_base=10000, rotary_percent=1.0, rotary_interleaved=False,
            rotary_seq_len_interpolation_factor=1,
        ),
        _rotates,
    ),
    Group("sections of multimodal RoPE", dict(mrope_section=None),
          lambda args: args.position_embedding_type == "mrope"),
    Group("RoPE scaling as in Llama 3", dict(use_rope_scaling=False), _plain_rope),
    # Megatron's own training of a GPT leaves it at 8 whatever is given; other programs hand it on.
    Group("the factor of that scaling", dict(rope_scaling_factor=8.0),
          lambda args: _plain_rope(args) and args.use_rope_scaling),
    Group(
        "YaRN",
        dict(
            yarn_original_max_position_embeddings=4096, yarn_beta_fast=32.0, yarn_beta_slow=1.0,
            yarn_correction_range_round_to_int=True,
        ),
        _yarn,
    ),
    Group(
        "YaRN of multi-latent attention, by its names in MLATransformerConfig, which have no flags",
        dict(original_max_position_embeddings=4096, beta_fast=32, beta_slow=1),
        _mla_yarn,
    ),
    Group(
        "YaRN of either attention",
        dict(rotary_scaling_factor=1.0, mscale=1.0, mscale_all_dim=0.0),
        lambda args: _yarn(args) or _mla_yarn(args),
    ),
    Group(
        "who attends to whom, and how scores become probabilities",
        dict(window_size=None, softmax_type="vanilla", attention_output_gate=False, softmax_scale=None),
    ),
    Group("which layers have the window", dict(window_attn_skip_freq=None), lambda a: a.window_size),
    Group(
        "activation of the MLP",
        dict(
            swiglu=False, squared_relu=False, quick_geglu=False, openai_gelu=False,
            activation_func_clamp_value=None,
            # No flag: derived from the others, or set by a program.
            activation_func=None, gated_linear_unit=False,
        ),
    ),
    Group("the linear half of a gated MLP", dict(glu_linear_offset=0.0), lambda a: a.swiglu or a.quick_geglu),
    # Megatron's fused SwiGLU leaves the clamp out, the unfused one applies it.
    Group("whether SwiGLU is clamped", dict(bias_swiglu_fusion=True),
          lambda args: args.swiglu and args.activation_func_clamp_value is not None),
    Group("the same, left out by Transformer Engine's activation", dict(use_te_activation_func=False),
          lambda args: args.swiglu and _bends_the_gate(args)),
    Group("the same, left out by its fused MLP", dict(use_transformer_engine_op_fuser=False),
          lambda args: args.swiglu and not args.num_experts and _bends_the_gate(args)),
    Group("the same, left out by shared experts beside the others", dict(moe_shared_expert_overlap=False),
          lambda args: args.num_experts and args.moe_shared_expert_intermediate_size
          and (args.swiglu or args.quick_geglu) and _bends_the_gate(args)),
    Group(
        "weights that are there or not: a model without them drops those of the checkpoint in silence",
        dict(add_bias_linear=True, add_qkv_bias=False, untie_embeddings_and_output_weights=False),
    ),
    Group("multi-token prediction", dict(mtp_num_layers=None)),
    Group("layers of multi-token prediction", dict(mtp_use_repeated_layer=False), lambda a: a.mtp_num_layers),
    Group("muP: scale of the logits, which Megatron applies without --use-mup too",
          dict(use_mup=False, mup_output_mult=1.0)),
    Group(
        "muP: scales of embeddings, scores and logits",
        dict(mup_base_hidden_size=None, mup_embedding_mult=1.0, mup_base_head_dim=None,
             mup_attn_scale_power=1.0),
        lambda args: args.use_mup,
    ),
    Group(
        "experts: which a token goes to, and with what weight",
        dict(
            moe_layer_freq=1, moe_ffn_hidden_size=None, moe_latent_size=None, moe_router_topk=2,
            moe_router_num_groups=None, moe_router_group_topk=None, moe_router_topk_limited_devices=None,
            moe_router_score_function="softmax", moe_router_pre_softmax=False,
            moe_router_topk_scaling_factor=1.0, moe_router_enable_expert_bias=False,
            moe_router_load_balancing_type="aux_loss", moe_router_force_load_balancing=False,
            moe_router_force_biased=None, moe_apply_probs_on_input=False, moe_mlp_glu_interleave_size=None,
            moe_shared_expert_intermediate_size=None, moe_shared_expert_gate=False,
            moe_shared_expert_glu_interleave_size=None,
        ),
        lambda args: args.num_experts,
    ),
    Group(
        "ranks and heads of multi-latent attention",
        dict(q_lora_rank=None, kv_lora_rank=32, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128),
        lambda args: args.multi_latent_attention,
    ),
    Group(
        "sparse attention: what its indexer scores and selects",
        dict(
            dsa_indexer_n_heads=None, dsa_indexer_head_dim=None, dsa_indexer_topk=None,
            dsa_indexer_topk_freq=1, dsa_indexer_skip_topk_offset=0, dsa_indexer_rope_interleaved=False,
            dsa_indexer_rotate_activation=True, dsa_indexer_scoring_relu=True,
            dsa_indexer_k_norm_epsilon=None,
        ),
        _has_layers("D", "dsa"),
    ),
    Group(
        "linear attention",
        dict(
            linear_attention_freq=None, linear_conv_kernel_dim=4, linear_key_head_dim=128,
            linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
        ),
        _has_layers("G", "gated_delta_net", "gdn", "gdn2"),
    ),
    Group(
        "Mamba",
        dict(mamba_state_dim=128, mamba_head_dim=64, mamba_num_groups=8, mamba_num_heads=None),
        _has_layers("M"),
    ),
    Group("Gated Delta Product, which a --spec puts where Mamba is", dict(gdp_num_householder=3),
          lambda args: _has_layers("M")(args) and args.spec),
    Group("residual streams beside each other", dict(enable_mhc_connections=False)),
    Group("how residual streams are mixed", dict(mhc_num_residual_streams=4, mhc_sinkhorn_iterations=20),
          lambda args: args.enable_mhc_connections),
    Group("tokens that have a row of the embedding; padding may differ", dict(padded_vocab_size=None)),
)  # fmt: skip

# Flags that are not the argument's name with dashes; None: a program or a YAML configuration sets it.
FLAGS: dict[str, str | None] = {
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "add_bias_linear": "--disable-bias-linear",
    "bias_swiglu_fusion": "--no-bias-swiglu-fusion",
    "yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int",
    "dsa_indexer_rotate_activation": "--no-dsa-indexer-rotate-activation",
    "dsa_indexer_scoring_relu": "--no-dsa-indexer-scoring-relu",
    "num_moe_experts": None,
    "heterogeneous_block_specs": None,
    "original_max_position_embeddings": None,
    "beta_fast": None,
    "beta_slow": None,
    "softmax_scale": None,
    "activation_func": None,
    "gated_linear_unit": None,
    "moe_router_topk_limited_devices": None,
}

# What older Megatrons called it.
FORMER_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "hybrid_layer_pattern": "hybrid_override_pattern",
}


def flag_of(name: str) -> str | None:
    """The flag that sets an argument away from its default; None when there is none."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))
