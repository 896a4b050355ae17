"""What one rank's attention layer asks of its device and its network: counted, not timed.

    python benchmarks/operations.py --out benchmarks/results/operations.json

One process stands for rank 0 of a tensor-parallel group whose collectives move nothing (torch's fake process
group), so sizes are the real ones. Per layer, one sequence, bf16, forward + backward:

    operations, read, written   kernels besides matrix products and attention itself (measure/operations.py):
                                packing and merging of the exchange, QK norm, RoPE, gradients. RoPE and a norm
                                of whole heads are one kernel each way, as Transformer Engine has them
    collectives, received       inside the dim group; bytes that this rank receives in them (measure/comm.py)

All of it grows with the sequence alike; a short one is enough. Prints a table and, as the last line, one JSON
document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import bench
import torch
from torch.utils._python_dispatch import _disable_current_modes

CASES = {
    # H, G, d, ranks, n, m, placement, QK norm
    "64/8 TP=16 8x2 heads": (64, 8, 128, 16, 8, 2, "heads", False),
    "64/8 TP=16 8x2 dims": (64, 8, 128, 16, 8, 2, "dims", False),
    "32/32 TP=16 8x2 heads": (32, 32, 128, 16, 8, 2, "heads", False),
    "32/32 TP=16 4x4 heads": (32, 32, 128, 16, 4, 4, "heads", False),
    "28/4 TP=8 4x2 dims": (28, 4, 128, 8, 4, 2, "dims", False),
    "40/8 TP=16 8x2 dims, QK norm": (40, 8, 128, 16, 8, 2, "dims", True),
    "40/8 TP=8 4x2 heads, QK norm": (40, 8, 128, 8, 4, 2, "heads", True),
}
SEQUENCE, HIDDEN = 256, 512


def count(case: str, fused_rope: bool = True) -> dict[str, float]:
    """One layer, forward + backward, on rank 0."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rope_utils
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from helix_megatron.measure.comm import CommMeter
    from helix_megatron.measure.operations import ATTENTION, MATRIX, OTHER, OperationMeter
    from helix_megatron.megatron import sdpa
    from helix_megatron.partition.config import HelixConfig

    heads, groups, dim, tp, n, m, placement, qk_norm = CASES[case]
    bench.initialize(tp, fake=FakeStore())
    helix, shape = HelixConfig(n, m, query_placement=placement), (heads, groups, dim, HIDDEN)
    operations, comm = OperationMeter(), CommMeter()
    torch.nn.RMSNorm.forward, rope_utils.fused_apply_rotary_pos_emb = _norm, _rotate
    with bench.attention_layer(shape, tp, torch.bfloat16, helix, qk_norm=qk_norm) as (layer, _):
        layer.config.apply_rope_fusion = fused_rope
        hidden = torch.randn(SEQUENCE, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        rope = bench.rotary(SEQUENCE, dim)
        gradient = torch.ones(SEQUENCE, 1, HIDDEN, dtype=torch.bfloat16)

        def step() -> None:
            out, _ = layer(hidden, None, rotary_pos_emb=rope)
            out.backward(gradient)

        step()  # what is made once is not counted
        lower_right = partial(_uncounted, sdpa.causal_lower_right)
        masks = mock.patch.object(sdpa, "causal_lower_right", lower_right)
        with masks, comm.counting(), operations.counting():
            step()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    tallies, inside = operations.tallies, [v for k, v in comm.tallies.items() if k.endswith(f" x{m}")]
    assert tallies[ATTENTION].count and tallies[MATRIX].count
    return {
        "operations": tallies[OTHER].count,
        "read": tallies[OTHER].read,
        "written": tallies[OTHER].written,
        "collectives": sum(tally.calls for tally in inside),
        "received": sum(tally.bytes for tally in inside),
    }


# ---- kernels that a GPU has ----
# Transformer Engine rotates and norms in one kernel each way. These stand for them, for their bytes alone.
@torch.library.custom_op("helix_count::one_kernel", mutates_args=())
def _one_kernel(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("helix_count::one_norm_backward", mutates_args=())
def _one_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, parameter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(parameter)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(table)
        return _one_kernel(x, table)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _one_kernel(grad, *ctx.saved_tensors), None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _one_kernel(x, weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _one_norm_backward(grad, *ctx.saved_tensors)


def _rotate(x: torch.Tensor, table: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    return _Rotation.apply(x, table)


def _norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(x, module.weight)


def _uncounted(make: Callable[..., Any], *args: Any) -> Any:
    """A mask that is a subclass of Tensor, which cannot be made while operations are counted."""
    with _disable_current_modes():
        return make(*args)


def table(document: dict[str, Any]) -> str:
    """The counts in Markdown, each behind the one before where there is one."""
    lines = ["| layer | operations | read, kB | written, kB | collectives | received, kB |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for case, now in document["cases"].items():
        columns = [(now[key], 1 if key in ("operations", "collectives") else 1000) for key in now]
        then = document.get("before", {}).get(case, {})
        cells = [
            (f"{then[key] / unit:,.0f} → " if then else "") + f"{value / unit:,.0f}"
            for key, (value, unit) in zip(now, columns, strict=True)
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from helix_megatron.host.launcher import run_ranks

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--no-rope-fusion", action="store_true", help="Megatron's RoPE of many kernels")
    parser.add_argument("--before", help="an earlier document, to be shown (and kept) beside this one")
    parser.add_argument("--out", help="also write the JSON document here")
    options = parser.parse_args()
    cases = list(CASES) if options.case == "all" else [options.case]
    fused = not options.no_rope_fusion
    found = {case: run_ranks(count, 1, case, fused, timeout_s=300)[0] for case in cases}
    document = {
        "benchmark": "operations",
        "measured": "counted, per layer, forward + backward, on rank 0; collectives of a fake process group",
        "torch": torch.__version__,
        "sequence": SEQUENCE,
        "dtype": "bf16",
        "cases": found,
    }
    if options.before:
        with open(options.before, encoding="utf-8") as file:
            document["before"] = json.load(file)["cases"]
    print(table(document))
    text = json.dumps(document)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
