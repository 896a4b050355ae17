"""Helix's attention layer against Megatron's own, in one run: same weights, forward + backward.

    python benchmarks/attention_layer.py                       on the host, 8 and 16 ranks on this machine
    torchrun --nproc-per-node 8 benchmarks/attention_layer.py --case gqa --dtype bf16         on GPUs

Both layers live in the same processes and take turns; a time is the slowest rank's, the figure is the
median over the turns. Bytes are those received per rank inside attention, forward + backward, counted from
the collectives actually made; the reductions of the output projection and of the input gradient are the same
for both and left out. Predicted bytes come from the formulas in helix_megatron/exchange.py.
Prints a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass

import torch

CASES = {
    # H, G, d, hidden, sequence, ranks, Helix settings (n, m, placement, core attention)
    "gqa": (
        16,
        2,
        64,
        1024,
        1024,
        8,
        [(2, 4, "heads", "auto"), (2, 4, "heads", "spec"), (2, 4, "dims", "auto")],
    ),
    "llama70b": (64, 8, 128, 1024, 128, 16, [(8, 2, "heads", "auto"), (8, 2, "dims", "auto")]),
    "mqa": (8, 1, 64, 512, 1024, 8, [(1, 8, "heads", "auto"), (1, 8, "heads", "spec")]),
    "m1": (16, 8, 64, 1024, 512, 8, [(8, 1, "auto", "auto")]),
}


@dataclass
class Row:
    """One layer of one case. Times in seconds; bytes received per rank, forward + backward."""

    case: str
    layer: str
    grid: str
    seconds_median: float
    time_ratio: float
    bytes_received: int
    bytes_predicted: int
    bytes_ratio: float | None
    collectives: dict
    samples: list[float]


def predicted_bytes(case: str, n: int, m: int, placement: str, megatron: bool, element: int) -> int:
    """Bytes received per rank and layer inside attention, forward + backward, batch 1."""
    heads, groups, dim, _, seq, tp, _ = CASES[case]
    if megatron:
        gather = (tp - 1) * seq * (heads + 2 * groups) * dim // tp if tp > groups else 0
        return 2 * gather * element
    kv = 2 * (m - 1) * seq * (groups // n) * (dim // m)
    queries = 0 if placement == "heads" or m == 1 else 2 * (m - 1) * seq * (heads // n) * (dim // m) // m
    return 2 * (kv + queries) * element


def worker(case: str, turns: int, dtype_name: str) -> list[dict]:
    """What one rank does; returns the rows (equal on all ranks)."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from helix_megatron import integrate
    from helix_megatron.compare.comm import CommMeter
    from helix_megatron.config import HelixConfig
    from helix_megatron.groups import destroy_helix_parallel, initialize_helix_parallel
    from helix_megatron.host import host_mode_enabled

    heads, groups, dim, hidden, seq, tp, grids = CASES[case]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    if not host_mode_enabled():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    use_te = not host_mode_enabled() and _have_te()

    def build(grid):
        if grid is not None:
            destroy_helix_parallel()
            helix = HelixConfig(grid[0], grid[1], query_placement=grid[2], core_attention=grid[3])
            integrate.enable(helix)
        try:
            config = TransformerConfig(
                num_layers=1,
                hidden_size=hidden,
                num_attention_heads=heads,
                num_query_groups=groups,
                kv_channels=dim,
                tensor_model_parallel_size=tp,
                add_bias_linear=False,
                attention_dropout=0.0,
                use_cpu_initialization=True,
                params_dtype=dtype,
                bf16=dtype is torch.bfloat16,
                gradient_accumulation_fusion=False,
                masked_softmax_fusion=False,
                apply_rope_fusion=False,
                init_method=torch.nn.init.xavier_normal_,
                output_layer_init_method=torch.nn.init.xavier_normal_,
            )
            if grid is not None:
                from helix_megatron.grid import HelixGrid

                initialize_helix_parallel(
                    HelixGrid(grid[0], grid[1]), parallel_state.get_tensor_model_parallel_group()
                )
            spec = get_gpt_layer_with_transformer_engine_spec() if use_te else get_gpt_layer_local_spec()
            pgs = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
            torch.manual_seed(1)  # the same master weights for every layer
            layer = build_module(
                spec.submodules.self_attention, config=config, layer_number=1, pg_collection=pgs
            )
            return layer.to(torch.cuda.current_device())
        finally:
            integrate.disable()

    layers = {"Megatron": (None, build(None))}
    for n, m, placement, core in grids:
        name = f"Helix {n}x{m} {placement}" + (" (Megatron's core)" if core == "spec" else "")
        layers[name] = ((n, m, placement, core), build((n, m, placement, core)))
    torch.manual_seed(2)
    source = torch.randn(seq, 1, hidden, dtype=dtype).to(torch.cuda.current_device())
    angles = torch.outer(torch.arange(seq).float(), 1e4 ** -(torch.arange(0, dim, 2).float() / dim))
    rope = torch.cat((angles, angles), -1)[:, None, None].to(torch.cuda.current_device())

    def step(layer) -> torch.Tensor:
        hidden_states = source.detach().requires_grad_()
        out, _ = layer(hidden_states, None, rotary_pos_emb=rope)
        out.float().square().mean().backward()
        for parameter in layer.parameters():
            parameter.grad = None
        return out.detach()

    tallies, outputs = {}, {}
    for name, (_, layer) in layers.items():  # warm-up, and the count of one step
        step(layer)
        meter = CommMeter()
        with meter.counting():
            outputs[name] = step(layer)
        tallies[name] = meter.as_json()
        error = (outputs[name].float() - outputs["Megatron"].float()).norm() / outputs[
            "Megatron"
        ].float().norm()
        assert error < (1e-5 if dtype is torch.float32 else 2e-2), f"{name} differs from Megatron: {error}"
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(turns):
        order = list(layers) if turn % 2 == 0 else list(layers)[::-1]
        for name in order:
            torch.distributed.barrier()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step(layers[name][1])
            torch.cuda.synchronize()
            elapsed = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
            elapsed = elapsed.to(torch.cuda.current_device())
            torch.distributed.all_reduce(elapsed, op=torch.distributed.ReduceOp.MAX)
            samples[name].append(elapsed.item())

    shared = {"all_reduce x" + str(tp)}  # output projection and input gradient, the same for both
    element = torch.empty((), dtype=dtype).element_size()
    base_bytes = _attention_bytes(tallies["Megatron"], shared)
    base_time = statistics.median(samples["Megatron"])
    rows = []
    for name, (grid, _) in layers.items():
        received = _attention_bytes(tallies[name], shared)
        n, m, placement, _ = grid or (tp, 1, "dims", "spec")
        rows.append(
            asdict(
                Row(
                    case=case,
                    layer=name,
                    grid=f"{n}x{m}",
                    seconds_median=statistics.median(samples[name]),
                    # of the medians of the same turns
                    time_ratio=statistics.median(samples[name]) / base_time,
                    bytes_received=received,
                    bytes_predicted=predicted_bytes(case, n, m, placement, grid is None, element),
                    bytes_ratio=received / base_bytes if base_bytes else None,
                    collectives={k: v for k, v in tallies[name].items() if k not in shared},
                    samples=samples[name],
                )
            )
        )
    torch.distributed.destroy_process_group()
    return rows


