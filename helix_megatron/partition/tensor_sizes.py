"""What a tensor-parallel size must divide besides heads, from Megatron's arguments, before a model is built.

Pure: no torch, no Megatron. Attention is the grid's affair (grid.py), and the vocabulary is padded.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from helix_megatron.partition.grid import HelixConfigError

LINEAR_ATTENTION = ("gated_delta_net", "gdn", "gdn2")
"""Values of --experimental-attention-variant that are linear attention; the layers between are ordinary."""


def indivisible(args: Namespace, tp: int) -> list[str]:
    """What `tp` ranks cannot hold equal parts of; Megatron's validated arguments, but for their own tp."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    experts = args.num_experts is not None and (pattern is None or "E" in pattern)
    follows = args.expert_tensor_parallel_size == args.tensor_model_parallel_size
    expert_tp = tp if follows else args.expert_tensor_parallel_size
    sequence = args.seq_length // args.context_parallel_size
    shared = getattr(args, "moe_shared_expert_intermediate_size", None)
    parts = [
        ("the MLP's --ffn-hidden-size", args.ffn_hidden_size, tp, _has_dense_layers(args)),
        ("an expert's --moe-ffn-hidden-size", args.moe_ffn_hidden_size, expert_tp, experts),
        ("--moe-shared-expert-intermediate-size", shared, tp, experts and shared is not None),
        *_state_space_parts(args, pattern or "", tp),
        (
            "--vocab-size (with --no-pad-vocab-size)",
            args.vocab_size,
            tp,
            not getattr(args, "pad_vocab_size", True) and args.vocab_size is not None,
        ),
        (
            "a sequence (--sequence-parallel, --seq-length over --context-parallel-size)",
            sequence,
            tp,
            args.sequence_parallel and tp > 1,
        ),
    ]
    return [f"{size} of {what}" for what, size, ranks, used in parts if used and size % ranks]


def _state_space_parts(args: Namespace, pattern: str, tp: int) -> list[tuple[str, int, int, bool]]:
    """What Megatron's own Mamba (M) and gated delta net (G) layers deal out: whole heads and groups."""
    linear = "G" in pattern or getattr(args, "experimental_attention_variant", None) in LINEAR_ATTENTION
    parts = []
    if "M" in pattern:
        heads = args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim  # Mamba expands twice
        parts += [
            ("the Mamba layers' heads (--mamba-num-heads)", heads, tp, True),
            ("the Mamba layers' --mamba-num-groups", args.mamba_num_groups, tp, True),
        ]
    if linear:
        parts += [
            ("the GDN layers' --linear-num-key-heads", args.linear_num_key_heads, tp, True),
            ("the GDN layers' --linear-num-value-heads", args.linear_num_value_heads, tp, True),
        ]
    return parts


def _has_dense_layers(args: Namespace) -> bool:
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is not None:
        return "-" in pattern
    if args.num_experts is None:
        return True
    frequency = args.moe_layer_freq  # every which layer has experts, or a 1 for each that has
    return 0 in frequency if isinstance(frequency, list) else frequency > 1


def refuse_indivisible(args: Namespace, legal: Callable[[int], bool]) -> None:
    """Refuse a tensor-parallel size that does not divide the model.

    Args:
        args: Megatron's validated arguments.
        legal: whether attention can be split over so many ranks.

    Raises:
        HelixConfigError: with the numbers, and the nearest sizes that work.
    """
    tp = args.tensor_model_parallel_size
    wrong = indivisible(args, tp)
    if not wrong:
        return
    ranks = args.world_size // (args.pipeline_model_parallel_size * args.context_parallel_size)
    sizes = [t for t in range(1, 2 * tp + 1) if ranks % t == 0 and legal(t) and not indivisible(args, t)]
    nearest = sorted(sorted(sizes, key=lambda t: abs(t - tp))[:3])
    way_out = (
        f"tensor-parallel sizes that work on these ranks: {', '.join(map(str, nearest))}"
        if nearest
        else "no size works on these ranks; change the sizes of the model"
    )
    raise HelixConfigError(
        f"--tensor-model-parallel-size {tp} does not divide {' nor '.join(wrong)}; {way_out}"
    )
