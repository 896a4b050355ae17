"""Attention layers of every kind against float64, beside vanilla Megatron's own error at T = 1 here.

The reference has the weights and the input of the layer, rounded as it has them. In fp32 an error is bounded
by a number; in half precision, and wherever Transformer Engine multiplies in TF32, by vanilla Megatron's
error of the same case on the same device. m = 1 is compared bit for bit with vanilla Megatron at the same T.
One launch of RANKS ranks does them all, with other tensor-parallel groups for each T that divides it.
"""

from __future__ import annotations

import gc
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from helix_megatron.check.reference import Case, reference
from helix_megatron.check.rows import Place, Rows
from helix_megatron.partition.config import HelixConfig

FP32_LIMIT = 2e-5
TIMES_VANILLA = 2.0
"""How many times vanilla Megatron's error a layer may have in half precision."""
FLOORS = {"bf16": 4e-3, "fp16": 5e-4, "fp32": 2e-6}
"""Errors that are rounding whatever vanilla's is."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Args:
        shape: query heads, KV heads.
        grid: n, m; None: vanilla Megatron.
        settings: of HelixConfig.
        case: of reference.Case, beyond sizes.
        config: of TransformerConfig.
        kinds: which layers run it: "local", "te".
        quick: whether `--quick` has it.
        cp: context-parallel size.
    """

    name: str
    shape: tuple[int, int]
    grid: tuple[int, int] | None
    settings: dict[str, Any] = field(default_factory=dict)
    case: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("local", "te")
    quick: bool = True
    cp: int = 1

    @property
    def tp(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else 1

    @property
    def ranks(self) -> int:
        return self.tp * self.cp

    @property
    def world(self) -> int:
        """Ranks that are started for it; those over compute the same again."""
        return self.ranks if RANKS % self.ranks else RANKS


RANKS = 4
VANILLA = "vanilla Megatron at T = 1"
HEADS, DIMS, SUMS = dict(query_placement="heads"), dict(query_placement="dims"), dict(comm_type="all_reduce")
SP, FUSED_ROPE = dict(sequence_parallel=True), dict(apply_rope_fusion=True)
LOCAL, TE = ("local",), ("te",)
JOBS = (
    Job("GQA 2x2, heads", (8, 2), (2, 2), HEADS),
    Job("GQA 2x2, dims", (8, 2), (2, 2), DIMS),
    Job("GQA 1x4, heads", (8, 2), (1, 4), HEADS, quick=False),
    Job("GQA 1x4, dims", (8, 2), (1, 4), DIMS, quick=False),
    Job("9 and 3 heads, 1x4", (9, 3), (1, 4)),
    Job("MQA 1x4, heads", (8, 1), (1, 4), HEADS, quick=False),
    Job("MHA 2x2, heads", (8, 8), (2, 2), HEADS, quick=False),
    Job("MHA 4x1 is Megatron", (8, 8), (4, 1)),
    Job("GQA 2x1 is Megatron", (8, 2), (2, 1)),
    Job("uneven slices, 1x3", (9, 3), (1, 3), quick=False),
    Job("summed scores, 2x2", (8, 2), (2, 2), SUMS, kinds=LOCAL, quick=False),
    Job("sequence parallel, 2x2", (8, 2), (2, 2), HEADS, config=SP),
    Job("sequence parallel, 1x4, dims", (9, 3), (1, 4), DIMS, config=SP, quick=False),
    Job("QK norm, RMSNorm", (8, 2), (2, 2), case=dict(qk_norm="RMSNorm")),
    Job("QK norm, L2", (8, 2), (1, 2), case=dict(qk_norm="L2Norm"), kinds=LOCAL, quick=False),
    Job("half of RoPE", (8, 2), (2, 2), dict(rotary_percent=0.5), dict(rotary_percent=0.5), quick=False),
    Job("no RoPE", (8, 2), (1, 2), dict(rotary_percent=0.0), dict(rotary_percent=0.0), quick=False),
    Job("interleaved RoPE", (8, 2), (2, 2), case=dict(interleaved=True), quick=False),
    Job("fused RoPE, heads", (8, 2), (2, 2), HEADS, config=FUSED_ROPE, kinds=TE),
    Job("fused RoPE, dims", (8, 2), (1, 4), DIMS, config=FUSED_ROPE, kinds=TE, quick=False),
    Job("window", (8, 2), (2, 2), case=dict(window=(9, 0)), kinds=LOCAL),
    Job("window of Transformer Engine", (8, 2), (2, 2), case=dict(window=(9, 0)), kinds=TE, quick=False),
    Job("attention sinks", (8, 2), (2, 2), case=dict(sinks=True), quick=False),
    Job("output gate", (8, 2), (2, 2), case=dict(gate=True), quick=False),
    Job("packed sequences", (8, 2), (2, 2), case=dict(documents=True, batch=1)),
    Job("document masks", (8, 2), (2, 2), case=dict(mask="documents"), kinds=LOCAL, quick=False),
    Job("context parallel 2, 1x2, heads", (8, 2), (1, 2), HEADS, cp=2),
    Job("context parallel 2, 1x2, dims", (9, 3), (1, 2), DIMS, cp=2, quick=False),
)  # fmt: skip
BY_NAME = {job.name: job for job in JOBS}
_HOST = dict(dim=16, hidden=48, seq=24, batch=2)
_GPU = dict(dim=64, hidden=512, seq=256, batch=2)


def variants(job: Job, place: Place, te: bool) -> Iterator[tuple[str, str]]:
    """(kind of layer, dtype) in which a job runs here."""
    if "local" in job.kinds:
        yield "local", "fp32"
        if not place.on_host or not place.quick:
            yield "local", "bf16"
    if te and "te" in job.kinds and not place.on_host:
        yield "te", "bf16"
        if not place.quick:
            yield from (("te", "fp16"), ("te", "fp32"))


def make_case(job: Job, on_host: bool) -> Case:
    """The job's case with its tensors, sizes as the machine deserves."""
    given = {**(_HOST if on_host else _GPU), **job.case}
    if given.get("documents"):
        given["documents"] = tuple(given["seq"] * part // 8 for part in (1, 5, 2))
    case = Case(*job.shape, **given)
    case.draw()
    return case


def check(rows: Rows, place: Place) -> None:
    """The jobs of `--quick` first; vanilla Megatron at T = 1 before them, by the same ranks."""
    chosen = [job for job in JOBS if job.quick or not place.quick]
    Path(f"{rows.path}.vanilla").unlink(missing_ok=True)  # of another run
    chosen.sort(key=lambda job: (not job.quick, -job.tp, job.cp))
    for world in sorted({job.world for job in chosen}, reverse=True):
        names = [job.name for job in chosen if job.world == world]
        place.run_each(rank_jobs, world, rows, [VANILLA, *names], place)


def _key(job: Job, kind: str, dtype: str) -> str:
    return f"{job.shape} {sorted(job.case.items(), key=str)} {kind} {dtype}"


def rank_jobs(path: str, names: Sequence[str], place: Place) -> None:
    """In a rank: these jobs; rank 0 writes the rows.

    Where VANILLA is among the names, vanilla Megatron's own errors are found then, and kept in a file for
    ranks that do without.
    """
    from helix_megatron.check import layer as layers

    te = _start(place)
    rows, first = Rows(path), torch.distributed.get_rank() == 0
    kept, parallel, groups = Path(f"{path}.vanilla"), (0, 0), layers.Groups()
    for name in names:
        if first:
            rows.begin(name)
        if name == VANILLA:
            _set_parallel(layers, 1, 1)
            _find_vanilla_errors([BY_NAME[name] for name in names if name != VANILLA], place, te, kept)
            if first and not te:
                _say_why_not(rows, place)
            continue
        job = BY_NAME[name]
        if parallel != (job.tp, job.cp):
            parallel, groups = (job.tp, job.cp), layers.Groups()
            _set_parallel(layers, *parallel)
        vanilla = json.loads(kept.read_text()) if kept.exists() else {}
        for kind, dtype in variants(job, place, te):
            errors: dict[str, float] = {}
            core, failure = "", ""
            try:
                errors, core = layer_errors(job, kind, dtype, place, groups)
            except Exception as error:
                traceback.print_exc()
                failure = f"{type(error).__name__}: {str(error)[:300]}"
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, (errors, failure))
            if first:
                _write(rows, job, kind, dtype, everywhere, core, vanilla, place)
        gc.collect()
    torch.distributed.destroy_process_group()


def _start(place: Place) -> bool:
    """Join the ranks; whether Transformer Engine's layers can be run."""
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    torch.backends.cuda.matmul.allow_tf32 = False
    if not place.on_host:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    return HAVE_TE and not place.on_host


def _set_parallel(layers: Any, tp: int, cp: int) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    layers.make_parallel_groups(tp, cp)


def _say_why_not(rows: Rows, place: Place) -> None:
    """A row: why Transformer Engine's layers did not run."""
    case, instead = "Transformer Engine's layers", "Megatron's local layers ran"
    if place.on_host or find_spec("transformer_engine") is None:
        rows.add(case, "skipped", f"{'no GPU' if place.on_host else 'not installed'}; {instead}")
    else:
        rows.add(case, "warning", f"it is installed, and Megatron could not import it; {instead}")


def _find_vanilla_errors(jobs: Sequence[Job], place: Place, te: bool, kept: Path) -> None:
    """Vanilla Megatron's own error at T = 1 of each case, by key, into `kept`; the ranks share them out.

    Cases that it cannot run alone are left out, packed sequences in the local core for one.
    """
    from helix_megatron.check import layer as layers

    alone = {_key(job, ",".join(job.kinds), ""): job for job in jobs}
    found: dict[str, float] = {}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for given in list(alone.values())[rank::world]:
        job = replace(given, grid=None, settings={}, config={}, cp=1)
        for kind, dtype in variants(given, place, te):
            try:
                errors, _ = layer_errors(job, kind, dtype, place, layers.Groups())
                found[_key(job, kind, dtype)] = max(errors.values())
            except (AssertionError, NotImplementedError, ValueError, RuntimeError) as error:
                print(f"vanilla, {given.name}, {kind} {dtype}: {error}", flush=True)
    everywhere: list[Any] = [None] * world
    torch.distributed.all_gather_object(everywhere, found)
    if rank == 0:
        kept.write_text(json.dumps({key: error for some in everywhere for key, error in some.items()}))
    torch.distributed.barrier()


def _write(
    rows: Rows, job: Job, kind: str, dtype: str, everywhere: list[Any], core: str,
    yardsticks: dict[str, float], place: Place,
) -> None:  # fmt: skip
    """One row, and a warning where the attention core is not the one expected."""
    variant = f"{kind} {dtype}"
    case = f"{job.name}, {variant}"
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(everywhere) if failure]
    if failures:
        rows.add(case, "failed", failures[0], variant=variant)
        return
    worst = {name: max(errors[name] for errors, _ in everywhere) for name in everywhere[0][0]}
    vanilla = yardsticks.get(_key(job, kind, dtype))
    status, detail = judge(worst, kind, dtype, vanilla)
    if "bits" in worst and status == "ok":
        detail += "; bit for bit Megatron's"
    rows.add(
        case, status, f"{detail}; {place.words(job.ranks)}", variant=variant, error=_largest(worst),
        vanilla=vanilla, core=core, errors=worst,
    )  # fmt: skip
    if unexpected_core(core, kind, dtype, job.case):
        rows.add(case, "warning", f"attention ran {core}: a fused or flash core was expected", core=core)


