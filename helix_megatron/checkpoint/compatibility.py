"""Whether a checkpoint's weights mean this run's model; where they do not, loading would be silently wrong.

Compares the arguments saved in a checkpoint with the run's own, by what they mean and not by how they are
written: (8, 0) is [8, 0], `--no-rope-freq 2` is [0, 1] for two layers, and what another argument turns on
counts with it alone. Which arguments matter is data: model_arguments.py. Pure: no torch, no Megatron.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

from helix_megatron.checkpoint.model_arguments import DEFAULT_SPECS, FORMER_NAMES, FUNCTION, flag_of
from helix_megatron.partition.grid import HelixConfigError

# Every Megatron and converter writes these. A checkpoint that lacks one holds a part of the arguments, and
# what it leaves out is unknown; in any other one that is what Megatron has when nothing is given.
_ALWAYS_WRITTEN = ("position_embedding_type", "normalization", "swiglu", "add_bias_linear")
_DEFAULTS = {name: default for group in FUNCTION for name, default in group.arguments.items()}
_SIZES = {name for group in FUNCTION if group.sizes for name in group.arguments}
_VOCABULARY = "padded_vocab_size"


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


# ---- what arguments mean ----
def _as_saved(args: Namespace, name: str) -> Any:
    """An argument as Megatron holds it, under a former name too; a list as a tuple; None when it lacks it."""
    value = getattr(args, name, None)
    if value is None and name in FORMER_NAMES:
        value = getattr(args, FORMER_NAMES[name], None)
    if value is None and name == "add_bias_linear" and hasattr(args, "disable_bias_linear"):
        value = not args.disable_bias_linear
    return tuple(value) if isinstance(value, list) else value


def _by_layer(rule: Callable[[int, int], bool]) -> Callable[[Any, Namespace], Any]:
    """Of a frequency N or a list: whether each layer has it. rule(layer from 0, N)."""

    def of_every_layer(value: Any, args: Namespace) -> Any:
        if isinstance(value, int) and value and args.num_layers:
            value = [rule(layer, value) for layer in range(args.num_layers)]
        return tuple(map(int, value)) if isinstance(value, tuple | list) else value

    return of_every_layer


def _routing(value: Any, args: Namespace) -> Any:
    """Load balancing by a loss leaves the routing alone; these two are routings of their own."""
    kinds = {value} if isinstance(value, str) else set(value)
    return tuple(sorted(kinds & {"sinkhorn", "quantile_balancing"}))


def _json(value: Any, args: Namespace) -> Any:
    try:
        return json.loads(value) if value else None
    except ValueError:
        return value


def names_default_layers(spec: Iterable[str] | None) -> bool:
    """Whether `--spec` names the layers that Megatron builds without it (Helix's where it is on)."""
    return not spec or tuple(spec) in DEFAULT_SPECS


# name → what a value of it means, given the other arguments.
_MEANING: dict[str, Callable[[Any, Namespace], Any]] = {
    "num_experts": lambda value, args: value or None,
    "experimental_attention_variant": lambda value, args: "gdn" if value == "gated_delta_net" else value,
    "mtp_num_layers": lambda value, args: value or None,
    "spec": lambda value, args: (  # "local" as --transformer-impl
        None if value in ("local", ("local",)) or names_default_layers(value) else value
    ),
    "hybrid_layer_pattern": lambda value, args: value and value.replace("|", ""),  # | cuts the pipeline
    "heterogeneous_layers_config_encoded_json": _json,
    "no_rope_freq": _by_layer(lambda layer, every: (layer + 1) % every == 0),
    "window_attn_skip_freq": _by_layer(lambda layer, every: (layer + 1) % every != 0),
    "moe_layer_freq": _by_layer(lambda layer, every: layer % every == 0),
    "linear_attention_freq": _by_layer(lambda layer, every: (layer + 1) % every != 0),
    "activation_func": lambda value, args: getattr(value, "__name__", value),
    "add_qkv_bias": lambda value, args: bool(value or args.add_bias_linear),
    "mup_base_hidden_size": lambda value, args: value or args.hidden_size,
    "moe_ffn_hidden_size": lambda value, args: value or args.ffn_hidden_size,
    "moe_router_load_balancing_type": _routing,
}


def _meaning(name: str, value: Any, args: Namespace) -> Any:
    value = _DEFAULTS[name] if value is None else value
    return _MEANING[name](value, args) if name in _MEANING else value


def _all_meanings(args: Namespace) -> Namespace:
    """Every function-changing argument by its meaning, those included that nothing reads."""
    found = Namespace(**{
        name: default if (value := _as_saved(args, name)) is None else value
        for name, default in _DEFAULTS.items()
    })  # fmt: skip
    if getattr(args, "use_rotary_position_embeddings", False):
        found.position_embedding_type = "rope"
    if not getattr(args, "group_query_attention", found.num_query_groups is not None):
        found.num_query_groups = found.num_attention_heads
    if getattr(args, "heterogeneous_layers_config_path", None) is None:  # without it Megatron reads no JSON
        found.heterogeneous_layers_config_encoded_json = None
    of_predictions = getattr(args, "mtp_hybrid_override_pattern", None)  # of older Megatrons
    if of_predictions and found.hybrid_layer_pattern and "/" not in found.hybrid_layer_pattern:
        found.hybrid_layer_pattern += f"/{of_predictions}" * (found.mtp_num_layers or 0)
    for name, meaning in _MEANING.items():
        setattr(found, name, meaning(getattr(found, name), found))
    return found


def effective_arguments(args: Namespace) -> dict[str, Any]:
    """The function-changing arguments that are read, name → meaning.

    Args:
        args: Megatron's, after validation: what it derives (head sizes, padded vocabulary) is there.
    """
    found = _all_meanings(args)
    return {
        name: getattr(found, name) for group in FUNCTION if group.when(found) for name in group.arguments
    }


def missing_arguments(args: Namespace) -> list[str]:
    """What every Megatron and converter writes and these arguments lack; [] of a whole set of arguments."""
    return [name for name in _ALWAYS_WRITTEN if _as_saved(args, name) is None]


def non_default_arguments(args: Namespace) -> dict[str, Any]:
    """Those of `effective` that Megatron would not have by itself; sizes of weights and vocabulary apart."""
    found = _all_meanings(args)
    return {
        name: value
        for name, value in effective_arguments(args).items()
        if name not in _SIZES | {_VOCABULARY} and value != _meaning(name, None, found)
    }


def format_flags(meanings: dict[str, Any]) -> list[str]:
    """The command line that gives arguments these meanings.

    Raises:
        ValueError: no flag sets one of them.
    """
    words = []
    for name, value in meanings.items():
        flag = flag_of(name)
        if flag is None:
            raise ValueError(f"no flag of Megatron sets {name}, which is {value!r}.")
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, tuple):
            listed = ",".join(map(str, value))
            by_layer = f"{flag}=[{listed}]" if name.endswith("_freq") else f"{flag}={listed}"
            words += [by_layer] if name.endswith(("_freq", "_size")) else [flag, *map(str, value)]
        else:
            whole = isinstance(_DEFAULTS[name], int) and value == int(value)
            words.append(f"{flag}={int(value) if whole else value}")
    return words


