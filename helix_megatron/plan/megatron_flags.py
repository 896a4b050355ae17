"""Megatron's flags: those that come with a model (after `--`, or in a YAML file), and those of a layout.

    the model    num-layers, hidden-size, ...        inputs.shape_from_flags
    the work     seq-length, global-batch-size, ...  they stand for the planner's own options
    the layout   sequence-parallel, ...              chosen by the plan, whatever was given
    neither      lr, save, log-interval, ...         change neither the model nor the work of a step
    anything else                                    `unplanned_flags`: named, as the plan is without it

A flag that none of these tables has is looked up in Megatron's own parser, which takes seconds to import.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from helix_megatron.megatron.yaml_config import nearest
from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, Problem, Workload

Flags = Mapping[str, Any]
"""`--name` to value; true for a flag without one."""

MODEL = frozenset(
    """--num-layers --hidden-size --num-attention-heads --group-query-attention --num-query-groups
    --kv-channels --ffn-hidden-size --vocab-size --padded-vocab-size --make-vocab-size-divisible-by
    --swiglu --normalization --norm-epsilon --untie-embeddings-and-output-weights
    --position-embedding-type --rotary-percent --rotary-base --use-rotary-position-embeddings
    --use-rope-scaling --qk-layernorm --disable-bias-linear --add-qkv-bias
    --max-position-embeddings --num-experts --moe-ffn-hidden-size --moe-router-topk --moe-layer-freq
    --moe-shared-expert-intermediate-size --moe-shared-expert-gate --attention-output-gate --softmax-type
    --window-size --window-attn-skip-freq --quick-geglu --glu-linear-offset --activation-func-clamp-value
    --apply-layernorm-1p --experimental-attention-variant --linear-attention-freq --linear-num-key-heads
    --linear-num-value-heads --linear-key-head-dim --linear-value-head-dim --linear-conv-kernel-dim""".split()
)
WORK = frozenset(
    "--seq-length --micro-batch-size --global-batch-size --bf16 --fp16 --use-distributed-optimizer".split()
)
LAYOUT = frozenset(
    """--tensor-model-parallel-size --pipeline-model-parallel-size --sequence-parallel
    --recompute-activations --recompute-granularity --recompute-method --recompute-num-layers
    --attention-impl --helix-comm-type --helix-head-parallel-size --helix-dim-parallel-size
    --helix-query-placement --helix-kv-cache --expert-model-parallel-size
    --expert-tensor-parallel-size""".split()
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
# The plan chooses these sizes, unless an option of the planner's gives them.
_CHOSEN = {
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--expert-model-parallel-size": "--ep",
    "--expert-tensor-parallel-size": "--etp",
}
# These values change nothing either.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "--hidden-dropout": (0,),
    "--attention-dropout": (0,),
    "--context-parallel-size": (1,),
    "--moe-token-dispatcher-type": ("alltoall",),
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


# ---- values; each refuses others in one line that names the flag and its value ----
def parse_int_flag(flags: Flags, where: str, flag: str, default: int | None = None) -> int:
    """A positive whole number; YAML's 24.0 is one."""
    value = flags.get(flag, default)
    number = _number(value, int)
    if number < 1 or (isinstance(value, float) and number != value):
        needs = "a whole number of at least 1"
        raise ValueError(f"{where}: {flag} is {_quoted(value)}; the planner needs {needs}.")
    return int(number)


def parse_float_flag(flags: Flags, where: str, flag: str, default: float, most: float | None = None) -> float:
    """A number above 0 and up to `most`."""
    value = flags.get(flag, default)
    number = _number(value, float)
    if not 0 < number < float("inf") or (most is not None and number > most):
        needs = "a number above 0" + ("" if most is None else f" and up to {most:g}")
        raise ValueError(f"{where}: {flag} is {_quoted(value)}; the planner needs {needs}.")
    return number


def _number(value: Any, kind: type) -> float:
    """The number that a flag's value is; 0 for what is none."""
    try:
        return 0 if isinstance(value, bool) else kind(value)
    except (TypeError, ValueError, OverflowError):
        return 0


