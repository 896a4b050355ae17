"""One decode step of an attention layer: Helix's sharded KV cache against Megatron's replicated one.

    python benchmarks/decode.py --out benchmarks/results/decode_host.json        8 ranks on this machine

Megatron's side is its own layer at TP = 8 with fewer KV heads than ranks: every rank caches a whole KV head
that others cache too. Both sides run in the same processes, in Megatron's dynamic inference context, with the
same weights, and take turns; their caches hold the same keys and values (drawn, not computed from a prompt)
and their outputs are compared. Steps are padded as Megatron pads them (TOKEN_ROUNDER as it is). They are
eager and, on GPUs, replayed from CUDA graphs too, of the sizes that Megatron's engine captures by default;
but for a cache of slices, which has none. On a host both sides attend with the same kernel; on GPUs, with
Transformer Engine's layers where it is installed, and with the same FlashAttention
(--flash-attention-version) on pages of 256 tokens a rank: the document names both. A sample is the slowest
rank's time of one decode step of `--layers` layers, the figure is the median over the turns.
Prints what the bytes of the cache alone would allow, then what was measured, then one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import bench
import torch

from helix_megatron import compat
from helix_megatron.check.decode_step import new_context, set_decode_step
from helix_megatron.plan.trial import slowest_seconds

TP, HEADS, DIM, HIDDEN, PAGE = 8, 16, 128, 1024, 256
REQUESTS = 256  # that the contexts have room for
SIZES = 16  # of steps that Megatron captures by default
CASES = {"mqa": 1, "g2": 2}  # KV heads
VARIANTS = {  # Helix settings, by KV cache
    "Helix sequence": {"kv_cache": "sequence"},
    "Helix sequence, 2 chunks": {"kv_cache": "sequence", "overlap_chunks": 2},
    "Helix dim": {"kv_cache": "dim"},
}


NO_GPU = "skipped: CUDA graphs are captured on GPUs only"
NO_GRAPH = "a cache of slices (dim) has no CUDA graph"


def chosen(groups: int, context: int, host: bool) -> str:
    """The variant that `--helix-kv-cache auto` is when requests have up to `context` tokens."""
    from helix_megatron.partition.config import HelixConfig

    plan = HelixConfig(context_length=context, host_mode=host).resolve(HEADS, groups, DIM, TP)
    return f"Helix {plan.kv_cache}"


def kv_bytes(groups: int, tokens: int, helix: bool, element: int) -> int:
    """Bytes of keys and values that one rank caches for `tokens` positions of one layer."""
    heads = groups / TP if helix else max(1, groups // TP)
    return int(2 * tokens * heads * DIM * element)


def block_tokens(groups: int, settings: dict | None, host: bool) -> int:
    """Tokens of a block: on GPUs a rank keeps PAGE of them, as `helix generate` has it; m times as many are
    one block of a sharded cache."""
    if settings is None or host:
        return PAGE
    from helix_megatron.partition.config import HelixConfig

    return PAGE * HelixConfig(**settings).resolve(HEADS, groups, DIM, TP).grid.dim_parallel_size


class Side:
    """A layer of one side, with an inference context of its own, filled.

    Args:
        groups: G, KV heads.
        settings: Helix settings; None for Megatron's own layer.
        batch, length: requests and their tokens, for which the cache has room.
        dtype: of weights and cache.
        graphs: every size of step is captured once and replayed.
        flash: the FlashAttention that both sides take; None on a host.
    """

    def __init__(
        self, groups: int, settings: dict | None, batch: int, length: int, dtype: torch.dtype,
        graphs: bool = False, flash: int | None = None,
    ):  # fmt: skip
        from helix_megatron.host.mode import host_mode_enabled
        from helix_megatron.partition.config import HelixConfig

        host = host_mode_enabled()
        self.graphs: dict | None = {} if graphs else None
        self.batch, self.length, self.block = batch, length, block_tokens(groups, settings, host)
        helix = None if settings is None else HelixConfig(**settings)
        fused = not host and find_spec("transformer_engine") is not None
        how = dict(graphs=graphs, flash=flash, transformer_engine=fused, rope_fusion=fused)
        with bench.attention_layer((HEADS, groups, DIM, HIDDEN), TP, dtype, helix, **how) as (layer, config):
            self.layer = layer.eval()
            blocks = batch * -(-length // self.block)
            block_bytes = kv_bytes(groups, self.block, settings is not None, dtype.itemsize)
            self.context, self.table = new_context(
                config, blocks, block_bytes, length, batch, self.block, graphs=SIZES if graphs else None,
                requests=REQUESTS,
            )
        self.fill(groups, settings is not None, dtype)

    def fill(self, groups: int, helix: bool, dtype: torch.dtype) -> None:
        """Keys and values that depend on request and position alone, so that both sides hold the same."""
        drawn = torch.randn(2, 61, PAGE, groups, DIM, generator=torch.Generator().manual_seed(2)).to(dtype)
        rank, pages = torch.distributed.get_rank(), self.block // PAGE
        memory = self.context.memory_buffer[:, 0]  # [2, blocks, block, K, d] or, of slices, d/m
        for request, blocks in enumerate(self.table.tolist()):
            for number, block in enumerate(blocks):
                parts = [(7 * request + 3 * (number * pages + page)) % 61 for page in range(pages)]
                whole = drawn[:, parts].flatten(1, 2)
                if not helix:
                    heads = slice(rank * groups // TP, rank * groups // TP + 1)
                    memory[:, block] = whole[:, :, heads]
                    continue
                plan = self.layer.helix_plan
                i, j = plan.grid.coordinate(rank)
                m, heads = plan.grid.dim_parallel_size, plan.layout.kv_heads
                heads = slice(i * heads, (i + 1) * heads)
                if plan.kv_cache == "dim":
                    for half, dims in enumerate((plan.layout.key_dims(j), plan.layout.value_dims(j))):
                        memory[half, block] = whole[half][:, heads, dims]
                    continue
                own = torch.arange(self.block) // min(plan.kv_interleave_size, self.block // m) % m == j
                memory[:, block] = whole[:, own, heads].reshape(memory[:, block].shape)

    def at(self, batch: int, length: int) -> None:
        """Put the context into a decode step of `batch` requests, whose new tokens are their `length`-th."""
        set_decode_step(self.context, self.table, batch, length, self.block)

    def step(self, hidden: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """[tokens, 1, h] to the same, the requests' next token through the layer; with graphs, a replay."""
        tokens = self.context.padded_active_token_count

        def run() -> torch.Tensor:
            return self.layer(hidden[:tokens], None, inference_context=self.context, rotary_pos_emb=rope)[0]

        if self.graphs is None:
            return run()
        sizes = self.context.padded_batch_dimensions
        if sizes not in self.graphs:
            from helix_megatron.check.graphs import captured

            self.graphs[sizes] = captured(run)
        replay, out = self.graphs[sizes]
        replay()
        return out


