"""What a comparison is: one model, a list of variants of how to run it, and how much to run of each.

name: paper shape on the host
host: true
world_size: 16
runs: 5                      # independent launches of every variant, interleaved A B A B
processes: fresh             # kept: ranks are started once, and runs are turns of theirs
warmup_iterations: 100       # of every workload in every run, measured by nobody
iterations: 1000             # measured ones
workloads: {train: {}, prefill: {iterations: 200}, decode: {}}
preset: llama-3-8b           # a shape of helix_megatron.models.presets; MODEL_ARGS goes on top
scale: 0.0625
MODEL_ARGS: {num-layers: 16, …}      # as in helix_megatron.megatron.yaml_config
ENV_VARS: {}
variants:                    # without any: TP=W/2 PP=2, TP=W, TP=W/2 DP=2 and the Helix grids of W ranks
  - {name: Megatron TP=16, attention_impl: megatron, args: {tensor-model-parallel-size: 16}}
  - {name: Helix 4x4, attention_impl: helix, args: {tensor-model-parallel-size: 16, …}}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from helix_megatron.compare import variants as layouts
from helix_megatron.compare.variants import Variant
from helix_megatron.megatron import yaml_config

WORKLOADS = ("train", "prefill", "decode", "mixed")
_FIXED = {  # the harness needs these
    **{"--log-interval": 1, "--eval-iters": 0, "--eval-interval": 1000000, "--use-cpu-initialization": True}
}
_OWN = {  # flag → the key of the file that says it
    "--train-iters": "iterations and warmup_iterations",
    "--attention-impl": "attention_impl",
    yaml_config.HOST_FLAG: "host",
}


@dataclass(frozen=True)
class Workload:
    """How often one thing is done in one run."""

    name: str
    """One of WORKLOADS: a training step; a prompt through the model, by Megatron's pipeline schedule and to
    its first token; one more token for a batch with a filled KV cache; one prompt among decode steps."""
    iterations: int
    """Measured ones."""
    warmup_iterations: int
    """Before them, not measured."""


@dataclass(frozen=True)
class CompareConfig:
    """The whole file, checked."""

    name: str
    """Title of the report."""
    variants: tuple[Variant, ...]
    """In the order they run; the first finished one of each model is the reference of its losses."""
    model_args: dict[str, Any]
    """Megatron's flags common to all variants."""
    workloads: tuple[Workload, ...]
    """What every run does, in the order of WORKLOADS."""
    env_vars: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank."""
    host: bool = False
    """Run on CPU cores, in host mode; otherwise on GPUs, through torch.distributed.run."""
    world_size: int = 1
    """Ranks of every variant that does not say its own number."""
    nnodes: int = 1
    """GPU runs: machines that share the ranks; `helix compare` is started on each of them."""
    runs: int = 3
    """Independent runs of every variant, each in fresh processes; with `processes: kept` the most turns."""
    processes: str = "fresh"
    """`fresh`: every run starts its ranks anew. `kept`: the ranks of all variants of a model are started once
    (host mode only) and measure in turns; what two starts of one program differ by is then in no interval."""
    interval: float = 0.15
    """With `processes: kept`: turns end when every speed ratio's 95 % interval is within 1 ± this of it. The
    overview prints no ratio whose interval is wider."""
    repeat_seconds: float = 60.0
    """With `processes: kept`: no turn of a model's variants begins later than this after the first."""
    overview: bool = False
    """Begin the reports with five points (overview.py), and show these in the terminal, not the tables."""
    prompt_length: int = 16
    """Tokens of a prompt, and so of the KV cache that decode starts from."""
    batch_size: int = 1
    """Sequences prefilled or decoded together, in all data-parallel replicas."""
    mixed_decode_steps: int = 4
    """Decode steps of the mixed workload for each prompt that it prefills."""
    run_timeout_s: float = 300.0
    """A run that is not done by then is killed; its variant becomes a row that says so."""
    loss_tolerance: float = 1e-4
    """Largest absolute difference of losses between variants of the same model."""
    reference: bool = True
    """Also run each model on one rank in fp32, and give every variant's error against its logits."""
    paper: bool = False
    """Show the paper's numbers beside the measured ones, and check them by arithmetic."""
    peak_tflops: float | None = None
    """Peak of one rank, for MFU; by default the GPU's dense bf16 peak, and no MFU where it is not known."""
    cluster: str | None = None
    """Of which `helix plan` predicts what stands beside the measured: a preset's name, or a YAML file as
    `helix plan --probe` writes it; by default this machine (for a host: rough constants)."""
    preset: str | None = None
    """The shape that MODEL_ARGS started from."""
    scale: float | None = None
    """What the preset's widths were multiplied with."""

    def workload(self, name: str) -> Workload | None:
        """The named workload, or None when the comparison leaves it out."""
        return next((w for w in self.workloads if w.name == name), None)

    def ranks(self, variant: Variant) -> int:
        """How many ranks a variant runs on."""
        return variant.ranks or self.world_size

    def flags(self, variant: Variant) -> dict[str, Any]:
        """All flags of one variant, `--name` → value: MODEL_ARGS, its own, and what the harness fixes."""
        flags = {**self.model_args, **variant.args, **_FIXED}
        train = self.workload("train")
        # Megatron has to train a step to build its model; without the workload that step is not measured.
        flags["--train-iters"] = train.warmup_iterations + train.iterations if train else 1
        flags["--attention-impl"] = variant.attention_impl
        if self.host:
            flags[yaml_config.HOST_FLAG] = True
        return flags

    def model_key(self, variant: Variant) -> str:
        """Variants with equal keys are the same model and must have the same losses."""
        return layouts.model_key({**self.model_args, **variant.args}, variant.attention_impl)


