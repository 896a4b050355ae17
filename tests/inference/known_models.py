"""Tiny random models of transformers with output gates and with attention sinks, as Megatron's GPTModel.

qwen      Qwen3.5's full-attention layers: an output gate, QK norm, RoPE of a quarter of a head. Its linear
          attention layers are left out: what Megatron calls gated delta net needs CUDA kernels.
gpt_oss   a learned sink for each head, a window in every other layer, YaRN, biases everywhere; one expert,
          which makes its mixture an MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADS, GROUPS, VOCABULARY, LAYERS, HIDDEN, FFN = 8, 2, 96, 2, 48, 64
YARN = dict(factor=4.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=16)


def qwen() -> tuple[torch.nn.Module, dict, dict]:
    """The model, Megatron's configuration of it, and arguments of its GPTModel."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25, mrope_section=[2, 1, 1])
    theirs = Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            head_dim=32, layer_types=["full_attention"] * LAYERS, rope_parameters=rope, rms_norm_eps=1e-5,
            **_sizes(),
        )
    )  # fmt: skip
    config = dict(
        kv_channels=32, attention_output_gate=True, qk_layernorm=True, add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
    )  # fmt: skip
    return _drawn(theirs), config, dict(position_embedding_type="rope", rotary_percent=0.25)


def gpt_oss() -> tuple[torch.nn.Module, dict, dict]:
    """As qwen."""
    from megatron.core.activations import quick_gelu
    from transformers import GptOssConfig, GptOssForCausalLM

    theirs = GptOssForCausalLM(
        GptOssConfig(
            head_dim=16, num_local_experts=1, num_experts_per_tok=1, sliding_window=6,
            rope_parameters=dict(rope_type="yarn", rope_theta=1e4, truncate=False, **YARN), **_sizes(),
        )
    )  # fmt: skip
    config = dict(
        kv_channels=16, softmax_type="learnable", window_size=(5, 0), window_attn_skip_freq=2,
        add_bias_linear=True, activation_func=quick_gelu, glu_linear_offset=1.0,
        activation_func_clamp_value=7.0,
    )  # fmt: skip
    yarn = dict(
        yarn_rotary_scaling_factor=YARN["factor"], yarn_beta_fast=YARN["beta_fast"],
        yarn_beta_slow=YARN["beta_slow"], yarn_mscale=1.0, yarn_mscale_all_dim=0.0,
        yarn_original_max_position_embeddings=YARN["original_max_position_embeddings"],
        yarn_correction_range_round_to_int=False,
    )  # fmt: skip
    return _drawn(theirs), config | {"later": yarn}, dict(position_embedding_type="yarn")


def _sizes() -> dict:
    return dict(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip


def _drawn(model: torch.nn.Module) -> torch.nn.Module:
    """With norms, biases and sinks that are not what they start as."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.5 if "sinks" in name else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.float().eval()


def greedy(theirs: torch.nn.Module, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The tokens after each prompt, every one from all before it, anew."""
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            with torch.no_grad():
                tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def standard_weights(theirs: torch.nn.Module) -> dict[str, Tensor]:
    """Megatron's names and layout, as on one rank."""
    state = theirs.state_dict()
    centred = 1.0 if "Qwen" in type(theirs).__name__ else 0.0  # its norms multiply by 1 + weight
    found = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "output_layer.weight": state["lm_head.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"] + centred,
    }
    for layer in range(LAYERS):
        ours, old = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        of_layer = {name.removeprefix(old): x for name, x in state.items() if name.startswith(old)}
        found[ours + "input_layernorm.weight"] = of_layer["input_layernorm.weight"] + centred
        found[ours + "pre_mlp_layernorm.weight"] = of_layer["post_attention_layernorm.weight"] + centred
        attention = ours + "self_attention."
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in of_layer:
                found[f"{attention}linear_qkv.{kind}"] = _mixed_qkv(of_layer, kind)
                found[f"{attention}linear_proj.{kind}"] = of_layer[f"self_attn.o_proj.{kind}"]
        for name in ("q", "k"):
            if f"self_attn.{name}_norm.weight" in of_layer:
                found[f"{attention}{name}_layernorm.weight"] = (
                    of_layer[f"self_attn.{name}_norm.weight"] + centred
                )
        if "self_attn.sinks" in of_layer:
            found[attention + "core_attention.softmax_offset"] = of_layer["self_attn.sinks"]
        found |= {f"{ours}mlp.{name}": x for name, x in _mlp(of_layer).items()}
    return found


def _mixed_qkv(of_layer: dict[str, Tensor], kind: str) -> Tensor:
    """Rows of each KV head: its query heads, their gates, its key, its value."""
    query, key, value = (
        of_layer[f"self_attn.{name}_proj.{kind}"].unflatten(0, (GROUPS, -1)) for name in "qkv"
    )
    if "self_attn.q_norm.weight" in of_layer:  # gated: each query head and then its gate
        heads = query.unflatten(1, (HEADS // GROUPS, 2, -1))
        query = torch.cat([heads[:, :, 0].flatten(1, 2), heads[:, :, 1].flatten(1, 2)], dim=1)
    return torch.cat([query, key, value], dim=1).flatten(0, 1)


def _mlp(of_layer: dict[str, Tensor]) -> dict[str, Tensor]:
    if "mlp.gate_proj.weight" in of_layer:
        up = torch.cat([of_layer["mlp.gate_proj.weight"], of_layer["mlp.up_proj.weight"]])
        return {"linear_fc1.weight": up, "linear_fc2.weight": of_layer["mlp.down_proj.weight"]}
    expert = {name: of_layer[f"mlp.experts.{name}"][0] for name in ("gate_up_proj", "gate_up_proj_bias")}
    up, bias = expert["gate_up_proj"].T, expert["gate_up_proj_bias"]  # gate and up in turns
    return {
        "linear_fc1.weight": torch.cat([up[::2], up[1::2]]),
        "linear_fc1.bias": torch.cat([bias[::2], bias[1::2]]),
        "linear_fc2.weight": of_layer["mlp.experts.down_proj"][0].T,
        "linear_fc2.bias": of_layer["mlp.experts.down_proj_bias"][0],
    }


def load(model: torch.nn.Module, weights: dict[str, Tensor], tp: int, rank: int) -> None:
    """This rank's part of the weights, in any layout of the attention layers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights.pop(name.replace("core_attention.core.", "core_attention."))
            parameter.copy_(_part(model, name, whole, tp, rank))
    assert not weights, f"not loaded: {sorted(weights)}"


def _part(model: torch.nn.Module, name: str, whole: Tensor, tp: int, rank: int) -> Tensor:
    if "self_attention.linear" in name:
        attention = model.get_submodule(name[: name.index(".linear_")])
        layout = attention.helix_plan.layout
        if "linear_qkv" in name:
            return whole[layout.qkv_rows(rank)]
        return whole[:, layout.proj_columns(rank)] if name.endswith("weight") else whole
    if "linear_fc1" in name:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    if name.endswith("linear_fc2.weight"):
        return whole.chunk(tp, dim=1)[rank]
    parts = ("word_embeddings", "output_layer", "softmax_offset")
    return whole.chunk(tp)[rank] if any(part in name for part in parts) else whole