def worker(
    case: str, contexts: list[int], batches: list[int], turns: int, layers: int, dtype_name: str,
    flash: int | None,
) -> list[dict]:  # fmt: skip
    """What one rank does: rows of measurements, equal on all ranks; eager ones, then those of graphs."""
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.utils import InferenceMode

    from helix_megatron.host.mode import host_mode_enabled

    dtype, host = bench.DTYPES[dtype_name], host_mode_enabled()
    bench.initialize(TP)
    longest, flash = max(contexts), flash_version(host, flash)
    tokens = DynamicInferenceContext.round_up_tokens(max(REQUESTS, *batches), TP)
    hidden = torch.randn(tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(3))
    inputs = hidden.to(torch.cuda.current_device(), dtype), bench.rotary(longest, DIM)
    rows = []
    with torch.inference_mode(), InferenceMode.active():
        for graphs in (False,) if host else (False, True):
            settings = {"Megatron": None, **VARIANTS}
            if graphs:
                settings.pop("Helix dim")  # NO_GRAPH
            sides = {
                name: Side(CASES[case], one, max(batches), longest, dtype, graphs, flash)
                for name, one in settings.items()
            }
            for length in contexts:
                for batch in batches:
                    measured = measure(sides, inputs, length, batch, turns, layers)
                    mode = "graph" if graphs else "eager"
                    new = [row(case, mode, length, batch, n, layers, sides[n], *measured) for n in sides]
                    best = next((r for r in new if r["side"] == chosen(CASES[case], length, host)), None)
                    rows += new
                    if best is not None:
                        rows.append({**best, "side": "Helix auto", "is": best["side"]})
            del sides
    torch.distributed.destroy_process_group()
    return rows


