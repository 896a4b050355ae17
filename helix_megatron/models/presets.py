"""Shapes of known models.

    presets.find("llama-3.1-70b")                    a published shape
    presets.find("qwen2-7b").scaled(1 / 16)          the same heads and layers, narrow enough for two cores
"""

from __future__ import annotations

from functools import partial

from helix_megatron.megatron.yaml_config import nearest
from helix_megatron.models.shape import ModelShape

_LLAMA3 = partial(ModelShape, vocab_size=128256, rotary_base=500000)
_LLAMA31 = partial(_LLAMA3, use_rope_scaling=True, max_position_embeddings=131072)
_QWEN3_MOE = partial(
    ModelShape, qk_layernorm=True, rotary_base=1000000, norm_epsilon=1e-6, max_position_embeddings=40960,
    num_moe_experts=128, moe_router_topk=8,
)  # fmt: skip


def _gpt_oss(name: str, num_layers: int, num_moe_experts: int) -> ModelShape:
    return ModelShape(
        name, num_layers, 2880, 64, 8, 64, 2880, 201088, swiglu=False, quick_geglu=True, rotary_base=150000,
        add_bias_linear=True, softmax_type="learnable", window_size=127, window_attn_skip_freq=2,
        max_position_embeddings=131072, num_moe_experts=num_moe_experts, moe_router_topk=4,
        moe_ffn_hidden_size=2880, notes=("RoPE scaling of type 'yarn'",),
    )  # fmt: skip


_8B = (32, 4096, 32, 8, 128, 14336)
_70B = (80, 8192, 64, 8, 128, 28672)
_PRESETS = (
    # The paper names no vocabulary and no positions: here as in configs/paper_16xh100.yaml.
    ModelShape(
        "paper-gpt", 16, 4096, 32, 32, 128, 16384, 272, swiglu=False, tied_embeddings=True,
        normalization="LayerNorm", add_bias_linear=True, max_position_embeddings=10000,
        make_vocab_size_divisible_by=1,
    ),
    _LLAMA3("llama-3-8b", *_8B),
    _LLAMA3("llama-3-70b", *_70B),
    _LLAMA31("llama-3.1-8b", *_8B),
    _LLAMA31("llama-3.1-70b", *_70B),
    ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, max_position_embeddings=4096),
    ModelShape(
        "qwen2-7b", 28, 3584, 28, 4, 128, 18944, 152064, add_qkv_bias=True, rotary_base=1000000,
        norm_epsilon=1e-6, max_position_embeddings=131072,
    ),
    ModelShape(
        "qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, add_qkv_bias=True, tied_embeddings=True,
        rotary_base=1000000, norm_epsilon=1e-6, max_position_embeddings=32768,
    ),
    ModelShape(
        "qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, qk_layernorm=True, rotary_base=1000000,
        norm_epsilon=1e-6, max_position_embeddings=40960,
    ),
    ModelShape(
        "mistral-7b", 32, 4096, 32, 8, 128, 14336, 32768, rotary_base=1000000, max_position_embeddings=32768
    ),  # v0.3
    ModelShape(
        "phi-3-medium", 40, 5120, 40, 10, 128, 17920, 32064, max_position_embeddings=4096,
        notes=("attention looks back 2047 positions only (--window-size)",),
    ),
    _QWEN3_MOE("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151936, moe_ffn_hidden_size=768),
    _QWEN3_MOE("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 12288, 151936, moe_ffn_hidden_size=1536),
    # Its text model. Megatron core 0.19 runs gated delta nets in training alone.
    ModelShape(
        "qwen3.5-397b-a17b", 60, 4096, 32, 2, 256, 1024, 248320, qk_layernorm=True, rotary_base=10000000,
        rotary_percent=0.25, norm_epsilon=1e-6, max_position_embeddings=262144, attention_output_gate=True,
        layernorm_zero_centered_gamma=True, num_moe_experts=512, moe_router_topk=10, moe_ffn_hidden_size=1024,
        moe_shared_expert_intermediate_size=1024, moe_shared_expert_gate=True, linear_attention_freq=4,
        linear_num_key_heads=16, linear_num_value_heads=64, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4,
    ),
    _gpt_oss("gpt-oss-20b", 24, num_moe_experts=32),
    _gpt_oss("gpt-oss-120b", 36, num_moe_experts=128),
    ModelShape(
        "mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32000, rotary_base=1000000,
        max_position_embeddings=32768, num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=14336,
    ),
    ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied_embeddings=True, rotary_base=100000),
    # The largest model of "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM".
    ModelShape(
        "gpt-1t", 128, 25600, 160, 160, 160, 102400, 51200, swiglu=False, tied_embeddings=True,
        position_embedding_type="learned_absolute", normalization="LayerNorm", add_bias_linear=True,
        max_position_embeddings=2048,
    ),
)  # fmt: skip
PRESETS: dict[str, ModelShape] = {shape.name: shape for shape in _PRESETS}


def find(name: str) -> ModelShape:
    """A preset by its name, in any case. ValueError with the nearest name, and all of them."""
    shape = PRESETS.get(name.lower())
    if shape is None:
        close = nearest(name.lower(), PRESETS) or "."
        raise ValueError(f"no model preset is called {name!r}{close} Presets: {', '.join(PRESETS)}.")
    return shape
