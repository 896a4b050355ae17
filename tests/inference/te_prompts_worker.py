"""Prompts by Transformer Engine's core, in a process that has its Python code (test_prompts.py starts it).

Prints, for each rank, of each job [class of the core, relative error of a prompt and the tokens after it in a
static context, how often the core ran, error of two packed prompts].
"""

import json
from types import SimpleNamespace

import torch

from helix_megatron.check.reference import Case, reference
from helix_megatron.host.launcher import run_ranks
from helix_megatron.inference.prompts import attend_among_themselves, find_prompts
from helix_megatron.kernels.paged_attention import Requests
from helix_megatron.partition.config import HelixConfig

JOBS = [
    (Case(8, 1, 16, seq=12, sinks=True, window=(5, 0)), {}),
    (Case(8, 1, 16, seq=12, qk_norm="RMSNorm", gate=True), dict(query_placement="dims")),
]


def rank_jobs() -> list[list]:
    from megatron.core.inference.contexts import StaticInferenceContext

    from tests.inference.kv_cache_worker import decode
    from tests.megatron_glue.layer_worker import Groups, inferring, load, make_layer, start

    start(2)
    groups, rank, found = Groups(), torch.distributed.get_rank(), []
    for case, more in JOBS:
        case.draw()
        helix = HelixConfig(1, 2, **more)
        layout = helix.resolve(case.heads, case.groups, case.dim, 2, output_gate=case.gate).layout
        layer = make_layer(case, helix, 2, groups.of(layout.grid), te=True).eval()
        load(layer, case, layout.qkv_rows(rank), layout.proj_columns(rank), torch.float32)
        runs: list[int] = []
        hook = layer.core_attention.core.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        out, _ = decode(layer, case, StaticInferenceContext(case.batch, case.seq), [7])
        hook.remove()
        expected = reference(case, input_norm=True)["output"]
        packed = _packed(layer, case, inferring)
        wanted = torch.cat([expected[:5, 0], expected[:7, 0]])
        errors = [((a - b).norm() / b.norm()).item() for a, b in ((out, expected), (packed, wanted))]
        found.append([type(layer.core_attention.core).__name__, errors[0], len(runs), errors[1]])
    return found


def _packed(layer, case: Case, inferring) -> torch.Tensor:
    """Output of the first 5 tokens as one prompt and the first 7 as another, in one step."""
    hidden, table = case.tensors["hidden"].float()[:, :1], case.rope_table()
    requests = Requests(torch.tensor([0, 5, 12]).int(), torch.tensor([5, 7]).int(), torch.zeros(2, 3).int())
    prompts = find_prompts([5, 7], [0, 0], requests)
    nowhere = SimpleNamespace(write_new_tokens=lambda key, value: None)
    rows = torch.cat([table[:5], table[:7]])
    with inferring():
        query, key, value, *gate = layer.project(torch.cat([hidden[:5], hidden[:7]]), case.gate)
        given = (layer, query, key, value, (rows, rows), nowhere, prompts.packed(on_host=False))
        out = attend_among_themselves(*given)
        out = layer._apply_output_gate(out, gate[0]) if gate else out
        return layer.linear_proj(out)[0][:, 0].double()


if __name__ == "__main__":
    from tests.inference.te_prompts_worker import rank_jobs as by_name  # ranks import it by name

    print(json.dumps(run_ranks(by_name, 2, timeout_s=200)))
