"""Elements of the parameters of a rank, term by term; what padding adds to Megatron's buffers apart.

Symbols as in memory.py; of gated delta nets (GDN) k and v are the widths of all key and value heads.
"""

from __future__ import annotations

from helix_megatron.plan.layout import Problem
from helix_megatron.plan.terms import Term


def parameters(problem: Problem, stage: int) -> list[Term]:
    """Elements of the parameters of a rank."""
    return dense_parameters(problem, stage) + expert_parameters(problem)


def expert_parameters(problem: Problem) -> list[Term]:
    """Elements of the experts of a rank, whose replicas are edp."""
    shape, layout = problem.shape, problem.layout
    if not shape.num_moe_experts:
        return []
    h, f, up = shape.hidden_size, shape.moe_ffn_hidden_size / layout.etp, (2 if shape.gated else 1)
    experts = {"layers": problem.layers, "experts/ep": shape.num_moe_experts / layout.ep}
    terms = [Term("experts", {**experts, "h": h, "matrices": up + 1, "f/etp": f})]
    if shape.add_bias_linear:
        terms.append(Term("biases of experts", {**experts, "rows": up * f + h}))
    return terms


def dense_parameters(problem: Problem, stage: int) -> list[Term]:
    """Elements of all other parameters of a rank, whose replicas are dp."""
    shape, layout = problem.shape, problem.layout
    h, tp, layers = shape.hidden_size, layout.tp, problem.layers
    norm = 2 if shape.normalization == "LayerNorm" else 1
    rows = shape.padded_vocab_size(tp) / tp
    terms = [
        *_attention_parameters(problem, norm),
        *_gdn_parameters(problem, norm),
        *_mlp_parameters(problem),
        Term("norms", {"layers": layers, "norms": 2, "vectors": norm, "h": h}),
    ]
    if stage == 0:
        terms.append(Term("embedding", {"h": h, "V/tp": rows}))
        if shape.position_embedding_type == "learned_absolute":
            terms.append(Term("position embedding", {"h": h, "positions": shape.max_position_embeddings}))
    if stage == layout.pp - 1:
        terms.append(Term("final norm", {"vectors": norm, "h": h}))
        if stage or not shape.tied_embeddings:
            terms.append(Term("output layer", {"h": h, "V/tp": rows}))
    return terms


def _attention_parameters(problem: Problem, norm: int) -> list[Term]:
    """Elements of attention layers; `norm` vectors in a norm."""
    shape, tp, layers = problem.shape, problem.layout.tp, {"layers": problem.attention_layers}
    h, qkv = shape.hidden_size, problem.qkv_width / tp
    heads = shape.num_attention_heads * shape.kv_channels / tp
    terms = [
        Term("linear_qkv", {**layers, "h": h, "(H+2G)d/tp": qkv}),
        Term("linear_proj", {**layers, "h": h, "Hd/tp": heads}),
    ]
    if shape.add_bias_linear:
        terms.append(Term("biases of attention", {**layers, "rows": qkv + h}))
    elif shape.add_qkv_bias:
        terms.append(Term("QKV bias", {**layers, "(H+2G)d/tp": qkv}))
    if shape.qk_layernorm:
        terms.append(Term("QK norms", {**layers, "norms": 2, "vectors": norm, "d": shape.kv_channels}))
    if shape.softmax_type == "learnable":
        terms.append(Term("attention sinks", {**layers, "H/tp": shape.num_attention_heads / tp}))
    return terms


def _gdn_parameters(problem: Problem, norm: int) -> list[Term]:
    """Elements of gated delta nets: projections, convolution, two gates of a head, norm of a head."""
    shape, tp = problem.shape, problem.layout.tp
    layers = {"GDN layers": problem.layers - problem.attention_layers}
    if not shape.linear_attention_freq:
        return []
    keys, values = shape.gdn_widths
    heads = shape.linear_num_value_heads
    columns = (2 * keys + 2 * values + 2 * heads) / tp
    convolved = {"channels/tp": (2 * keys + values) / tp, "kernel": shape.linear_conv_kernel_dim}
    return [
        Term("GDN in_proj", {**layers, "h": shape.hidden_size, "(2k+2v+2 heads)/tp": columns}),
        Term("GDN out_proj", {**layers, "h": shape.hidden_size, "v/tp": values / tp}),
        Term("GDN conv1d", {**layers, **convolved}),
        Term("GDN gates", {**layers, "A_log, dt_bias": 2, "heads/tp": heads / tp}),
        Term("GDN out_norm", {**layers, "vectors": norm, "head": shape.linear_value_head_dim}),
    ]


def _mlp_parameters(problem: Problem) -> list[Term]:
    """Elements of a dense MLP or, beside experts, of the router and the shared expert."""
    shape, tp, layers = problem.shape, problem.layout.tp, {"layers": problem.layers}
    h, up = {"h": shape.hidden_size}, (2 if shape.gated else 1)
    if not shape.num_moe_experts:
        f = shape.ffn_hidden_size / tp
        terms = [
            Term("linear_fc1", {**layers, **h, "gate and up" if up == 2 else "up": up, "f/tp": f}),
            Term("linear_fc2", {**layers, **h, "f/tp": f}),
        ]
        biases = {"rows": up * f + shape.hidden_size}
        return [*terms, *([Term("biases of the MLP", {**layers, **biases})] if shape.add_bias_linear else [])]
    terms = [Term("router", {**layers, **h, "experts": shape.num_moe_experts})]
    if shape.add_bias_linear:
        terms.append(Term("bias of the router", {**layers, "experts": shape.num_moe_experts}))
    if shape.moe_shared_expert_intermediate_size:
        size = {"matrices": up + 1, "f/tp": shape.moe_shared_expert_intermediate_size / tp}
        terms.append(Term("shared expert", {**layers, **h, **size}))
    if shape.moe_shared_expert_gate:
        terms.append(Term("gate of the shared expert", {**layers, **h}))
    return terms