def _largest(errors: dict[str, float]) -> float:
    return max(error for name, error in errors.items() if name != "bits")


def judge(errors: dict[str, float], kind: str, dtype: str, vanilla: float | None) -> tuple[str, str]:
    """(status, detail) of a layer's relative errors, beside vanilla Megatron's; "bits" must be 0."""
    error = _largest(errors)
    limit = max(FLOORS[dtype], TIMES_VANILLA * vanilla) if vanilla is not None else 10 * FLOORS[dtype]
    if kind == "local" and dtype == "fp32":
        limit = FP32_LIMIT
    beside = "" if vanilla is None else f", vanilla Megatron {vanilla:.1e}"
    if errors.get("bits", 0.0) != 0.0:
        return "failed", f"m = 1 differs from Megatron by {errors['bits']:.1e}"
    if not error <= limit:
        name = max(errors, key=lambda one: errors[one])
        return "failed", f"{name} is {error:.1e} off float64, allowed {limit:.1e}{beside}"
    return "ok", f"{error:.1e} off float64{beside}"


def unexpected_core(core: str, kind: str, dtype: str, case: dict[str, Any]) -> bool:
    """Whether Transformer Engine ran its unfused core where fused ones exist."""
    plain = not {"sinks", "mask"} & case.keys()
    return kind == "te" and dtype != "fp32" and plain and core.endswith("unfused")


