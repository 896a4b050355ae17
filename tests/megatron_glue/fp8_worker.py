"""One attention layer of Transformer Engine's spec in FP8 against float64, on torch versions of its kernels.

As a program (test_fp8.py starts it, in a process with Transformer Engine) it reads [[ranks, [job, ...]], ...]
from stdin, a job being {"case", "helix": null or settings, "recipe": null for bf16}; its last line is, for
every list of jobs and rank, [{"errors", "quantised": [[shape, dtype], ...], "weights": [shape, shape]}].
"""

import json
import os
import sys
from dataclasses import replace

import torch

from helix_megatron.check.reference import Case, normalise, reference
from helix_megatron.host.launcher import run_ranks
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.layer_worker import Groups, errors, load, make_layer, run, start

STEPS = 3  # delayed scaling starts with a scale of 1


def rank_layers(ranks: int, jobs: list[dict]) -> list[dict]:
    """What this rank found, for each job."""
    from tests.megatron_glue.te_worker import claim_hopper

    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"):
        os.environ[name] = "0"
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # Python code in place of a kernel
    quantised: list = []
    claim_hopper(lambda tensor, dtype: quantised.append([list(tensor.shape), dtype]))
    start(ranks)
    groups, found = Groups(), []
    for job in jobs:
        quantised.clear()
        found.append(_layer(job, ranks, groups))
        found[-1]["quantised"] = [list(x) for x in {(tuple(s), d) for s, d in quantised}]
    return found


def _layer(job: dict, ranks: int, groups: Groups) -> dict:
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch import quantization

    # They ask for a CUDA of torch's and, MXFP8, for a Blackwell.
    quantization._FP8_BLOCK_SCALING_SUPPORT = quantization._MXFP8_SUPPORT = True, ""
    case, rank = Case(**job["case"]), torch.distributed.get_rank()
    case.draw()
    for name in ("hidden", "qkv_weight", "proj_weight"):  # representable
        case.tensors[name] = case.tensors[name].bfloat16().double()
    flags = dict(params_dtype=torch.bfloat16, bf16=True, use_cpu_initialization=True)
    if job["recipe"]:
        flags |= dict(fp8="hybrid", fp8_recipe=job["recipe"])
    rows = columns = slice(None)
    helix = job["helix"] and HelixConfig(**job["helix"])
    own = None
    if helix is not None:
        layout = helix.resolve(case.heads, case.groups, case.dim, ranks).layout
        rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
        own = groups.of(layout.grid)
    layer = make_layer(case, helix, ranks, own, te=True, **flags)
    load(layer, case, rows, columns, torch.bfloat16)
    for _ in range(STEPS):
        layer.zero_grad()
        with get_fp8_context(layer.config):
            result = run(layer, case, ranks, torch.bfloat16)
    weights = [list(layer.linear_qkv.weight.shape), list(layer.linear_proj.weight.shape)]
    return {"errors": errors(result, _expected(case), rows, columns), "weights": weights}


def _expected(case: Case) -> dict[str, torch.Tensor]:
    """The reference behind the RMSNorm that linear_qkv begins with."""
    hidden = case.tensors["hidden"].clone().requires_grad_()
    normal = normalise(hidden, torch.ones(case.hidden).double(), "RMSNorm")
    found = reference(replace(case, tensors={**case.tensors, "hidden": normal.detach()}))
    (found["hidden"],) = torch.autograd.grad(normal, hidden, found["hidden"])
    return found


if __name__ == "__main__":
    from tests.megatron_glue.fp8_worker import rank_layers as by_name  # ranks import it by name

    lists = json.load(sys.stdin)
    print(json.dumps([run_ranks(by_name, ranks, ranks, jobs, timeout_s=300) for ranks, jobs in lists]))
