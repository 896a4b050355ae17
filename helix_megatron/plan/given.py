"""Megatron's flags that come with a model (after `--`, or in a YAML file): what the planner makes of each.

    the model    num-layers, hidden-size, ...        inputs.model_of_flags
    the work     seq-length, global-batch-size, ...  `work`: they stand for the planner's own options
    the layout   sequence-parallel, ...              chosen by the plan, whatever was given
    neither      lr, save, log-interval, ...         change neither the model nor the work of a step
    anything else                                    `unplanned`: named, as the plan is without it

A flag that none of these tables has is looked up in Megatron's own parser, which takes seconds to import.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from helix_megatron.megatron.yaml_config import nearest
from helix_megatron.partition.grid import HelixConfigError

MODEL = frozenset(
    """--num-layers --hidden-size --num-attention-heads --group-query-attention --num-query-groups
    --kv-channels --ffn-hidden-size --vocab-size --padded-vocab-size --make-vocab-size-divisible-by
    --swiglu --normalization --norm-epsilon --untie-embeddings-and-output-weights
    --position-embedding-type --rotary-percent --rotary-base --use-rotary-position-embeddings
    --use-rope-scaling --qk-layernorm --disable-bias-linear --add-qkv-bias
    --max-position-embeddings""".split()
)
WORK = frozenset(
    "--seq-length --micro-batch-size --global-batch-size --bf16 --fp16 --use-distributed-optimizer".split()
)
LAYOUT = frozenset(
    """--tensor-model-parallel-size --pipeline-model-parallel-size --sequence-parallel
    --recompute-activations --recompute-granularity --recompute-method --recompute-num-layers
    --attention-impl --helix-comm-type --helix-head-parallel-size --helix-dim-parallel-size
    --helix-query-placement --helix-kv-cache""".split()
)
# What layers without Transformer Engine need.
UNFUSED = frozenset(
    """--no-masked-softmax-fusion --no-rope-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion
    --no-bias-swiglu-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm""".split()
)
NEITHER = UNFUSED | frozenset(
    """--helix-host-mode --train-iters --train-samples --lr --min-lr --lr-decay-style --lr-decay-iters
    --lr-decay-samples --lr-warmup-iters --lr-warmup-samples --lr-warmup-fraction --lr-warmup-init
    --weight-decay --clip-grad --adam-beta1 --adam-beta2 --adam-eps --seed --init-method-std
    --use-cpu-initialization --use-mcore-models --data-path --data-cache-path --mock-data --split
    --num-workers --tokenizer-type --tokenizer-model --vocab-file --merge-file
    --no-create-attention-mask-in-dataloader --distributed-backend --distributed-timeout-minutes
    --eval-iters --eval-interval --log-interval --log-throughput --tensorboard-dir --save --load
    --save-interval --ckpt-format --helix-no-verify-checkpoint --helix-context-length""".split()
)
# These values change nothing either.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "--hidden-dropout": (0,),
    "--attention-dropout": (0,),
    "--context-parallel-size": (1,),
    "--expert-model-parallel-size": (1,),
    "--optimizer": ("adam",),
    "--attention-backend": ("auto", "flash", "fused"),
    "--helix-softmax": ("exact",),
}
# Groups of Megatron's parser whose flags change neither the model nor the work, with the exceptions.
_NEITHER_GROUPS = frozenset(
    {
        "options", "regularization", "profiling", "RNG and initialization", "learning rate and weight decay",
        "checkpointing", "validation", "data and dataloader", "tokenizer", "autoresume", "logging",
        "straggler", "workload inspector", "rerun engine", "one logger", "In-process restart", "ft_package",
        "msc", "fault injector",
    }
)  # fmt: skip
_NOT_NEITHER = frozenset(
    {"--freeze-all-layers", "--skip-train", "--encoder-seq-length", "--decoder-seq-length"}
)


def unplanned(flags: Mapping[str, Any], where: str, fused: bool) -> list[str]:
    """Flags that change the model or the work and that the plan is without, as notes.

    Args:
        flags: `--name` to value.
        where: for errors.
        fused: whether Transformer Engine's layers are planned.
    Raises:
        ValueError: a flag that neither Megatron nor Helix has, with the nearest that they have. Where
            Megatron is not installed a flag that is in no table is noted as unchecked instead.
    """
    notes = []
    others: dict[str, Any] = {}
    for flag, value in flags.items():
        if flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
            option = "--tp" if flag.startswith("--tensor") else "--pp"
            notes.append(f"{_shown(flag, value)}, as the plan chooses ({option} {value} keeps it)")
        elif flag == "--transformer-impl":
            if value != ("transformer_engine" if fused else "local"):
                layers = "Transformer Engine's layers" if fused else "local layers, as on a host"
                notes.append(f"{_shown(flag, value)} (planned: {layers})")
        elif flag not in MODEL | WORK | LAYOUT | NEITHER and not _same(value, _PLAIN.get(flag, ())):
            others[flag] = value
    if not others:
        return notes
    known = _known()
    for flag, value in others.items():
        if known is None:
            near = nearest(flag, MODEL | WORK | LAYOUT | NEITHER | set(_PLAIN)) if flag not in _PLAIN else ""
            unchecked = (
                f" (unchecked without megatron.training{near.rstrip('?')})" if flag not in _PLAIN else ""
            )
            notes.append(f"{_shown(flag, value)}{unchecked}")
        elif flag not in known:
            raise ValueError(
                f"{where}: neither Megatron nor Helix has a flag {flag}{nearest(flag, known) or '.'}"
            )
        elif value is not False and not _idle(flag, value, *known[flag]):
            notes.append(_shown(flag, value))
    return notes


def whole(flags: Mapping[str, Any], flag: str, where: str, default: int | None = None) -> int:
    """A positive whole number. ValueError that names the flag and its value."""
    value = flags.get(flag, default)
    try:
        number = None if isinstance(value, bool) or value != value else int(value)  # type: ignore[arg-type]
        if isinstance(value, float) and number != value:
            number = None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number < 1:
        given = "without a value" if value is True else repr(value)
        raise ValueError(f"{where}: {flag} is {given}; the planner needs a whole number of at least 1.")
    return number


def real(flags: Mapping[str, Any], flag: str, where: str, default: float, most: float | None = None) -> float:
    """A number above 0 and up to `most`. ValueError that names the flag and its value."""
    value = flags.get(flag, default)
    try:
        number = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf") or (most is not None and number > most):
        limit = f" and up to {most:g}" if most is not None else ""
        given = "without a value" if value is True else repr(value)
        raise ValueError(f"{where}: {flag} is {given}; the planner needs a number above 0{limit}.")
    return number


def on(flags: Mapping[str, Any], flag: str, where: str) -> bool:
    """Whether a flag without a value is given. ValueError for one with a value."""
    value = flags.get(flag, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {flag} is {value!r}; it takes no value (true or false in a YAML file).")
    return value


def one_of(flags: Mapping[str, Any], flag: str, where: str, choices: Iterable[str]) -> str:
    """One of some words, the first by default. ValueError that names the flag, its value and the words."""
    words = list(choices)
    value = flags.get(flag, words[0])
    if value not in words:
        raise ValueError(f"{where}: {flag} is {value!r}; the planner knows {', '.join(words)}.")
    return str(value)


def settled(option: str, value: Any, flag: str, given: Any, where: str) -> Any:
    """`value` of a planner's option, or what `flag` gives in its place; None where neither is given.

    Raises:
        ValueError: both are given and differ.
    """
    if value is not None and given is not None and value != given:
        raise ValueError(f"{option} {value} contradicts {flag} of {where}, which is {given}; leave one out.")
    return given if value is None else value


def dtype(flags: Mapping[str, Any], where: str) -> str | None:
    """bf16 or fp16; None where the flags say neither, which may be the model's alone."""
    named = [name for name in ("bf16", "fp16") if on(flags, f"--{name}", where)]
    if len(named) > 1:
        raise ValueError(f"{where}: --bf16 and --fp16 are both given; leave one out.")
    return named[0] if named else None


