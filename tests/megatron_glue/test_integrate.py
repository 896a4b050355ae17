"""The way into Megatron: explicit, idempotent, undoable, and the groups it makes."""

from argparse import Namespace

import pytest
import torch

from helix_megatron import compat
from helix_megatron.host.launcher import run_ranks
from helix_megatron.megatron import integrate
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError, HelixGrid
from helix_megatron.partition.tensor_sizes import indivisible, refuse_indivisible

# Core 0.16 cannot build latent attention without Transformer Engine.
LATENT = not compat.version().startswith("0.16")


def touched():
    """Everything of Megatron's that integrate.py may replace."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.resharding import planner
    from megatron.core.transformer.attention import Attention
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = [
        gpt_layer_specs.SelfAttention,
        Attention.__init__,
        TransformerConfig.__post_init__,
        parallel_state.initialize_model_parallel,
        parallel_state.destroy_model_parallel,
        *([planner._determine_source_ranks_for_dst_param] if compat.megatron().resharding else []),
    ]
    if compat.megatron().dynamic_engine:
        from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
        from megatron.core.inference.model_inference_wrappers import abstract_model_inference_wrapper

        model.append(DynamicInferenceContext.__init__)
        model.append(abstract_model_inference_wrapper.AbstractModelInferenceWrapper.__init__)
    if compat.megatron().handoff:
        from megatron.core.inference.disaggregation.inference_state_handoff import InferenceStateHandoffMixin

        model.append(InferenceStateHandoffMixin.setup_kv_transfer)
    if compat.megatron().hybrid:
        from megatron.core.dist_checkpointing import gpt_checkpoint_interop
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        model.append(hybrid_stack_spec.submodules.attention_layer.submodules.self_attention.module)
        model.append(gpt_checkpoint_interop._prepend_gpt_layer_axis)
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
    with pytest.raises(HelixConfigError, match=r"16 of them rotary .* tensor-parallel sizes that work"):
        config(tensor_model_parallel_size=17)  # of a head of 16; RoPE is the layer's affair
    with pytest.raises(ValueError, match="fp16"):  # Megatron's other checks still run
        config(fp16=True, bf16=True)


OTHERS = {  # models of one process beside the one that the settings are for
    "no RoPE, odd head dimension": dict(hidden_size=12, num_attention_heads=4),
    "a head of 65": dict(hidden_size=260, num_attention_heads=4),
    "a teacher": dict(hidden_size=64, num_attention_heads=4, num_query_groups=2),
    "multi-latent attention": dict(hidden_size=64, num_attention_heads=4, multi_latent_attention=True),
    "no attention": dict(hidden_size=64, num_attention_heads=0, num_query_groups=0, kv_channels=16),
}
SETTINGS = [
    HelixConfig(),
    HelixConfig(head_parallel_size=2),
    HelixConfig(dim_parallel_size=2),
    HelixConfig(2, 2, hierarchical_allreduce=True),
    HelixConfig(1, 3, slice_weights=(2, 1, 1)),
    HelixConfig(1, 2, softmax="per-slice"),
]


@pytest.mark.parametrize("helix", SETTINGS)
@pytest.mark.parametrize("other", OTHERS)
def test_models_on_one_rank_are_megatrons(helix, other):
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from helix_megatron.partition.derived import plan_for, slices_for

    kind = MLATransformerConfig if "multi-latent" in other else TransformerConfig
    plain = kind(num_layers=1, **OTHERS[other])
    integrate.enable(helix)
    made = kind(num_layers=1, **OTHERS[other])
    functions = [name for name, value in vars(plain).items() if callable(value)]
    assert {k: v for k, v in vars(made).items() if k not in functions} == {
        k: v for k, v in vars(plain).items() if k not in functions
    }
    assert slices_for(helix, made, 1) == 1
    if made.num_attention_heads:
        assert plan_for(helix, made, 1).is_megatron


def test_what_a_tensor_parallel_size_must_divide():
    """The size that ranks hold parts of, whatever else there is."""
    dense = dict(
        tensor_model_parallel_size=4, expert_tensor_parallel_size=4, pipeline_model_parallel_size=1,
        context_parallel_size=1, world_size=8, ffn_hidden_size=96, num_experts=None, moe_ffn_hidden_size=None,
        moe_layer_freq=1, moe_shared_expert_intermediate_size=None, vocab_size=101, pad_vocab_size=True,
        seq_length=50, sequence_parallel=False, hybrid_layer_pattern=None, hidden_size=64, mamba_head_dim=8,
        mamba_num_heads=8, mamba_num_groups=4, linear_num_key_heads=4, linear_num_value_heads=8,
    )  # fmt: skip
    experts = dict(num_experts=8, moe_ffn_hidden_size=64)
    cases = [  # changes, and the number that four ranks cannot share
        (dict(), None),
        (dict(ffn_hidden_size=98), 98),
        (dict(sequence_parallel=True), 50),
        (dict(sequence_parallel=True, seq_length=48, context_parallel_size=2), None),
        (dict(sequence_parallel=True, seq_length=48, context_parallel_size=8), 6),
        (dict(pad_vocab_size=False), 101),
        (dict(experts, ffn_hidden_size=98), None),  # every layer has experts
        (dict(experts, ffn_hidden_size=98, moe_layer_freq=2), 98),
        (dict(experts, ffn_hidden_size=98, moe_layer_freq=[1, 0]), 98),
        (dict(experts, moe_ffn_hidden_size=66), 66),
        (dict(experts, moe_ffn_hidden_size=66, expert_tensor_parallel_size=1), None),
        (dict(experts, moe_shared_expert_intermediate_size=30), 30),
        (dict(ffn_hidden_size=98, hybrid_layer_pattern="M*E"), None),  # no dense layers, nor Mamba's below
        (dict(ffn_hidden_size=98, hybrid_layer_pattern="M*-"), 98),
        (dict(experts, moe_ffn_hidden_size=66, hybrid_layer_pattern="*-"), None),
        (dict(experts, moe_ffn_hidden_size=66, hybrid_layer_pattern="*-|*E"), 66),
        (dict(mamba_num_heads=6, hybrid_layer_pattern="M*"), 6),
        (dict(mamba_num_heads=None, hidden_size=24, hybrid_layer_pattern="M*"), 6),  # 2 * 24 / 8
        (dict(mamba_num_groups=2, hybrid_layer_pattern="M*"), 2),
        (dict(mamba_num_groups=2, hybrid_layer_pattern="G*"), None),
        (dict(linear_num_key_heads=2, hybrid_layer_pattern="G*"), 2),
        (dict(linear_num_key_heads=2, experimental_attention_variant="gated_delta_net"), 2),
        (dict(linear_num_key_heads=2, experimental_attention_variant="dsa"), None),
        (dict(linear_num_value_heads=6, hybrid_layer_pattern="*G"), 6),
    ]
    for changes, size in cases:
        args = Namespace(**{**dense, **changes})
        found = indivisible(args, 4)
        assert [int(what.split()[0]) for what in found] == ([] if size is None else [size]), changes
        assert not indivisible(args, 1)
    args = Namespace(**{**dense, "ffn_hidden_size": 98, "sequence_parallel": True})
    with pytest.raises(HelixConfigError, match=r"98 of .* nor 50 of .* on these ranks: 1, 2$"):
        refuse_indivisible(args, lambda tp: True)
    with pytest.raises(HelixConfigError, match=r"on these ranks: 1$"):
        refuse_indivisible(args, lambda tp: tp != 2)


class Values(torch.nn.Module):
    """A core attention that takes any size of keys: its output is the values."""

    def __init__(self, **kwargs):
        super().__init__()

    def forward(self, query, key, value, *args, **kwargs):
        return value.flatten(-2)


def rank_other_attention(helix):
    """{what: largest difference to what it computes without Helix, or the refusal} on two ranks."""
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(2)

    # Hybrid, heterogeneous and ModelOpt's specs are made of the modules that this one has while Helix is off.
    of_modules = gpt_layer_specs.get_gpt_layer_local_spec().submodules
    latent = gpt_layer_specs.get_gpt_layer_local_spec(multi_latent_attention=True).submodules
    latent.self_attention.submodules.core_attention = Values  # Megatron's local one takes one size alone
    specs = {
        "BERT": (bert_layer_local_spec.submodules, TransformerConfig, {}),
        "vision": (get_vit_layer_with_local_spec().submodules, TransformerConfig, {}),
        "multi-latent attention": (
            latent,
            MLATransformerConfig,
            dict(q_lora_rank=16, kv_lora_rank=16, rope_type="rope"),
        ),
        "hybrid": (of_modules, TransformerConfig, dict(is_hybrid_model=True)),
        "heterogeneous": (of_modules, TransformerConfig, dict(heterogeneous_block_specs=True)),
        "another kind": (of_modules, TransformerConfig, {}),
        "cross-attention": (decoder_model_with_local_spec().submodules, TransformerConfig, {}),
    }
    if not LATENT:
        del specs["multi-latent attention"]
    found = {}
    for name, (submodules, kind, settings) in specs.items():
        cross = name == "cross-attention"
        spec = submodules.cross_attention if cross else submodules.self_attention
        plain_class, plain = attention_output(spec, kind, settings, cross)
        integrate.enable(helix)
        try:
            made, out = attention_output(spec, kind, settings, cross)
            found[name] = (made == plain_class, (out - plain).abs().max().item())
        except HelixConfigError as error:
            found[name] = str(error)
        integrate.disable()
    return found


def attention_output(spec, kind, settings, cross):
    """Class of the layer that a spec makes, and what it computes; the same weights and input each time."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module

    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = kind(
        num_layers=1, hidden_size=32, num_attention_heads=4, tensor_model_parallel_size=2,
        use_cpu_initialization=True, attention_dropout=0.0, masked_softmax_fusion=False, **settings,
    )  # fmt: skip
    layer = build_module(spec, config=config, layer_number=1)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(1)
    hidden = torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(2))
    out, _ = layer(hidden, mask, hidden) if cross else layer(hidden, mask)
    return type(layer).__name__, out.detach()