def _attention_bytes(tally: dict, shared: set[str]) -> int:
    return int(sum(entry["bytes"] for name, entry in tally.items() if name not in shared))


def _have_te() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--turns", type=int, default=15, help="timed repetitions of every layer")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", help="also write the JSON document here")
    options = parser.parse_args()
    cases = list(CASES) if options.case == "all" else [options.case]
    distributed = "RANK" in os.environ
    rows: list[dict] = []
    for case in cases:
        if distributed:
            rows += worker(case, options.turns, options.dtype)
        else:
            from helix_megatron.launch import run_ranks

            tp = CASES[case][5]
            rows += run_ranks(worker, tp, case, options.turns, options.dtype, timeout_s=900)[0]
    if distributed and int(os.environ["RANK"]):
        return
    print(
        f"{'case':9} {'layer':34} {'ms':>9} {'x time':>7} {'bytes/rank':>12} {'predicted':>12} {'x bytes':>8}"
    )
    for row in rows:
        ratio = "-" if row["bytes_ratio"] is None else f"{row['bytes_ratio']:.4f}"
        print(
            f"{row['case']:9} {row['layer']:34} {row['seconds_median'] * 1e3:9.1f} {row['time_ratio']:7.3f} "
            f"{row['bytes_received']:12,} {row['bytes_predicted']:12,} {ratio:>8}"
        )
    document = {
        "benchmark": "attention_layer",
        "measured": "times and bytes_received; bytes_predicted is computed",
        "hardware": _hardware(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "shapes": {case: CASES[case][:6] for case in cases},
        "rows": rows,
    }
    text = json.dumps(document)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"host, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, gloo"


if __name__ == "__main__":
    main()