_NAMES = {"model_args": "MODEL_ARGS", "env_vars": "ENV_VARS"}  # field → key in the file
_ITERATIONS = {"iterations": 5, "warmup_iterations": 1}  # defaults of every workload, keys of the file
_PARSED = ("MODEL_ARGS", "ENV_VARS", "workloads", "variants")
_LEAST: dict[str, int | float] = {  # key → the least it may be; a float where it need not be whole
    **dict.fromkeys(("world_size", "nnodes", "runs", "iterations", "ranks"), 1), "warmup_iterations": 0,
    **dict.fromkeys(("prompt_length", "batch_size", "mixed_decode_steps"), 1),
    **dict.fromkeys(("run_timeout_s", "loss_tolerance", "peak_tflops", "scale", "slow_down"), 0.0),
    **dict.fromkeys(("interval", "repeat_seconds"), 0.0),
}  # fmt: skip


def load(path: str | Path, changes: dict[str, Any] | None = None) -> CompareConfig:
    """Read and check a comparison, with some keys replaced. ValueError, in one line, for what is none."""
    return parse(yaml_config.read_yaml(path) | (changes or {}), str(path))


def parse(document: dict[str, Any], where: str) -> CompareConfig:
    """A YAML document → CompareConfig. ValueError naming `where`, the key, and what would do."""
    keys = {_NAMES.get(f.name, f.name): f.name for f in fields(CompareConfig)} | dict.fromkeys(_ITERATIONS)
    yaml_config.check_keys(document, keys, where)
    _check_numbers(document, where)
    for name in ("host", "reference", "paper", "overview"):
        if not isinstance(document.get(name, False), bool):
            yes, no = ("CPU", "GPUs") if name == "host" else ("show it", "leave it out")
            raise ValueError(f"{where}: {name} is {document[name]!r}; it is true ({yes}) or false ({no}).")
    if (processes := document.get("processes", "fresh")) not in ("fresh", "kept"):
        raise ValueError(f"{where}: processes is {processes!r}; it is fresh or kept.")
    if processes == "kept" and not document.get("host"):
        raise ValueError(
            f"{where}: processes is kept: several layouts share the memory, which is not for GPUs; it needs "
            "host: true."
        )
    if not isinstance(document.get("cluster", ""), str):
        raise ValueError(f"{where}: cluster is {document['cluster']!r}; it is a name or a path.")
    plain = {keys[k]: v for k, v in document.items() if keys[k] and k not in _PARSED}
    own = _parse_flags(document.get("MODEL_ARGS"), f"{where}: MODEL_ARGS")
    config = CompareConfig(
        **{"name": Path(where).stem, **plain},
        model_args=_preset_flags(document, where) | own,
        env_vars=yaml_config.env_vars(document.get("ENV_VARS"), f"{where}: ENV_VARS"),
        workloads=_parse_workloads(document, where),
        variants=(),
    )
    if config.world_size % config.nnodes:
        given = f"world_size {config.world_size}"
        raise ValueError(f"{where}: {given} is not a multiple of nnodes={config.nnodes}.")
    if "variants" in document:
        return replace(config, variants=_parse_variants(document["variants"], where))
    return replace(config, variants=layouts.default_variants(config.world_size, config.model_args))


