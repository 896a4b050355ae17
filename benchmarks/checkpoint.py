"""Saving and loading a GPT with Helix attention against Megatron's own, in one run: time and peak memory.

    python benchmarks/checkpoint.py [--layers 6] [--hidden 1536] [--turns 9] [--out results.json]

Both models live in the same ranks (TP = 4: Megatron, and Helix 2x2) and take turns at
`dist_checkpointing.save` and `load` of their model weights (torch_dist, standard layout). Helix loads with
its checksum verification on, Megatron without, as in training. A time is the slowest rank's, the figure the
median over the turns; memory is a rank's peak resident set during the call, both models included, worst rank.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import bench
import torch

TP = 4


def reset_peak() -> None:
    """Forget the peak resident set so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Peak resident set since reset_peak, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def worker(layers: int, hidden: int, turns: int, folder: str) -> dict:
    """What one rank does; returns samples of every measure, worst rank."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from helix_megatron.megatron import integrate
    from helix_megatron.partition.config import HelixConfig
    from helix_megatron.partition.grid import HelixGrid

    torch.distributed.init_process_group("nccl")
    grid = HelixGrid(2, 2)
    integrate.enable(HelixConfig(2, 2), grid)  # its group hook, for both; the model without it comes after
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=TP)
    tensor_parallel.model_parallel_cuda_manual_seed(1)

    def build() -> GPTModel:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=hidden // 128,
            num_query_groups=4,
            kv_channels=128,
            tensor_model_parallel_size=TP,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        return GPTModel(config, get_gpt_layer_local_spec(), 4096, 256, position_embedding_type="rope")

    models = {"Helix 2x2": build()}
    integrate.disable()
    models["Megatron"] = build()
    samples: dict[str, dict[str, list[float]]] = {
        name: {f"{kind}_{unit}": [] for kind in ("save", "load") for unit in ("s", "bytes")}
        for name in models
    }

    def measured(name: str, kind: str, action) -> None:
        torch.distributed.barrier()
        reset_peak()
        begin = time.perf_counter()
        action()
        worst = torch.tensor([time.perf_counter() - begin, peak()], dtype=torch.float64)
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        samples[name][kind + "_s"].append(worst[0].item())
        samples[name][kind + "_bytes"].append(worst[1].item())

    def save(model: GPTModel, target: Path) -> None:
        dist_checkpointing.save(model.sharded_state_dict(), target)

    def load(model: GPTModel, target: Path) -> None:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), target))

    rank = torch.distributed.get_rank()
    for turn in range(turns + 1):
        for name in list(models) if turn % 2 else list(models)[::-1]:
            model, target = models[name], Path(folder) / f"{turn}_{name.replace(' ', '_')}"
            if rank == 0:
                target.mkdir()
            torch.distributed.barrier()
            measured(name, "save", partial(save, model, target))
            if name != "Megatron":
                integrate.read_checkpoints()
            measured(name, "load", partial(load, model, target))
            integrate.uninstall()
            torch.distributed.barrier()
            if rank == 0:
                shutil.rmtree(target)
    for kinds in samples.values():
        for values in kinds.values():
            del values[:1]  # warm-up
    parameters = sum(p.numel() for p in models["Megatron"].parameters())
    return {"parameters_per_rank": parameters, "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", help="also write the JSON document here")
    options = parser.parse_args()
    from helix_megatron.host.launcher import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        result = run_ranks(worker, TP, options.layers, options.hidden, options.turns, folder, timeout_s=900)[
            0
        ]
    medians = {
        name: {kind: statistics.median(values) for kind, values in kinds.items() if values}
        for name, kinds in result["samples"].items()
    }
    ratios = {kind: medians["Helix 2x2"][kind] / medians["Megatron"][kind] for kind in medians["Megatron"]}
    print(f"{result['parameters_per_rank'] * 4 / 2**20:.0f} MiB of fp32 parameters per rank, TP = {TP}")
    print(f"{'measure':12} {'Megatron':>12} {'Helix 2x2':>12} {'ratio':>7}")
    for kind, ratio in ratios.items():
        scale, unit = (1e3, "ms") if kind.endswith("_s") else (2**-20, "MiB")
        values = [f"{medians[name][kind] * scale:9.1f} {unit}" for name in ("Megatron", "Helix 2x2")]
        print(f"{kind.rsplit('_', 1)[0]:12} {values[0]:>12} {values[1]:>12} {ratio:7.3f}")
    document = {
        "benchmark": "checkpoint",
        "measured": "all of it",
        "hardware": bench.hardware(),
        "torch": torch.__version__,
        "settings": {"layers": options.layers, "hidden": options.hidden, "turns": options.turns, "tp": TP},
        "ratios_helix_to_megatron": ratios,
        **result,
    }
    text = json.dumps(document)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