def parse_bool_flag(flags: Flags, where: str, flag: str) -> bool:
    """Whether a flag without a value is given."""
    value = flags.get(flag, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {flag} is {value!r}; it takes no value (true or false in a YAML file).")
    return value


def parse_choice_flag(flags: Flags, where: str, flag: str, *choices: str) -> str:
    """One of some words, the first by default."""
    value = flags.get(flag, choices[0])
    if value not in choices:
        raise ValueError(f"{where}: {flag} is {value!r}; the planner knows {', '.join(choices)}.")
    return str(value)


def parse_dtype_flags(flags: Flags, where: str) -> str | None:
    """bf16 or fp16; None where the flags say neither, which may be the model's alone."""
    named = [name for name in ("bf16", "fp16") if parse_bool_flag(flags, where, f"--{name}")]
    if len(named) > 1:
        raise ValueError(f"{where}: --bf16 and --fp16 are both given; leave one out.")
    return named[0] if named else None


def merge_option(option: str, value: Any, flag: str, of_flag: Any, where: str) -> Any:
    """`value` of an option, or what `flag` gives in its place; ValueError where both are given and differ."""
    if value is not None and of_flag is not None and value != of_flag:
        raise ValueError(
            f"{option} {value} contradicts {flag} of {where}, which is {of_flag}; leave one out."
        )
    return of_flag if value is None else value


def _quoted(value: Any) -> str:
    return "without a value" if value is True else repr(value)


# ---- what a plan is without ----
def unplanned_flags(flags: Flags, where: str, fused: bool) -> list[str]:
    """Flags that change the model or the work and that the plan is without, as notes.

    Args:
        where: for errors.
        fused: whether Transformer Engine's layers are planned.
    Raises:
        ValueError: a flag that neither Megatron nor Helix has, with the nearest that they have. Where
            Megatron is not installed a flag that is in no table is noted as unchecked instead.
    """
    notes, tables = [], MODEL | WORK | LAYOUT | NEITHER
    others: dict[str, Any] = {}
    for flag, value in flags.items():
        if option := _CHOSEN.get(flag):
            notes.append(f"{_words(flag, value)}, as the plan chooses ({option} {value} keeps it)")
        elif flag == "--transformer-impl":
            if value != ("transformer_engine" if fused else "local"):
                layers = "Transformer Engine's layers" if fused else "local layers, as on a host"
                notes.append(f"{_words(flag, value)} (planned: {layers})")
        elif flag not in tables and not _is_one_of(value, _PLAIN.get(flag, ())):
            others[flag] = value
    known = _parser_flags() if others else {}
    for flag, value in others.items():
        if known is None:
            near = nearest(flag, {*tables, *_PLAIN}).rstrip("?")
            unchecked = "" if flag in _PLAIN else f" (unchecked without megatron.training{near})"
            notes.append(f"{_words(flag, value)}{unchecked}")
        elif flag not in known:
            raise ValueError(
                f"{where}: neither Megatron nor Helix has a flag {flag}{nearest(flag, known) or '.'}"
            )
        elif value is not False and not _changes_nothing(flag, value, *known[flag]):
            notes.append(_words(flag, value))
    return notes


def _parser_flags() -> dict[str, tuple[argparse.Action, str]] | None:
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


def _changes_nothing(flag: str, value: Any, action: argparse.Action, group: str) -> bool:
    """Whether it changes neither the model nor the work: by its group, or as it has its default value."""
    if group in _NEITHER_GROUPS and flag not in _NOT_NEITHER:
        return True
    return flag not in _PLAIN and action.nargs != 0 and _is_one_of(value, (action.default,))


def _is_one_of(value: Any, others: Iterable[Any]) -> bool:
    """Whether a flag's value, text or not, is one of `others`."""
    for other in others:
        try:
            if value == other or (not isinstance(value, bool) and float(value) == float(other)):
                return True
        except (TypeError, ValueError):
            continue
    return False


# ---- flags to paste ----
_DATA = ("--mock-data", "--data-path", "--train-data-path", "--data-args-path", "--per-split-data-args-path")
_TRAINING = {"--lr": 1e-4, "--eval-iters": 0, "--eval-interval": 1000, "--log-interval": 1}


def layout_flags(problem: Problem, cluster: Cluster) -> dict[str, Any]:
    """Megatron's flags of a layout, with those that the cluster needs."""
    workload, experts = problem.workload, problem.shape.num_moe_experts
    found = problem.layout.flags(workload, bool(experts))
    if experts:
        found["--moe-token-dispatcher-type"] = "alltoall"
    if experts and workload.fused:
        found["--moe-grouped-gemm"] = True
    if not workload.fused:
        found |= {"--transformer-impl": "local"} | dict.fromkeys(sorted(UNFUSED), True)
    if cluster.slots:
        found["--helix-host-mode"] = True
    return found


def format_flags(flags: Flags) -> str:
    """Flags as words of a shell."""
    return " ".join(_words(flag, value, shlex.quote) for flag, value in flags.items())


def _words(flag: str, value: Any, quote: Any = str) -> str:
    items = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([flag, *(quote(str(item)) for item in items)])


def training_command(
    shape: ModelShape, model: Flags, layout: Layout, workload: Workload, cluster: Cluster
) -> str | None:
    """The command that trains this layout on a host as it stands; None for other work and other machines.

    Args:
        model: the flags that came with the model; empty for a preset or a config.json. Those of another
            layout are left out. Data, learning rate and number of steps are filled in where they say none.
    """
    if workload.kind != "train" or not cluster.slots or cluster.nodes > 1:
        return None
    dropped = WORK | LAYOUT | UNFUSED | {"--transformer-impl", "--helix-host-mode"}
    words = {flag: value for flag, value in model.items() if flag not in dropped and value is not False}
    words = words or shape.model_args(shape.padded_vocab_size(layout.tp))
    learned = shape.position_embedding_type == "learned_absolute"
    positions = shape.max_position_embeddings  # RoPE has as many as are asked for
    words["--max-position-embeddings"] = positions if learned else max(positions, workload.length)
    if not any(flag in words for flag in _DATA):
        words["--mock-data"] = True
    if "--tokenizer-type" not in words:
        words |= {"--tokenizer-type": "NullTokenizer", "--vocab-size": shape.vocab_size}
    if "--train-samples" not in words:
        words.setdefault("--train-iters", 10)
    words |= {flag: value for flag, value in _TRAINING.items() if flag not in words}
    words |= layout_flags(Problem(shape, layout, workload), cluster)
    launcher = f"python -m helix_megatron.launch --nproc-per-node {layout.world}"
    return f"{launcher} -m helix_megatron.pretrain_gpt {format_flags(words)}"