def _known() -> dict[str, tuple[argparse.Action, str]] | None:
    """Every flag of Megatron's parser and Helix's with its action and group; None without Megatron's."""
    from helix_megatron import compat

    with warnings.catch_warnings():  # Megatron's, of what is not installed
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            if not compat.has_training():
                return None
            from megatron.training import arguments
        except (HelixConfigError, ImportError):
            return None
        finally:
            logging.disable(logging.NOTSET)
    from helix_megatron.megatron.arguments import add_helix_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    if "--attention-impl" not in parser._option_string_actions:  # there after integrate.install()
        add_helix_arguments(parser)
    return {
        flag: (action, str(group.title))
        for group in parser._action_groups
        for action in group._group_actions
        for flag in action.option_strings
    }


def _idle(flag: str, value: Any, action: argparse.Action, group: str) -> bool:
    """Whether it changes neither the model nor the work: by its group, or as it has its default value."""
    if group in _NEITHER_GROUPS and flag not in _NOT_NEITHER:
        return True
    return flag not in _PLAIN and action.nargs != 0 and _same(value, (action.default,))


def _same(value: Any, others: Iterable[Any]) -> bool:
    """Whether a flag's value, text or not, is one of `others`."""
    for other in others:
        try:
            if value == other or (not isinstance(value, bool) and float(value) == float(other)):
                return True
        except (TypeError, ValueError):
            continue
    return False


def _shown(flag: str, value: Any) -> str:
    if value is True:
        return flag
    return " ".join([flag, *map(str, value if isinstance(value, list) else [value])])