def measure(
    sides: dict[str, Side], inputs: tuple, length: int, batch: int, turns: int, layers: int
) -> tuple[dict, dict]:
    """Seconds of every turn, and the collectives of one layer, by side; outputs are compared first."""
    from helix_megatron.measure.comm import CommMeter

    samples: dict = {name: [] for name in sides}
    tallies, wanted = {}, None
    for name, side in sides.items():  # warm-up, the count of one layer, and what it computes
        side.at(batch, length)
        meter = CommMeter()
        with meter.counting():
            out = side.step(*inputs)[:batch].float().clone()
        tallies[name] = meter.as_json()
        wanted = out if wanted is None else wanted  # Megatron's, the first
        error = (out - wanted).norm() / wanted.norm()
        assert error < (1e-4 if inputs[0].dtype is torch.float32 else 3e-2), f"{name} {length}: {error}"

    def steps(side: Side) -> None:
        for _ in range(layers):
            side.step(*inputs)

    for turn in range(turns):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            sides[name].at(batch, length)  # a new step: its first layer does the step's own work
            samples[name].append(slowest_seconds(partial(steps, sides[name])) / layers)
    return samples, tallies


def flash_version(host: bool, asked: int | None) -> int | None:
    """The FlashAttention of both sides: the newest that both can take. Megatron alone would take 4 first."""
    if host or asked:
        return asked
    from megatron.core.transformer import attention

    return 3 if attention.HAVE_FA3 else 2


def attends_with(host: bool, dtype: torch.dtype, asked: int | None) -> dict[str, str]:
    """What each side's attention runs on, in words."""
    if host:
        return dict.fromkeys(("Megatron", "Helix"), "host mode's kernels")
    from helix_megatron.kernels import selection

    version = flash_version(host, asked)
    kind = "cuda", dtype, PAGE, False, os.environ.get(selection.OVERRIDE), DIM
    names = {"Megatron": f"FlashAttention {version}"}
    for side, graph in (("Helix", False), ("Helix in graphs", True)):
        choice = selection.choose(
            *kind, torch.cuda.get_device_capability()[0], flash_version=version, graph=graph, compare=False
        )
        names[side] = f"{choice.singles} ({choice.reason})"
    return names


def row(case, mode, length, batch, name, layers, side, samples, tallies) -> dict:
    """One line of the table: times in seconds per layer, bytes per rank and layer."""
    base = statistics.median(samples["Megatron"])
    ratios = [ours / theirs for ours, theirs in zip(samples[name], samples["Megatron"], strict=True)]
    context = side.context
    tokens = context.padded_active_token_count
    tally = tallies[name]
    calls, received = inside_attention(tally, tokens, context.memory_buffer.element_size())
    token_bytes = context.memory_buffer.nbytes / compat.cache_blocks(context.kv_block_allocator) / side.block
    return {
        "case": case,
        "mode": mode,
        "context": length,
        "batch": batch,
        "tokens": tokens,
        "side": name,
        "seconds_median": statistics.median(samples[name]),
        "time_ratio": statistics.median(samples[name]) / base,
        "time_ratio_of_turns_median": statistics.median(ratios),
        "kv_bytes_per_rank": int(token_bytes * length * batch),
        "collectives_inside_attention": calls,
        "message_bytes": received,
        "collectives": tally,
        "samples": samples[name],
    }


def inside_attention(tally: dict, tokens: int, element: int) -> tuple[int, float]:
    """Calls, and bytes that a rank receives, without linear_proj's all-reduce, the same on both sides."""
    calls = sum(entry["calls"] for entry in tally.values()) - 1
    projection = 2 * (TP - 1) / TP * tokens * HIDDEN * element
    return calls, sum(entry["bytes"] for entry in tally.values()) - projection


def predicted(contexts: list[int], batches: list[int], element: int) -> list[dict]:
    """What a step would gain if reading the cache were all it did."""
    rows = []
    for case, groups in CASES.items():
        for length in contexts:
            for batch in batches:
                theirs, ours = (kv_bytes(groups, batch * length, helix, element) for helix in (False, True))
                rows.append({"case": case, "context": length, "batch": batch, "Megatron bytes": theirs,
                             "Helix bytes": ours, "time ratio at best": ours / theirs})  # fmt: skip
    return rows


def crossovers(rows: list[dict]) -> list[dict]:
    """For every case, mode and batch the shortest measured context from which on Helix is faster; or None."""
    found = {}
    for r in sorted(rows, key=lambda r: -r["context"]):
        key = (r["case"], r["mode"], r["batch"], r["side"])
        if r["side"] == "Megatron" or found.get(key, {}).get("lost"):
            continue
        lost = r["time_ratio"] >= 1
        before = found.get(key, {}).get("from")
        found[key] = {"from": before if lost else r["context"], "lost": lost}
    return [
        {"case": case, "mode": mode, "batch": batch, "side": side, "from": entry["from"]}
        for (case, mode, batch, side), entry in sorted(found.items())
    ]