def layer_errors(
    job: Job, kind: str, dtype_name: str, place: Place, groups: Any
) -> tuple[dict[str, float], str]:
    """Relative errors of one layer on this rank, and the attention core that ran.

    With m = 1 there is one more, "bits": the greatest difference from vanilla Megatron at the same T.
    """
    from helix_megatron.check import layer as layers

    dtype, te = DTYPES[dtype_name], kind == "te"
    case = make_case(job, place.on_host).rounded(dtype)
    config: dict[str, Any] = dict(job.config)
    if dtype is not torch.float32:
        half = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}
        config |= dict(params_dtype=dtype, attention_softmax_in_fp32=not te, **half)
    if job.cp > 1:
        config |= dict(context_parallel_size=job.cp)
    device = "cpu" if place.on_host else torch.device("cuda", torch.cuda.current_device())
    expected = {name: x.cpu() for name, x in reference(case.to(device), input_norm=te).items()}

    def found(helix: HelixConfig | None) -> tuple[dict[str, torch.Tensor], slice | Any, slice | Any, Any]:
        of_grid = None
        if helix is not None and helix.dim_parallel_size != 1:
            of_grid = groups.of(_plan(job, helix, case).grid)
        layer = layers.make_layer(case, helix, job.tp, of_grid, transformer_engine=te, **config)
        rank = torch.distributed.get_rank() % job.tp
        layout = _plan(job, helix or HelixConfig(*(job.grid or (1, 1))), case).layout
        rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
        layers.load(layer, case, rows, columns, dtype)
        given = layers.run(layer, case, job.tp, dtype, config.get("sequence_parallel", False))
        return given, rows, columns, layer

    helix = HelixConfig(*job.grid, **job.settings) if job.grid else None
    ours, rows, columns, layer = found(helix)
    errors = layers.errors(ours, expected, rows, columns)
    if job.grid is not None and job.grid[1] == 1:
        theirs = found(None)[0]
        errors["bits"] = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    return errors, attention_core(layer, te)


def _plan(job: Job, helix: HelixConfig, case: Case) -> Any:
    return helix.resolve(*job.shape, case.dim, job.tp, case.interleaved, case.gate)


def attention_core(layer: torch.nn.Module, te: bool) -> str:
    """Which attention ran last: whose, and fused, flash or unfused."""
    if te:
        from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as chosen

        for name in ("flash", "fused", "unfused"):
            if chosen.get(f"use_{name}_attention"):
                return f"Transformer Engine's {name}"
        return "Transformer Engine's, unknown"
    core = getattr(layer.core_attention, "core", layer.core_attention)
    if core is None:
        return "summed scores"
    name = type(core).__name__
    return "Megatron's unfused" if name == "DotProductAttention" else name
