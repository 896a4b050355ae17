"""How often Transformer Engine chooses a kernel for layers that share positions (test_te_backends.py).

A program, in a process with Transformer Engine; its last line is what rank_choices returns on both ranks.
"""

import json
from dataclasses import replace
from unittest import mock

import torch

from helix_megatron.check.reference import Case
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron import te_backends
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.layer_worker import Groups, make_layer, start


def rank_choices() -> dict:
    """{"found": nothing was chosen yet; "chosen": how often, in each of three passes}"""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    start(2)
    case, helix = Case(3, 3, 16, seq=12), HelixConfig(1, 2)
    groups = Groups().of(helix.resolve(case.heads, case.groups, case.dim, 2).grid)
    cases = [case, replace(case, window=(4, 0))]  # as in models whose layers look at a window in turns
    layers = [make_layer(of_layer, helix, 2, groups, te=True).train() for of_layer in cases]
    found, chosen = te_backends.last_choice()["attention_params"] is None, []
    choose = utils.get_attention_backend
    for _ in range(3):
        with mock.patch.object(utils, "get_attention_backend", side_effect=choose) as seen:
            for layer in layers:
                out, _ = layer(torch.randn(case.seq, 2, case.hidden), None, rotary_pos_emb=case.rope_table())
                out.sum().backward()
        chosen.append(seen.call_count)
    return {"found": found, "chosen": chosen}


if __name__ == "__main__":
    from tests.megatron_glue.te_choice_worker import rank_choices as by_name  # ranks import it by name

    print(json.dumps(run_ranks(by_name, 2, timeout_s=100)))
