"""Which Megatron tensor holds which Hugging Face tensors, and how they are merged and split.

Pure tensor arithmetic. Shape legend: V vocabulary, h hidden, L layers, H query heads, G KV heads, d head
dimension, f feed-forward.

    Megatron (one tensor for all layers: [L, ...])        Hugging Face (a tensor a layer)
    linear_qkv   [for each KV head: H/G queries, k, v]    q_proj [H d, h], k_proj [G d, h], v_proj [G d, h]
    linear_fc1   [gate; up]                               gate_proj [f, h], up_proj [f, h]
    word_embeddings, output_layer, rows padded            embed_tokens [V, h], lm_head [V, h]
    everything else                                       the same tensor

Both rotate halves of a head (x, x + d/2), so RoPE needs no permutation.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Modules whose state in a checkpoint also has an `_extra_state` entry, empty without FP8. The local layers
# ask for the first four, Transformer Engine's for all of them.
EXTRA_STATES = (
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.self_attention.q_layernorm",
    "decoder.layers.self_attention.k_layernorm",
    "decoder.final_layernorm",
)


@dataclass(frozen=True)
class Entry:
    """One tensor of the Megatron checkpoint: all of `key`, or layer `layer` of it.

    Args:
        key: name in the checkpoint.
        layer: index along the leading [L] axis; None for tensors outside the layers.
        names: the Hugging Face tensors it holds.
        shape: of the tensor, without the layer axis.
        kind: "same", "qkv", "stack" (one after another along axis 0) or "vocab" (rows padded with zeros).
    """

    key: str
    layer: int | None
    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str = "same"


def entries(args: Namespace, vocab_size: int) -> Iterator[Entry]:
    """Every tensor of the model described by Megatron arguments `args`, in the order of the model.

    vocab_size: V without padding; the padded one is args.padded_vocab_size.
    """
    h, d, f = args.hidden_size, args.kv_channels, args.ffn_hidden_size
    heads, groups = args.num_attention_heads, args.num_query_groups
    vocab = (args.padded_vocab_size, h)
    yield Entry("embedding.word_embeddings.weight", None, ("model.embed_tokens.weight",), vocab, "vocab")
    for layer in range(args.num_layers):
        theirs, attention, mlp = f"model.layers.{layer}.", "self_attention.", "mlp."

        def entry(key: str, shape: tuple, *names: str, kind: str = "same", at: str = theirs, n: int = layer):
            return Entry(f"decoder.layers.{key}", n, tuple(at + name for name in names), shape, kind)

        yield entry(attention + "linear_qkv.layer_norm_weight", (h,), "input_layernorm.weight")
        for part, shape in (("weight", (h,)), ("bias", ())):
            if part == "bias" and not (args.add_qkv_bias or args.add_bias_linear):
                continue
            rows = ((heads + 2 * groups) * d, *shape)
            names = (f"self_attn.{x}_proj.{part}" for x in "qkv")
            yield entry(attention + f"linear_qkv.{part}", rows, *names, kind="qkv")
        if args.qk_layernorm:
            yield entry(attention + "q_layernorm.weight", (d,), "self_attn.q_norm.weight")
            yield entry(attention + "k_layernorm.weight", (d,), "self_attn.k_norm.weight")
        yield entry(attention + "linear_proj.weight", (h, heads * d), "self_attn.o_proj.weight")
        yield entry(mlp + "linear_fc1.layer_norm_weight", (h,), "post_attention_layernorm.weight")
        gate_up = ("mlp.gate_proj.{}", "mlp.up_proj.{}")
        names = (name.format("weight") for name in gate_up)
        yield entry(mlp + "linear_fc1.weight", (2 * f, h), *names, kind="stack")
        yield entry(mlp + "linear_fc2.weight", (h, f), "mlp.down_proj.weight")
        if args.add_bias_linear:
            names = (name.format("bias") for name in gate_up)
            yield entry(attention + "linear_proj.bias", (h,), "self_attn.o_proj.bias")
            yield entry(mlp + "linear_fc1.bias", (2 * f,), *names, kind="stack")
            yield entry(mlp + "linear_fc2.bias", (h,), "mlp.down_proj.bias")
    yield Entry("decoder.final_layernorm.weight", None, ("model.norm.weight",), (h,))
    if args.untie_embeddings_and_output_weights:
        yield Entry("output_layer.weight", None, ("lm_head.weight",), vocab, "vocab")


def hf_shapes(entry: Entry, args: Namespace, vocab_size: int) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors of an entry, in the order of its names."""
    rest = entry.shape[1:]
    if entry.kind == "vocab":
        return [(vocab_size, *rest)]
    if entry.kind == "stack":
        return [(entry.shape[0] // 2, *rest)] * 2
    if entry.kind == "qkv":
        q, kv = args.num_attention_heads * args.kv_channels, args.num_query_groups * args.kv_channels
        return [(q, *rest), (kv, *rest), (kv, *rest)]
    return [entry.shape]


def merge(entry: Entry, tensors: list[Tensor], args: Namespace) -> Tensor:
    """The Megatron tensor, of entry.shape, from the Hugging Face ones (in the order of entry.names)."""
    if entry.kind == "qkv":
        groups = args.num_query_groups
        by_group = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]  # [G, rows of a KV head, ...]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    if entry.kind == "stack":
        return torch.cat(tensors)
    (tensor,) = tensors
    if entry.kind == "vocab" and tensor.shape[0] < entry.shape[0]:
        padding = tensor.new_zeros(entry.shape[0] - tensor.shape[0], *tensor.shape[1:])
        return torch.cat([tensor, padding])
    return tensor


def split(entry: Entry, tensor: Tensor, args: Namespace, vocab_size: int) -> list[Tensor]:
    """The Hugging Face tensors (in the order of entry.names) of a Megatron tensor: the inverse of merge."""
    if entry.kind == "qkv":
        d, ratio = args.kv_channels, args.num_attention_heads // args.num_query_groups
        by_group = tensor.unflatten(0, (args.num_query_groups, -1))
        return [part.flatten(0, 1) for part in by_group.split([ratio * d, d, d], dim=1)]
    if entry.kind == "stack":
        return list(tensor.chunk(2))
    return [tensor[:vocab_size]] if entry.kind == "vocab" else [tensor]
