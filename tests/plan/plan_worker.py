"""What a rank does in the planner's tests: builds layouts with Megatron and measures them."""

from __future__ import annotations

from dataclasses import replace

import torch

from helix_megatron import cli
from helix_megatron.plan import machine, probe_collectives, probe_rates, trial
from helix_megatron.plan.layout import Problem


def measure(problems: list[Problem]) -> list[trial.Measured]:
    torch.distributed.init_process_group("nccl")
    return [trial.measure(problem, steps=1, warmup=0) for problem in problems]


def probe(path: str, gpus: int) -> int:
    """`helix plan --probe` as on a machine of `gpus` H100, with sizes for a core."""
    joined = tuple(range(gpus))
    machine.read_gpus = lambda: [("NVIDIA H100 80GB HBM3", 80 * 10**9, joined)] * gpus
    probe_collectives.SMALL, probe_collectives.LARGE = (4096, 1 << 16), (1 << 18, 1 << 20)
    probe_rates.GPU = replace(
        probe_rates.HOST, rows=64, width=256, read=512, positions=128, keys=256, passed=1 << 20, ring=8 << 20
    )
    return cli.main(["plan", "--probe", path])


def hybrid_parameters(problem: Problem) -> int:
    """Parameters of this rank's GPTModel with gated delta nets, its own and no kernel's: nothing runs."""
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.ssm.gated_delta_net import common
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    torch.distributed.init_process_group("nccl")
    common.HAVE_FLA = True
    with trial.parallel(problem):
        shape, layout = problem.shape, problem.layout
        config = trial.core_config(problem)
        config.deterministic_mode = True  # whose delta rule is torch's
        for name in ("linear_attention_freq", "linear_num_key_heads", "linear_num_value_heads",
                     "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"):  # fmt: skip
            setattr(config, name, getattr(shape, name))
        config.experimental_attention_variant = "gated_delta_net"
        backend = LocalSpecProvider()
        norms = {"normalization": shape.normalization, "qk_layernorm": True}
        attention = gpt_layer_specs.get_gpt_layer_local_spec(shape.num_moe_experts, **norms)
        gdn = gpt_layer_specs.get_gpt_layer_local_spec(shape.num_moe_experts, **norms)
        gdn.submodules.self_attention = specs.get_gated_delta_net_module_spec(config, backend)
        gdn.submodules.self_attention.submodules.in_proj = ColumnParallelLinear
        first = parallel_state.get_pipeline_model_parallel_rank() * problem.layers
        pattern = specs.get_linear_attention_pattern(config)[first : first + problem.layers]
        model = GPTModel(
            config,
            TransformerBlockSubmodules(
                layer_specs=[gdn if linear else attention for linear in pattern],
                layer_norm=backend.layer_norm(rms_norm=True),
            ),
            vocab_size=shape.padded_vocab_size(layout.tp),
            max_sequence_length=64,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
    return sum(parameter.numel() for parameter in model.parameters())
