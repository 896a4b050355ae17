"""A tiny Hugging Face model through Megatron-Bridge in a process of its own (test_bridge.py starts it).

Reads {"runs": [[tp, pp, {model: [folder, settings]}]], "refusals": folder, "out": folder} from stdin. Results
of run k are in out/runk.pt, what was refused is the last line of output.
"""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path

import torch

from helix_megatron.host import launcher as launch
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError

launch._PRELOAD.append("megatron.bridge")  # imported once, before the ranks are forked
HELIX_ARGS = "--helix-dim-parallel-size 2 --helix-query-placement dims"
TOKENS = (torch.arange(2 * 21) * 7 % 96).view(2, 21)


def provider_of(bridge, tp, pp=1):
    provider = bridge.to_megatron_provider()
    provider.pipeline_model_parallel_size = pp
    provider.tensor_model_parallel_size = tp
    provider.params_dtype, provider.bf16 = torch.float32, False
    provider.gradient_accumulation_fusion = provider.masked_softmax_fusion = provider.apply_rope_fusion = (
        False
    )
    provider.bias_dropout_fusion = provider.bias_activation_fusion = False
    provider.attention_backend, provider.moe_permute_fusion = "unfused", False
    if provider.num_moe_experts and provider.add_bias_linear:  # Megatron has biases of whole experts alone
        provider.expert_tensor_parallel_size = 1
    provider.deterministic_mode = provider.experimental_attention_variant is not None
    return provider


def hybrid_provider(tp):
    """One KV head: two ranks slice it."""
    from megatron.bridge.models.hybrid import HybridModelProvider

    return HybridModelProvider(
        hybrid_layer_pattern="*-", hidden_size=48, num_attention_heads=4, num_query_groups=1, kv_channels=16,
        ffn_hidden_size=64, vocab_size=96, seq_length=64, tensor_model_parallel_size=tp, bf16=False,
        params_dtype=torch.float32, gradient_accumulation_fusion=False, attention_backend="unfused",
    )  # fmt: skip


def start(provider):
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def whole_logits(model):
    """[b, s, vocabulary] on every rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    with torch.no_grad():
        logits = model[0].eval()(TOKENS, positions, None)
    return gather_from_tensor_model_parallel_region(
        logits, group=parallel_state.get_tensor_model_parallel_group()
    )


def rank_models(tp, pp, models):
    """For each model: logits (without a pipeline), and the weights exported again (rank 0)."""
    from megatron.bridge import AutoBridge

    from helix_megatron.megatron.bridge import forget, with_helix
    from helix_megatron.megatron.specs import gpt_layer_spec

    found = {}
    for name, (folder, settings) in models.items():
        bridge = AutoBridge.from_hf_pretrained(folder)
        provider = provider_of(bridge, tp, pp)
        if settings == "plugin":
            register_by_import(HELIX_ARGS)
        elif settings == "gpt_layer_spec":
            provider.transformer_layer_spec = gpt_layer_spec
            with_helix(provider, HelixConfig(1, tp))
        elif settings is not None:
            with_helix(provider, HelixConfig(**settings))
        model = start(provider)
        attention = type(model[0].decoder.layers[-1].self_attention).__name__
        assert ("Helix" in attention) == (settings is not None)
        exported = {key: weight.clone() for key, weight in bridge.export_hf_weights(model, cpu=True)}
        found[name] = (whole_logits(model) if pp == 1 else None, exported)
        forget()
    return found if torch.distributed.get_rank() == 0 else None


def register_by_import(words):
    """Import the plugin, as a framework would in a new process."""
    os.environ["HELIX_ARGS"] = words
    sys.modules.pop("helix_megatron.plugin", None)
    importlib.import_module("helix_megatron.plugin")


def refusal(action):
    try:
        action()
    except (ValueError, HelixConfigError) as error:
        return str(error)
    return None


def rank_refusals(folder):
    """What Bridge says to slices it was not told of, and what we say to what cannot work."""
    from megatron.bridge import AutoBridge

    from helix_megatron.megatron import bridge as helix_bridge
    from helix_megatron.megatron import integrate
    from helix_megatron.megatron.specs import with_helix_attention
    from helix_megatron.partition.grid import HelixGrid

    bridge = AutoBridge.from_hf_pretrained(folder)
    found = {}
    provider = provider_of(bridge, 2)
    spec, helix = provider.transformer_layer_spec, HelixConfig(1, 2)
    provider.transformer_layer_spec = lambda config: with_helix_attention(spec(config), helix)
    integrate.enable(helix, HelixGrid(1, 2))
    found["not told"] = refusal(lambda: start(provider))
    integrate.disable()
    per_slice = HelixConfig(softmax="per-slice")
    found["per-slice"] = refusal(lambda: helix_bridge.with_helix(provider_of(bridge, 2), per_slice))
    illegal = HelixConfig(2, 1)
    weighted = HelixConfig(1, 2, slice_weights=(3, 1))
    found["uneven"] = refusal(lambda: helix_bridge.with_helix(provider_of(bridge, 2), weighted))
    found["grid"] = refusal(lambda: helix_bridge.with_helix(provider_of(bridge, 2), illegal))
    provider = helix_bridge.with_helix(provider_of(bridge, 2))
    model = start(provider)
    from megatron.bridge.peft.lora import LoRA

    lora = LoRA(target_modules=["linear_qkv"], dim=4)
    found["adapter"] = refusal(lambda: lora(model[0], training=True))
    helix_bridge.forget()
    register_by_import("--helix-softmax per-slice")
    found["plugin"] = refusal(lambda: provider_of(bridge, 2).finalize())
    helix_bridge.forget()
    register_by_import("--attention-impl megatron")
    found["plugin of Megatron's"] = refusal(lambda: provider_of(bridge, 2).finalize())
    helix_bridge.forget()
    layers = start(helix_bridge.with_helix(hybrid_provider(2)))[0].decoder.layers
    found["hybrid model"] = " ".join(type(layer.self_attention).__mro__[1].__name__ for layer in layers[:1])
    helix_bridge.forget()
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
    return found


def main():
    job = json.load(sys.stdin)
    out = Path(job["out"])
    for number, (tp, pp, models) in enumerate(job["runs"]):
        results = launch.run_ranks(rank_models, tp * pp, tp, pp, models, timeout_s=400)[0]
        torch.save(results, out / f"run{number}.pt")
    print(json.dumps(launch.run_ranks(rank_refusals, 2, job["refusals"], timeout_s=300)))


if __name__ == "__main__":
    from tests.megatron_glue.bridge_worker import main as _main  # ranks import this module by name

    _main()
