"""What a comparison runs: its variants and their references, the flags of each, what a rank is asked for."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.compare import records
from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.rank import Task
from helix_megatron.compare.variants import PP, TP, Variant, per_slice_grid, smaller_heads
from helix_megatron.megatron import yaml_config
from helix_megatron.models import data

_DATA_FLAGS = (
    *("--data-path", "--mock-data", "--data-args-path", "--train-data-path", "--per-split-data-args-path"),
)
_NOT_ON_ONE_RANK = (
    *("--bf16", "--fp16", "--fp8-format", "--sequence-parallel"),
    *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
)


@dataclass(frozen=True)
class RunPlan:
    """Everything that a comparison may run."""

    config: CompareConfig
    out: Path
    """Folder of the comparison."""
    references: dict[str, Variant]
    """Model key → the variant that runs it on one rank in fp32."""
    variants: dict[str, Variant]
    """By name: the references, then the variants."""
    flags: dict[str, list[str]]
    """Command line of each, by name."""

    def _work(self, variant: Variant) -> dict[str, Any]:
        """What a rank does in every run of this variant."""
        return {
            "host": self.config.host,
            "workloads": {w.name: [w.warmup_iterations, w.iterations] for w in self.config.workloads},
            "prompt_length": self.config.prompt_length,
            "batch_size": self.config.batch_size,
            "mixed_decode_steps": self.config.mixed_decode_steps,
            "slow_down": variant.slow_down,
        }

    def settings(self, variant: Variant) -> dict[str, Any]:
        """What decides the numbers of a run of this variant."""
        flags = {k: v for k, v in self.config.flags(variant).items() if v is not False}
        ranks = self.config.ranks(variant)
        return {"flags": flags, "ranks": ranks, "env_vars": self.config.env_vars} | self._work(variant)

    def task(self, variant: Variant, run: int) -> Task:
        """What every rank of a run is asked for."""
        config, of = self.config, variant
        key = next((k for k, v in self.references.items() if v.name == variant.name), None)
        if key is not None:  # this run is a reference itself, of the model of `of`
            of = next(v for v in config.variants if config.model_key(v) == key)
        grid = key and per_slice_grid({**config.model_args, **of.args}, of.attention_impl)
        reference = self.references.get(key or config.model_key(variant))
        path = self.out / "reference" / f"{records.file_name(reference.name)}.npy" if reference else None
        return Task(
            argv=self.flags[variant.name],
            folder=str(self.out / "work" / f"{records.file_name(variant.name)}.run-{run}"),
            reference=str(path) if path else None,
            reference_of=_dtype(config, of) if key is not None else None,
            reference_grid=list(grid) if grid else None,
            **self._work(variant),
        )


def plan_runs(config: CompareConfig, out: Path) -> RunPlan:
    """All runs of a comparison. ValueError for flags that Megatron does not know, before anything runs."""
    known = megatron_flags()
    references = reference_variants(config) if config.reference else {}
    variants = {v.name: v for v in (*references.values(), *config.variants)}
    flags = {name: build_argv(config, variant, out, known) for name, variant in variants.items()}
    return RunPlan(config, out, references, variants, flags)


def reference_variants(config: CompareConfig) -> dict[str, Variant]:
    """model key → the variant that runs it on one rank in fp32.

    Of a per-slice model that is Megatron with m times as many heads of 1/m of the dimension; there is none
    where the flags do not say the heads.
    """
    found: dict[str, Variant] = {}
    off = dict.fromkeys(_NOT_ON_ONE_RANK, False)
    single = {TP: 1, PP: 1, "--context-parallel-size": 1, "--skip-train": True}
    for variant in config.variants:
        given = {**config.model_args, **variant.args}
        grid = per_slice_grid(given, variant.attention_impl)
        heads = smaller_heads(given, grid[1]) if grid else {}
        key = config.model_key(variant)
        if key not in found and heads is not None:
            flags = {k: v for k, v in variant.args.items() if not k.startswith("--helix-")}
            name = f"fp32 reference of {variant.name}"
            found[key] = Variant(name, args={**flags, **off, **single, **heads}, may_fail=True, ranks=1)
    return found


def _dtype(config: CompareConfig, variant: Variant) -> str:
    flags = config.flags(variant)
    return "bfloat16" if flags.get("--bf16") else "float16" if flags.get("--fp16") else "float32"


def megatron_flags() -> list[str]:
    """Every flag that Megatron's parser knows with Helix in it."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA on a host, it says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron names the optional packages that are missing
        from helix_megatron.megatron import integrate

        integrate.install()
        return yaml_config.known_flags()


def build_argv(config: CompareConfig, variant: Variant, out: Path, known: list[str]) -> list[str]:
    """The variant's command line; writes the byte data set first when the model names no data of its own."""
    flags = config.flags(variant)
    if not any(flags.get(flag) for flag in _DATA_FLAGS):
        prefix = out / "data" / "text"
        data.write(prefix)
        tokens = {f"--{name}": value for name, value in data.TOKENIZER_ARGS.items()}
        flags = {**tokens, "--split": "99,1,0", **flags, "--data-path": str(prefix)}
        flags.setdefault("--data-cache-path", str(out / "data" / "cache"))
    return yaml_config.to_argv(flags, f"variant {variant.name}", known)
