"""Helix's attention layer against Megatron's own, in one run: same weights, forward + backward.

    python benchmarks/attention_layer.py                       on the host, 8 and 16 ranks on this machine
    torchrun --nproc-per-node 8 benchmarks/attention_layer.py --case gqa --dtype bf16         on GPUs

Both layers live in the same processes and take turns; a time is the slowest rank's, the figure is the
median over the turns. Bytes are those received per rank inside attention, forward + backward, counted from
the collectives actually made; the reductions of the output projection and of the input gradient are the same
for both and left out. Predicted bytes come from the formulas in helix_megatron/exchange/collectives.py.
Prints a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, dataclass
from functools import partial

import bench
import torch

from helix_megatron.partition.grid import AttentionShape, HelixGrid
from helix_megatron.partition.layout import HelixLayout
from helix_megatron.plan.trial import slowest_seconds

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
    if m == 1:
        return 0
    layout = HelixLayout(AttentionShape(heads, groups, dim, dim), HelixGrid(n, m), placement)
    return round(2 * seq * sum(layout.exchanged_elements().values()) * element)


def worker(case: str, turns: int, dtype_name: str) -> list[dict]:
    """What one rank does; returns the rows (equal on all ranks)."""
    from helix_megatron.host.mode import host_mode_enabled
    from helix_megatron.measure.comm import CommMeter
    from helix_megatron.partition.config import HelixConfig

    heads, groups, dim, hidden, seq, tp, grids = CASES[case]
    dtype = bench.DTYPES[dtype_name]
    bench.initialize(tp)
    use_te = not host_mode_enabled() and _have_te()

    def build(grid):
        helix = grid and HelixConfig(grid[0], grid[1], query_placement=grid[2], core_attention=grid[3])
        with bench.attention_layer((heads, groups, dim, hidden), tp, dtype, helix, use_te) as (layer, _):
            return layer

    layers = {"Megatron": (None, build(None))}
    for n, m, placement, core in grids:
        name = f"Helix {n}x{m} {placement}" + (" (Megatron's core)" if core == "spec" else "")
        layers[name] = ((n, m, placement, core), build((n, m, placement, core)))
    torch.manual_seed(2)
    source = torch.randn(seq, 1, hidden, dtype=dtype).to(torch.cuda.current_device())
    rope = bench.rotary(seq, dim)

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
            samples[name].append(slowest_seconds(partial(step, layers[name][1])))

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
    rows: list[dict] = []
    for case in cases:
        rows += bench.rows_of(worker, CASES[case][5], case, options.turns, options.dtype, timeout_s=900)
    if int(os.environ.get("RANK", "0")):
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
        "hardware": bench.hardware(),
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


if __name__ == "__main__":
    main()