# ---- comparing ----
def _missing_tokens(saved: Namespace, ours: Namespace) -> str | None:
    """Rows of the embedding that mean a token in the checkpoint and have no row here."""
    theirs, rows = (getattr(args, _VOCABULARY, None) for args in (saved, ours))
    if theirs is None or rows is None:
        return None
    tokens = getattr(saved, "vocab_size", None)
    if tokens is None or tokens > theirs:  # known up to the padding
        tensor_parallel = getattr(saved, "tensor_model_parallel_size", None) or 1
        tokens = theirs - (getattr(saved, "make_vocab_size_divisible_by", None) or 128) * tensor_parallel + 1
    if tokens <= rows:
        return None
    return f"the vocabulary has {rows} rows here (--vocab-size, tokenizer) and at least {tokens} in training"


def _difference(name: str, here: Any, there: Any) -> str:
    """'--norm-epsilon is 0.01 here and was 1e-05 in training'."""
    flag = flag_of(name) or f"{name} (which no flag sets)"
    default = _DEFAULTS[name]

    def said(value: Any) -> str:
        if isinstance(value, bool):
            return "given" if value != default else "not given"
        if value is None:
            return "not given"
        return str(list(value) if isinstance(value, tuple) else value)

    return f"{flag} is {said(here)} here and was {said(there)} in training"


def differences(saved: Namespace, ours: Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """How the function of a checkpoint's weights differs from this run's.

    Returns:
        ({argument: the difference in words}, the same for those that an incomplete checkpoint leaves unsaid).
    """
    theirs, mine = effective_arguments(saved), effective_arguments(ours)
    complete = not missing_arguments(saved)
    known: dict[str, str] = {}
    unsaid: dict[str, str] = {}
    apart = {_VOCABULARY}
    if mine["hybrid_layer_pattern"] and not theirs["hybrid_layer_pattern"]:
        apart |= {"hybrid_layer_pattern", "num_layers", "spec"}  # Megatron pairs a GPT's layers, or refuses
    for name in (name for name in mine if name in theirs and name not in apart):
        if mine[name] == theirs[name] or (name in _SIZES and theirs[name] is None):
            continue
        into = known if complete or hasattr(saved, name) else unsaid
        into[name] = _difference(name, mine[name], theirs[name])
    if missing := _missing_tokens(saved, ours):
        known[_VOCABULARY] = missing
    return known, unsaid


def refuse_other_function(saved: Namespace, ours: Namespace) -> None:
    """Refuse weights that would load and compute another function: other norm epsilon, RoPE, activation, ...

    With --finetune, which begins a training of its own, it is a warning.
    """
    known, unsaid = differences(saved, ours)
    if known and not ours.finetune:
        raise HelixConfigError(
            f"the checkpoint's weights belong to another model: {_joined(known.values())} "
            "(--use-checkpoint-args does not restore all of these). Give the flags of the training, or "
            "--finetune if you mean it"
        )
    if ours.rank != 0:
        return
    if known:
        print(
            f"> Helix warning: --finetune of another model than was saved: {_joined(known.values())}",
            flush=True,
        )
    if unsaid:
        names = ", ".join(flag_of(name) or name for name in unsaid)
        print(f"> Helix warning: the checkpoint does not say whether it was trained with {names}", flush=True)


def _joined(words: Iterable[str]) -> str:
    return "; ".join(words)