def _check_numbers(mapping: dict[str, Any], where: str, empty: bool = False) -> None:
    """ValueError for the first that is too small or no number; `empty`: None will do."""
    for key, least in _LEAST.items():
        value = mapping.get(key, least)
        if empty and value is None:
            continue
        whole = isinstance(least, int)
        right_type = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right_type or value < least:
            kind = "a whole number" if whole else "a number (1.0e-4 in YAML, not 1e-4)"
            raise ValueError(f"{where}: {key} is {value!r}; it is {kind} of at least {least}.")


def _parse_workloads(document: dict[str, Any], where: str) -> tuple[Workload, ...]:
    given = document.get("workloads", dict.fromkeys(("train", "prefill", "decode")))
    if not isinstance(given, dict) or not given:
        raise ValueError(
            f"{where}: workloads is {given!r}; it maps some of {', '.join(WORKLOADS)} to {{}} or to their "
            "own iterations and warmup_iterations."
        )
    yaml_config.check_keys(given, WORKLOADS, f"{where}: workloads")
    common = {key: document.get(key, default) for key, default in _ITERATIONS.items()}
    found = []
    for name in (name for name in WORKLOADS if name in given):
        own, here = given[name] or {}, f"{where}: workloads: {name}"
        if not isinstance(own, dict):
            raise ValueError(f"{here} is {own!r}; it is {{}} or a mapping of {', '.join(_ITERATIONS)}.")
        yaml_config.check_keys(own, _ITERATIONS, here)
        _check_numbers(own, here)
        found.append(Workload(name, **(common | own)))
    return tuple(found)


def _preset_flags(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Flags of the preset's shape, its vocabulary padded alike for every layout of world_size ranks."""
    name, scale = document.get("preset"), document.get("scale")
    if name is None:
        if scale is not None:
            raise ValueError(f"{where}: scale is {scale!r}, but there is no preset to scale.")
        return {}
    from helix_megatron.models import presets

    try:
        shape = presets.find(str(name))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if scale is not None:
        shape = shape.scaled(float(scale))
    multiple = 16 * document.get("world_size", 1)
    vocabulary = -(-max(shape.vocab_size, 257) // multiple) * multiple  # 257: the byte tokens of our text
    return shape.model_args(vocabulary)


def _parse_flags(mapping: Any, where: str) -> dict[str, Any]:
    """Megatron's flags, but for those that are keys of the file."""
    flags = yaml_config.model_args(mapping, where)
    for flag in (flag for flag in _OWN if flag in flags):
        raise ValueError(f"{where}: {flag} belongs to the key {_OWN[flag]} of the file.")
    return flags


def _parse_variants(items: Any, where: str) -> tuple[Variant, ...]:
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where}: variants is {items!r}; it is a list of at least one mapping with a name.")
    variants: dict[str, Variant] = {}
    for number, item in enumerate(items, 1):
        here = f"{where}: variant {number}"
        if not isinstance(item, dict) or not item.get("name"):
            raise ValueError(f"{here} is {item!r}; it is a mapping with a name.")
        name = str(item["name"])
        here = f"{here} ({name})"
        yaml_config.check_keys(item, [f.name for f in fields(Variant)], here)
        _check_numbers(item, here, empty=True)
        variant = Variant(**{**item, "name": name, "args": _parse_flags(item.get("args"), here)})
        if variant.attention_impl not in ("megatron", "helix"):
            raise ValueError(f"{here}: attention_impl is {variant.attention_impl!r}; not megatron or helix.")
        if name in variants:
            raise ValueError(f"{here}: another variant has this name; names must differ.")
        variants[name] = variant
    return tuple(variants.values())


def to_json(config: CompareConfig) -> dict[str, Any]:
    """The configuration as plain JSON types, every default spelled out."""
    return json.loads(json.dumps(asdict(config)))
