"""Whether a checkpoint's weights mean this run's model; where they do not, loading would be silently wrong.

Compares the arguments saved in a checkpoint with the run's own. Pure: no torch, no Megatron.
"""

from __future__ import annotations

from argparse import Namespace

from helix_megatron.partition.grid import HelixConfigError

# What a model computes beyond the shapes of its weights, and how a user says it. Of these,
# --use-checkpoint-args restores only some.
_FUNCTION = {
    "layernorm_epsilon": "--norm-epsilon",
    "normalization": "--normalization",
    "apply_layernorm_1p": "--apply-layernorm-1p",
    "qk_layernorm": "--qk-layernorm",
    "qk_l2_norm": "--qk-l2-norm",
    "position_embedding_type": "--position-embedding-type",
    "rotary_base": "--rotary-base",
    "rotary_percent": "--rotary-percent",
    "rotary_interleaved": "--rotary-interleaved",
    "use_rope_scaling": "--use-rope-scaling",
    "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor",
    "swiglu": "--swiglu",
    "squared_relu": "--squared-relu",
    "softmax_type": "--softmax-type",
    "window_size": "--window-size",
    "window_attn_skip_freq": "--window-attn-skip-freq",
}


def refuse_other_softmax(saved: Namespace, ours: Namespace) -> None:
    """Refuse a checkpoint whose weights mean another model: per-slice softmax against exact, or another m.

    Exact attention has one meaning at every grid, vanilla Megatron included.
    """
    theirs, wanted = (getattr(args, "helix_slices_as_heads", 1) for args in (saved, ours))
    if theirs == wanted:
        return

    def name(slices: int) -> str:
        return f"per-slice softmax over {slices} slices" if slices > 1 else "exact attention"

    way_out = (
        f"load it with --attention-impl helix --helix-softmax per-slice --helix-dim-parallel-size {theirs}"
        if theirs > 1
        else "load it with --helix-softmax exact"
    )
    raise HelixConfigError(
        f"the checkpoint was trained with {name(theirs)}, this run has {name(wanted)}: another model, whose "
        f"weights would load and mean nothing; {way_out}"
    )


def refuse_other_function(saved: Namespace, ours: Namespace) -> None:
    """Refuse weights that would load and compute another function: other norm epsilon, RoPE, activation, ...

    With --finetune, which begins a training of its own, it is a warning.
    """
    differ = [
        f"{flag} is {getattr(ours, name)} here and was {getattr(saved, name)} in training"
        for name, flag in _FUNCTION.items()
        if hasattr(saved, name) and hasattr(ours, name) and getattr(saved, name) != getattr(ours, name)
    ]
    if not differ:
        return
    if not ours.finetune:
        raise HelixConfigError(
            f"the checkpoint's weights belong to another model: {'; '.join(differ)} (--use-checkpoint-args "
            "does not restore all of these). Give the flags of the training, or --finetune if you mean it"
        )
    if ours.rank == 0:
        print(f"> Helix warning: --finetune of another model than was saved: {'; '.join(differ)}", flush=True)
