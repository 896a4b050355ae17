"""What a comparison is: one model, a list of variants of how to run it, and how much to run of each.

name: paper shape on the host
host: true
world_size: 16
steps: 4
MODEL_ARGS: {num-layers: 16, …}      # as in helix_megatron.yaml_config
ENV_VARS: {}
variants:
  - {name: Megatron TP=16, attention_impl: megatron, args: {tensor-model-parallel-size: 16}}
  - {name: Helix 4x4, attention_impl: helix, args: {tensor-model-parallel-size: 16, …}}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from helix_megatron import yaml_config

# What a variant may change without becoming another model: its losses must stay those of its peers.
_LAYOUT_FLAGS = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--micro-batch-size",
    "--sequence-parallel",
    "--use-distributed-optimizer",
    "--overlap-grad-reduce",
    "--overlap-param-gather",
    "--recompute-granularity",
    "--recompute-method",
    "--recompute-num-layers",
)
_FIXED = {
    "--log-interval": 1,
    "--eval-iters": 0,
    "--eval-interval": 1000,
    "--use-cpu-initialization": True,
}  # the harness needs these
_OWN = ("--train-iters", "--attention-impl", yaml_config.HOST_FLAG)  # said by other keys of the file


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    name: str
    """Shown in the table; unique."""
    attention_impl: str = "megatron"
    """`megatron` or `helix`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Flags on top of MODEL_ARGS, same form."""
    may_fail: bool = False
    """Its failure is a finding (Megatron refuses this shape, say) and not an error of the comparison."""


@dataclass(frozen=True)
class CompareConfig:
    """The whole file, checked."""

    name: str
    """Title of the report."""
    variants: tuple[Variant, ...]
    """In the order they run; the first finished one of each model is the reference of its losses."""
    model_args: dict[str, Any]
    """Megatron's flags common to all variants."""
    env_vars: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank."""
    host: bool = False
    """Run on CPU cores over gloo; otherwise on GPUs, through torch.distributed.run."""
    world_size: int = 1
    """Ranks of every variant."""
    nnodes: int = 1
    """GPU runs: machines that share the ranks; `helix compare` is started on each of them."""
    steps: int = 3
    """Measured training steps."""
    warmup_steps: int = 1
    """Training steps before them, in the losses but not in the times."""
    forward_iterations: int = 2
    """Measured forward passes of a global batch."""
    prompt_length: int = 16
    """Tokens of the prompt that decode starts from."""
    decode_tokens: int = 4
    """Measured tokens of greedy decode; 0 leaves decode out."""
    decode_batch_size: int = 1
    """Sequences decoded together."""
    variant_timeout_s: float = 300.0
    """A variant that is not done by then is killed and becomes a row that says so."""
    loss_tolerance: float = 1e-4
    """Largest absolute difference of losses between variants of the same model."""

    def flags(self, variant: Variant) -> dict[str, Any]:
        """All flags of one variant, `--name` → value: MODEL_ARGS, its own, and what the harness fixes."""
        flags = {**self.model_args, **variant.args, **_FIXED}
        flags["--train-iters"] = self.warmup_steps + self.steps
        flags["--attention-impl"] = variant.attention_impl
        if self.host:
            flags[yaml_config.HOST_FLAG] = True
        return flags

    def model_key(self, variant: Variant) -> str:
        """Variants with equal keys are the same model and must have the same losses.

        The per-slice softmax is a model of its own for every number of slices.
        """
        flags = {**self.model_args, **variant.args}
        kept = {k: v for k, v in flags.items() if k not in _LAYOUT_FLAGS and not k.startswith("--helix-")}
        if variant.attention_impl == "helix" and flags.get("--helix-softmax") == "per-slice":
            kept["per-slice"] = flags.get("--helix-dim-parallel-size")
        return json.dumps(kept, sort_keys=True, default=str)


_NAMES = {"model_args": "MODEL_ARGS", "env_vars": "ENV_VARS"}  # field → key in the file


def load(path: str | Path) -> CompareConfig:
    """Read and check a comparison. ValueError, in one line, for what cannot be one."""
    return parse(yaml_config.read_yaml(path), str(path))


def parse(document: dict[str, Any], where: str) -> CompareConfig:
    """A YAML document → CompareConfig. ValueError naming `where`, the key, and what would do."""
    keys = {_NAMES.get(f.name, f.name): f for f in fields(CompareConfig)}
    yaml_config.check_keys(document, keys, where)
    values: dict[str, Any] = {"name": Path(where).stem}
    for key, value in document.items():
        values[keys[key].name] = value
    values["model_args"] = _model_flags(document.get("MODEL_ARGS"), f"{where}: MODEL_ARGS")
    values["env_vars"] = yaml_config.env_vars(document.get("ENV_VARS"), f"{where}: ENV_VARS")
    values["variants"] = _variants(document.get("variants"), where)
    for name, least in _NUMBERS.items():
        if name in values:
            _check_number(name, values[name], least, where)
    if not isinstance(values.get("host", False), bool):
        raise ValueError(f"{where}: host is {values['host']!r}; it is true (CPU) or false (GPUs).")
    config = CompareConfig(**values)
    if config.world_size % config.nnodes:
        given = f"world_size {config.world_size}"
        raise ValueError(f"{where}: {given} is not a multiple of nnodes={config.nnodes}.")
    return config


_NUMBERS = {  # key → the least it may be
    "world_size": 1,
    "nnodes": 1,
    "steps": 1,
    "warmup_steps": 0,
    "forward_iterations": 1,
    "prompt_length": 1,
    "decode_tokens": 0,
    "decode_batch_size": 1,
    "variant_timeout_s": 0.0,
    "loss_tolerance": 0.0,
}


def _check_number(key: str, value: Any, least: float, where: str) -> None:
    whole = isinstance(least, int)
    right_type = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not right_type or value < least:
        kind = "a whole number" if whole else "a number (1.0e-4 in YAML, not 1e-4)"
        raise ValueError(f"{where}: {key} is {value!r}; it is {kind} of at least {least}.")


def _model_flags(mapping: Any, where: str) -> dict[str, Any]:
    flags = yaml_config.model_args(mapping, where)
    for flag in _OWN:
        if flag in flags:
            instead = {"--train-iters": "steps and warmup_steps", "--attention-impl": "attention_impl"}
            raise ValueError(f"{where}: {flag} belongs to the key {instead.get(flag, 'host')} of the file.")
    return flags


def _variants(items: Any, where: str) -> tuple[Variant, ...]:
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where}: variants is {items!r}; it is a list of at least one mapping with a name.")
    variants: list[Variant] = []
    for number, item in enumerate(items, 1):
        here = f"{where}: variant {number}"
        if not isinstance(item, dict) or not item.get("name"):
            raise ValueError(f"{here} is {item!r}; it is a mapping with a name.")
        here = f"{here} ({item['name']})"
        yaml_config.check_keys(item, [f.name for f in fields(Variant)], here)
        variant = Variant(**{**item, "name": str(item["name"]), "args": _model_flags(item.get("args"), here)})
        if variant.attention_impl not in ("megatron", "helix"):
            raise ValueError(f"{here}: attention_impl is {variant.attention_impl!r}; not megatron or helix.")
        if any(variant.name == other.name for other in variants):
            raise ValueError(f"{here}: another variant has this name; names must differ.")
        variants.append(variant)
    return tuple(variants)


def as_json(config: CompareConfig) -> dict[str, Any]:
    """The configuration as plain JSON types, every default spelled out."""
    return asdict(config)
