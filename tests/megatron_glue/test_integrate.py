"""The way into Megatron: explicit, idempotent, undoable, and the groups it makes."""

import pytest
import torch

from helix_megatron import compat
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron import integrate
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError, HelixGrid


def touched():
    """Everything of Megatron's that integrate.py may replace."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.attention import Attention
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = [
        gpt_layer_specs.SelfAttention,
        Attention.__init__,
        TransformerConfig.__post_init__,
        parallel_state.initialize_model_parallel,
        parallel_state.destroy_model_parallel,
    ]
    if not compat.has_training():
        return model, []
    from megatron.training import arguments, checkpointing

    training = [arguments.add_megatron_arguments, arguments.parse_args, arguments.validate_args]
    return model, [*training, checkpointing._load_base_checkpoint]


@pytest.fixture(autouse=True)
def clean():
    before = touched()
    yield
    integrate.uninstall()
    assert touched() == before


@pytest.mark.training
def test_install_changes_the_parser_only_and_twice_is_once():
    model, parser = touched()
    integrate.install()
    assert touched()[0] == model
    installed = touched()[1]
    assert installed != parser
    integrate.install()
    assert touched()[1] == installed
    integrate.uninstall()
    assert touched() == (model, parser)


def test_enable_is_idempotent_and_undone():
    before = touched()
    integrate.enable(HelixConfig())
    enabled = touched()
    assert all(now is not then for now, then in zip(enabled[0], before[0], strict=True))
    integrate.enable(HelixConfig())
    assert touched() == enabled
    with pytest.raises(RuntimeError, match="disable"):
        integrate.enable(HelixConfig(softmax="per-slice"))
    integrate.disable()
    assert touched() == before


def test_configuration_keeps_its_heads_and_loses_only_the_divisibility_check():
    from megatron.core.transformer.transformer_config import TransformerConfig

    def config(**changes):
        settings = dict(num_layers=1, hidden_size=144, num_attention_heads=9, num_query_groups=3)
        return TransformerConfig(**{**settings, "tensor_model_parallel_size": 2, **changes})

    with pytest.raises(ValueError, match="must be a multiple"):
        config()
    integrate.enable(HelixConfig())
    made = config()
    assert (made.num_attention_heads, made.num_query_groups, made.kv_channels) == (9, 3, 16)
    assert config(num_query_groups=None).num_query_groups == 9
    with pytest.raises(HelixConfigError, match="tensor-parallel sizes that work"):
        config(tensor_model_parallel_size=11)
    with pytest.raises(ValueError, match="fp16"):  # Megatron's other checks still run
        config(fp16=True, bf16=True)


def rank_groups(tp, n, m):
    from megatron.core import parallel_state

    torch.distributed.init_process_group("nccl")
    integrate.enable(HelixConfig(n, m), HelixGrid(n, m))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=2, order="tp-cp-ep-dp-pp"
    )
    from helix_megatron.exchange.groups import get_helix_groups

    groups = get_helix_groups()
    members = torch.distributed.get_process_group_ranks
    made = (members(groups.head_group), members(groups.dim_group), groups.head_rank, groups.dim_rank)
    parallel_state.destroy_model_parallel()
    with pytest.raises(RuntimeError, match="not initialised"):
        get_helix_groups()
    return made


def test_groups_lie_inside_each_tensor_parallel_group():
    """World of 12 = TP 6 (3x2) x PP 2."""
    for rank, (head, dim, i, j) in enumerate(run_ranks(rank_groups, 12, 6, 3, 2, timeout_s=120)):
        base = rank // 6 * 6
        assert (i, j) == divmod(rank % 6, 2)
        assert dim == [base + 2 * i, base + 2 * i + 1]  # neighbours
        assert head == [base + j, base + 2 + j, base + 4 + j]


def rank_wrong_grid():
    from megatron.core import parallel_state

    from helix_megatron.exchange.groups import initialize_helix_parallel

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    with pytest.raises(HelixConfigError, match="has 4 ranks, but the tensor-parallel group has 2"):
        initialize_helix_parallel(HelixGrid(2, 2), parallel_state.get_tensor_model_parallel_group())
    return True


def test_a_grid_that_does_not_fill_the_group_is_refused():
    assert run_ranks(rank_wrong_grid, 2) == [True, True]


def rank_spec():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention

    from helix_megatron.megatron.self_attention import HelixParallelSelfAttention
    from helix_megatron.megatron.specs import get_helix_layer_local_spec, with_helix_attention

    plain = get_gpt_layer_local_spec()
    helix = with_helix_attention(plain, HelixConfig())
    assert plain.submodules.self_attention.module is SelfAttention  # the argument is left alone
    attention = helix.submodules.self_attention
    assert attention.module is HelixParallelSelfAttention
    assert attention.params["attn_mask_type"] == plain.submodules.self_attention.params["attn_mask_type"]
    assert helix.submodules.mlp is plain.submodules.mlp
    assert get_helix_layer_local_spec(HelixConfig()).submodules.self_attention.module is attention.module
    mla = get_gpt_layer_local_spec(multi_latent_attention=True)
    with pytest.raises(HelixConfigError, match="MLASelfAttention"):
        with_helix_attention(mla, HelixConfig())
    return True


def test_layer_specs():
    assert run_ranks(rank_spec, 1) == [True]