def test_attention_that_is_not_gpts_is_left_alone_where_nothing_is_sliced():
    for found in run_ranks(rank_other_attention, 2, HelixConfig(), timeout_s=120):
        assert len(found) == 6 + LATENT and all(value == (True, 0.0) for value in found.values()), found


def test_attention_that_is_not_gpts_is_refused_by_what_it_is():
    for found in run_ranks(rank_other_attention, 2, HelixConfig(dim_parallel_size=2), timeout_s=120):
        assert len(found) == 6 + LATENT
        for name, refusal in found.items():
            said = "another kind" if name == "vision" and not LATENT else name  # 0.16: its mask is as others'
            assert said in refusal and "(m = 2)" in refusal and "with_helix_attention" in refusal


def rank_rope_of_slices(rotary_percent):
    """What a layer with a head of 5 dimensions says, sliced and not."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.distributed.init_process_group("nccl")
    said = []
    for groups in (2, 1):
        integrate.enable(HelixConfig(rotary_percent=rotary_percent), HelixGrid(groups, 2 // groups))
        parallel_state.initialize_model_parallel(2)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = TransformerConfig(
            num_layers=1, hidden_size=20, num_attention_heads=4, num_query_groups=groups,
            tensor_model_parallel_size=2, use_cpu_initialization=True,
        )  # fmt: skip
        try:
            spec = get_gpt_layer_local_spec().submodules.self_attention
            said.append(build_module(spec, config=config, layer_number=1).helix_plan.describe())
        except HelixConfigError as error:
            said.append(str(error))
        parallel_state.destroy_model_parallel()
        integrate.disable()
    return said


def test_what_rope_asks_of_slices_is_asked_where_a_sliced_layer_is_built():
    for whole, sliced in run_ranks(rank_rope_of_slices, 2, 1.0):
        assert "attention is Megatron's own" in whole
        assert "5 rotary dimensions of the 5 of a head" in sliced and "rotary_percent 0" in sliced
    for whole, sliced in run_ranks(rank_rope_of_slices, 2, 0.0):
        assert "attention is Megatron's own" in whole and "slices of 3, 2 of 5 dimensions" in sliced


def rank_groups(tp, n, m):
    from megatron.core import parallel_state

    torch.distributed.init_process_group("nccl")
    integrate.enable(HelixConfig(n, m), HelixGrid(n, m))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=2, order="tp-cp-ep-dp-pp"
    )
    from helix_megatron.megatron.process_groups import get_helix_groups

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

    from helix_megatron.megatron.process_groups import initialize_helix_parallel

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
    assert with_helix_attention(mla, HelixConfig(dim_parallel_size=1)) is mla
    return True


def rank_stacks_blocks_and_named_specs():
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as megatrons
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.spec_utils import import_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from helix_megatron.megatron import specs
    from helix_megatron.megatron.self_attention import HelixParallelSelfAttention

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(1)

    def attention(stack):
        return stack.submodules.attention_layer.submodules.self_attention.module

    stack = specs.with_helix_attention(megatrons, HelixConfig())
    assert attention(stack) is HelixParallelSelfAttention and attention(megatrons) is SelfAttention
    assert stack.submodules.mamba_layer is megatrons.submodules.mamba_layer

    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, transformer_impl="local", num_moe_experts=2,
        moe_layer_freq=[0, 1], add_bias_linear=False,
    )  # fmt: skip
    spec = import_module(("helix_megatron.megatron.specs", "gpt_layer_spec"))  # as Megatron takes --spec
    for given in (config, Namespace(transformer=config)):  # a provider, megatron.training's configuration
        layers = spec(given, vp_stage=None).layer_specs
        assert [layer.submodules.self_attention.module for layer in layers] == [SelfAttention] * 2
        assert layers[0].submodules.mlp != layers[1].submodules.mlp
    block = specs.with_helix_attention(spec(config), HelixConfig())
    assert [layer.submodules.self_attention.module for layer in block.layer_specs] == [
        HelixParallelSelfAttention
    ] * 2
    with pytest.raises(HelixConfigError, match="not those of --heterogeneous-layers-config-path"):
        spec(Namespace(transformer=config, heterogeneous_block_specs=True))

    integrate.enable(HelixConfig(), HelixGrid(1, 2))
    named = import_module(("helix_megatron.megatron.specs", "hybrid_stack_spec"))
    for module in (attention(named), spec(config).layer_specs[0].submodules.self_attention.module):
        assert issubclass(module, HelixParallelSelfAttention)

    class Windowed(SelfAttention):
        """What it adds would be lost."""

    other = get_gpt_layer_local_spec()
    other.submodules.self_attention.module = Windowed
    with pytest.raises(HelixConfigError, match="Windowed"):
        specs.with_helix_attention(other, HelixConfig())
    integrate.disable()
    assert attention(named) is SelfAttention
    return True


@pytest.mark.skipif(not compat.megatron().hybrid, reason="this Megatron has no HybridModel")
def test_stacks_blocks_and_named_specs():
    assert run_ranks(rank_stacks_blocks_and_named_specs, 1) == [True]


def test_layer_specs():
    assert run_ranks(rank_spec, 1) == [True]