def _markdown(header: str, rows: list[list[str]]) -> list[str]:
    columns = header.split("|")
    lines = [header, "|".join([" --- "] * len(columns)), *(" | ".join(row) for row in rows)]
    return [f"| {line.strip()} |" for line in lines]


def tables(prediction: list[dict], rows: list[dict]) -> str:
    """The prediction, the measurements, and where Helix starts to win, as Markdown."""
    lines = ["Predicted from the bytes of the cache alone (of a rank, layer and step):", ""]
    lines += _markdown(
        "KV heads | context | batch | Megatron MB | Helix MB | time ratio at best",
        [
            [p["case"], f"{p['context']:,}", str(p["batch"]), f"{p['Megatron bytes'] / 1e6:.2f}",
             f"{p['Helix bytes'] / 1e6:.2f}", f"{p['time ratio at best']:.3f}"]
            for p in prediction
        ],
    )  # fmt: skip
    lines += [
        "",
        "Measured (medians; linear_proj's all-reduce, equal on both sides, is timed, not counted):",
        "",
    ]
    base = {(r["case"], r["context"], r["batch"]): r for r in rows if r["side"] == "Megatron"}  # of any mode
    lines += _markdown(
        "KV heads | step | context | batch | side | ms per layer | time ratio | KV bytes per rank | ratio | "
        "collectives | message bytes",
        [
            [r["case"], r["mode"], f"{r['context']:,}", str(r["batch"]), _named(r),
             f"{r['seconds_median'] * 1e3:.2f}", f"{r['time_ratio']:.3f}", f"{r['kv_bytes_per_rank']:,}",
             f"{r['kv_bytes_per_rank'] / base[r['case'], r['context'], r['batch']]['kv_bytes_per_rank']:.3f}",
             str(r["collectives_inside_attention"]), f"{r['message_bytes']:,.0f}"]
            for r in rows
        ],
    )  # fmt: skip
    lines.append("")
    for win in crossovers(rows):
        where = f"from {win['from']:,} tokens on" if win["from"] else "at no context measured"
        what = f"{win['side']}, {win['case']}, {win['mode']}, batch {win['batch']}"
        lines.append(f"- {what}: faster than Megatron {where}.")
    if {r["mode"] for r in rows} == {"eager"}:
        lines.append(f"- Graphs: {NO_GPU}.")
    worst = max((r for r in rows if r["side"] == "Helix auto"), key=lambda r: r["time_ratio"])
    lines.append(
        f"- Helix auto takes at most {worst['time_ratio']:.3f} of Megatron's time ({worst['case']}, "
        f"{worst['context']:,} tokens, batch {worst['batch']})."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[128, 1024, 2048, 4096, 8192, 32768, 131072]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=11, help="timed repetitions of every side")
    parser.add_argument("--layers", type=int, default=4, help="decode steps of the layer in one sample")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="fp32 on a host, bf16 on GPUs")
    parser.add_argument("--flash-attention-version", type=int, choices=[2, 3], help="of both sides, on GPUs")
    parser.add_argument("--out", help="also write the JSON document here, and the tables beside it (.md)")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    cases = list(CASES) if options.case == "all" else [options.case]
    rows: list[dict] = []
    for case in cases:
        given = (case, options.contexts, options.batches, options.turns, options.layers, options.dtype,
                 options.flash_attention_version)  # fmt: skip
        rows += bench.rows_of(worker, TP, *given, timeout_s=1800)
    if int(os.environ.get("RANK", "0")):
        return
    element = bench.DTYPES[options.dtype].itemsize
    prediction = [p for p in predicted(options.contexts, options.batches, element) if p["case"] in cases]
    text = tables(prediction, rows)
    document = {
        "benchmark": "decode",
        "measured": "times, message and KV bytes per rank; `prediction` is computed",
        "hardware": bench.hardware(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "graph": "measured; " + NO_GRAPH if any(r["mode"] == "graph" for r in rows) else NO_GPU,
        "attends with": attends_with(not torch.cuda.is_available(), bench.DTYPES[options.dtype],
                                      options.flash_attention_version),
        "shape": {"TP": TP, "heads": HEADS, "dim": DIM, "hidden": HIDDEN, "page": PAGE, "KV heads": CASES},
        "prediction": prediction,
        "Helix wins": crossovers(rows),
        "rows": rows,
    }
    if options.out:
        Path(options.out).write_text(json.dumps(document) + "\n", encoding="utf-8")
        Path(options.out).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(json.dumps(document))


def _named(r: dict) -> str:
    return f"{r['side']} ({r['is'].removeprefix('Helix ')})" if "is" in r else r["side"]


if __name__ == "__main__":
    main()
