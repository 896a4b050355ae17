"""State of a model of Transformer Engine's layers, by Megatron and with Helix (test_te.py starts it).

Its last line is {variant: {"state", "sharded": names, "loads": {what was loaded: what was said}}}.
"""

import json
import os
import sys
import tempfile

import torch

from helix_megatron.host.launcher import run_ranks

CORE = "decoder.layers.0.self_attention.core_attention"
VARIANTS = {
    "vanilla": None,
    "dims": {"query_placement": "dims"},
    "heads": {"query_placement": "heads"},
    "all_reduce": {"comm_type": "all_reduce"},
}


def make_model(variant, softmax):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig

    from helix_megatron.megatron import integrate
    from helix_megatron.partition.config import HelixConfig
    from helix_megatron.partition.grid import HelixGrid

    if VARIANTS[variant] is not None:
        helix = HelixConfig(head_parallel_size=1, rotary_percent=0.0, **VARIANTS[variant])
        integrate.enable(helix, HelixGrid(1, 2))
    torch.distributed.init_process_group("nccl", rank=int(os.environ["RANK"]), world_size=2)
    parallel_state.initialize_model_parallel(2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
        qk_layernorm=True,
        normalization="RMSNorm",
        softmax_type=softmax,
    )
    return GPTModel(config, get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True), 32, 8)


def said(model, state):
    """What a strict load says; nothing when it is content."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        return " ".join(str(error).split())
    return ""


def rank_state(variant, softmax, folder):
    from megatron.core import dist_checkpointing

    model = make_model(variant, softmax)
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    read = dist_checkpointing.load(model.sharded_state_dict(), folder)
    own, norm = dict(model.state_dict()), "decoder.layers.0.self_attention.q_layernorm.weight"
    return {
        "state": sorted(own),
        "sharded": sorted(model.sharded_state_dict()),
        "loads": {
            "a distributed checkpoint": said(model, read),
            "its own state": said(model, own),
            "state of Megatron's core": said(model, {f"{CORE}._extra_state": None, **own}),
            "a name too many": said(model, {**own, f"{CORE}.nonsense": torch.ones(1)}),
            "a name too few": said(model, {name: value for name, value in own.items() if name != norm}),
        },
    }


if __name__ == "__main__":
    found = {}
    for name in VARIANTS:
        for softmax in ("vanilla", "learnable")[: 1 if name == "all_reduce" else 2]:
            with tempfile.TemporaryDirectory() as folder:
                found[f"{name} {softmax}"] = run_ranks(rank_state, 2, name, softmax, folder, timeout_s=120)[1]
    print(json.dumps(found))
    sys.exit()
