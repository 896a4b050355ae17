"""Which arguments change what weights compute: all of Megatron's are sorted, those that do are compared."""

import dataclasses
import inspect
import re
from argparse import ArgumentParser, Namespace

import pytest

from helix_megatron import compat
from helix_megatron.checkpoint import compatibility, model_arguments
from helix_megatron.checkpoint.model_arguments import FLAGS, FUNCTION, flag_of
from helix_megatron.partition.grid import HelixConfigError
from tests.checkpoint.other_arguments import GONE_IN, NEW_IN, OTHER

CHANGES = {name: default for group in FUNCTION for name, default in group.arguments.items()}
KEEPS = [name for names in OTHER.values() for name in names.split()]


def of_other_versions():
    """Arguments that are sorted and that the installed Megatron has not yet, or no longer."""
    here = [int(part) for part in compat.version().split(".")[:2]]
    there = lambda version: [int(part) for part in version.split(".")] <= here  # noqa: E731
    listed = [names for version, names in NEW_IN.items() if not there(version)]
    listed += [names for version, names in GONE_IN.items() if there(version)]
    return {name for names in listed for name in names.split()}


# ---- the lists against the installed Megatron ----
@pytest.fixture(scope="module")
def parser():
    from megatron.training import arguments

    return arguments.add_megatron_arguments(ArgumentParser(allow_abbrev=False))


@pytest.fixture(scope="module")
def names(parser):
    """Every argument of Megatron, and every field that its arguments may set in a configuration."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    return {action.dest for action in parser._actions} | fields


def test_no_argument_is_sorted_twice():
    listed = [*CHANGES, *KEEPS]
    assert len(listed) == sum(len(group.arguments) for group in FUNCTION) + len(KEEPS)
    assert sorted({name for name in listed if listed.count(name) > 1}) == []


@pytest.mark.training
def test_every_argument_of_megatron_is_sorted_and_none_is_invented(names):
    assert sorted(names - CHANGES.keys() - set(KEEPS)) == [], "sort them in, here or into model_arguments.py"
    others = of_other_versions()
    assert sorted((CHANGES.keys() | set(KEEPS)) - names - others) == [], "Megatron has no such arguments"
    assert sorted(others & names) == [], "Megatron has these"
    assert set(FLAGS) <= CHANGES.keys() and set(compatibility._MEANING) <= CHANGES.keys()


@pytest.mark.training
def test_defaults_and_flags_are_megatrons(parser):
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    defaults = {action.dest: action.default for action in parser._actions}
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    fields = {field.name: field.default for field in dataclasses.fields(MLATransformerConfig)}
    for name, default in CHANGES.items():
        flag = flag_of(name)
        if name in of_other_versions():
            continue
        if name not in defaults:
            assert flag is None, name
            if name != "activation_func":  # None here: what the flags make of it
                assert default == fields[name], name
        else:
            assert flags[flag].dest == name
            if defaults[name] is not None and name != "num_query_groups":  # 1 means "as many as heads"
                assert default == defaults[name], name
            if isinstance(default, bool):  # the flag alone says the other value
                assert flags[flag].const is not default
    meant = inspect.signature(yarn.YarnRotaryEmbedding.__init__).parameters
    numbers = ["original_max_position_embeddings", "beta_fast", "beta_slow", "correction_range_round_to_int"]
    assert all(CHANGES[f"yarn_{name}"] == meant[name].default for name in numbers)


@pytest.mark.training
def test_what_megatron_restores_and_the_flags_that_a_conversion_prints_are_all_of_a_model():
    from megatron.training import checkpointing
    from transformers import Qwen3Config

    from helix_megatron.convert import families

    source = inspect.getsource(checkpointing.load_args_from_checkpoint)
    restored = set(re.findall(r"_set_arg\('(\w+)'", source))
    assert "rotary_base" in restored and "layernorm_epsilon" not in restored
    args = families.to_megatron(Qwen3Config(hidden_size=64, rms_norm_eps=1e-6))
    args.use_rope_scaling = True
    unlike = compatibility.non_default_arguments(args)
    printed = {name for name, flag in families._FLAGS.items() if flag in families._NOT_RESTORED}
    assert set(unlike) - restored == printed


# ---- comparing ----
def arguments(**changed):
    """Of a dense model of four layers, as Megatron's parser and validation leave them."""
    basic = {name: default for name, default in CHANGES.items() if flag_of(name) is not None}
    shape = dict(
        num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=8, num_query_groups=2,
        kv_channels=8, group_query_attention=True, max_position_embeddings=64, vocab_size=250,
        padded_vocab_size=256, make_vocab_size_divisible_by=128, tensor_model_parallel_size=1,
        position_embedding_type="rope", rotary_seq_len_interpolation_factor=None, finetune=False, rank=0,
        yarn_original_max_position_embeddings=None, yarn_beta_fast=None, yarn_beta_slow=None,
        yarn_correction_range_round_to_int=None, moe_router_topk_scaling_factor=None,
        swiglu=True, add_bias_linear=False, rope_type=None,
    )  # fmt: skip
    return Namespace(**basic | shape | changed)


YARN = dict(position_embedding_type="yarn", rotary_scaling_factor=4.0)
LEARNED = dict(position_embedding_type="learned_absolute")
MLA = dict(multi_latent_attention=True, group_query_attention=False)
EXPERTS = dict(num_experts=4)
MUP = dict(use_mup=True, mup_base_hidden_size=32)
DSA = MLA | dict(experimental_attention_variant="dsa")
CLAMPED = dict(activation_func_clamp_value=7.0)
SHARED = EXPERTS | CLAMPED | dict(moe_shared_expert_intermediate_size=64)
LINEAR = dict(experimental_attention_variant="gated_delta_net", linear_attention_freq=2)
MAMBA = dict(hybrid_layer_pattern="M*M*")
PRODUCT = MAMBA | dict(spec=["a.module", "gdp_stack_spec"])
STREAMS = dict(enable_mhc_connections=True)
# Something that turns every argument on.
CONTEXTS = [
    {}, LEARNED, dict(position_embedding_type="relative"), dict(position_embedding_type="mrope"),
    dict(use_rope_scaling=True), YARN, dict(window_size=(8, 0)), CLAMPED,
    dict(mtp_num_layers=1), MUP, EXPERTS, SHARED, MLA, DSA, LINEAR, MAMBA, PRODUCT, STREAMS,
]  # fmt: skip
CONTEXT_OF = dict(
    hybrid_layer_pattern=MAMBA,
    heterogeneous_layers_config_encoded_json=dict(heterogeneous_layers_config_path="a.json"),
)
# Where "not", "one more" and "another word" are no other value.
OTHER_VALUES = dict(
    window_size=(8, 0), mrope_section=[1, 2, 1], hybrid_layer_pattern="MM**", spec=["a.module", "spec"],
    heterogeneous_layers_config_encoded_json='{"a": 1}', activation_func=abs, padded_vocab_size=128,
    no_rope_freq=2, moe_layer_freq=2, window_attn_skip_freq=2, linear_attention_freq=4,
    moe_router_load_balancing_type="sinkhorn",
)  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_any_other_value_is_refused_by_its_flag_in_both_directions(name):
    turned_on = (both for both in CONTEXTS if name in compatibility.effective_arguments(arguments(**both)))
    both = CONTEXT_OF.get(name) or next(turned_on)
    one = arguments(**both)
    value = getattr(one, name, None)
    if name in OTHER_VALUES:
        value = OTHER_VALUES[name]
    elif isinstance(value, bool) or name in ("gated_linear_unit", "heterogeneous_block_specs"):
        value = not value
    else:
        value = f"not {value}" if isinstance(value, str) else (value or 0) + 3
    other = arguments(**both | {name: value})
    said = "the vocabulary" if name == "padded_vocab_size" else flag_of(name) or name
    compatibility.refuse_other_function(one, one)
    with pytest.raises(HelixConfigError, match=re.escape(said)):
        compatibility.refuse_other_function(one, other)
    if name != "padded_vocab_size":  # more rows than tokens are padding
        with pytest.raises(HelixConfigError, match=re.escape(said)):
            compatibility.refuse_other_function(other, one)


# What both have, what the run has besides, and the words of the refusal.
SAID = [
    ({}, dict(layernorm_epsilon=1e-6), "--norm-epsilon is 1e-06 here and was 1e-05 in training"),
    ({}, dict(no_rope_freq=2), "--no-rope-freq is [0, 1, 0, 1] here and was not given in training"),
    ({}, dict(window_size=(8, 0)), "--window-size is [8, 0] here and was not given in training"),
    ({}, dict(swiglu=False), "--swiglu is not given here and was given in training"),
    ({}, dict(add_bias_linear=True), "--disable-bias-linear is not given here and was given in training"),
    ({}, dict(softmax_scale=0.5), "softmax_scale (which no flag sets) is 0.5 here and was not given"),
    (YARN, dict(rotary_scaling_factor=1.0), "--rotary-scaling-factor is 1.0 here and was 4.0 in training"),
    (YARN, dict(yarn_correction_range_round_to_int=False), "--no-yarn-correction-range-round-to-int is"),
    (MLA, dict(rope_type="rope"), "--rope-type is rope here and was yarn in training"),
    (MAMBA, dict(hybrid_layer_pattern="MM**"), "--hybrid-layer-pattern is MM** here and was M*M*"),
    ({}, dict(padded_vocab_size=128), "the vocabulary has 128 rows here"),
    (dict(vocab_size=None), dict(padded_vocab_size=128), "and at least 129 in training"),
]  # fmt: skip


@pytest.mark.parametrize(("both", "here", "words"), SAID, ids=[words for _, _, words in SAID])
def test_the_refusal_says_what_the_run_has_and_what_the_training_had(both, here, words):
    with pytest.raises(HelixConfigError, match=re.escape(words)):
        compatibility.refuse_other_function(arguments(**both), arguments(**both | here))


# Both have the first; the second is what a resumed run may have besides.
SAME = [
    ({}, dict(hidden_dropout=0.5, attention_dropout=0.5)),
    ({}, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2)),
    ({}, dict(micro_batch_size=8, global_batch_size=64, seq_length=16, lr=1.0, seed=2, optimizer="sgd")),
    ({}, dict(recompute_granularity="full", attention_backend="flash", transformer_impl="local")),
    ({}, dict(bf16=True, fp8="hybrid", attention_softmax_in_fp32=True, apply_query_key_layer_scaling=True)),
    ({}, dict(bias_swiglu_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False)),
    ({}, dict(load="elsewhere", tokenizer_model="elsewhere", data_path=["x"], eval_iters=3)),
    ({}, dict(max_position_embeddings=4096)),  # RoPE has no table
    ({}, dict(padded_vocab_size=512, make_vocab_size_divisible_by=256)),  # more padding
    (dict(vocab_size=None), dict(padded_vocab_size=200)),  # 129 to 256 tokens, for all one can know
    ({}, dict(rotary_seq_len_interpolation_factor=1)),
    ({}, dict(rope_scaling_factor=32.0, rotary_scaling_factor=4.0, yarn_beta_fast=1.0)),  # read by nothing
    ({}, dict(moe_router_topk=8, mup_base_hidden_size=16, mamba_state_dim=1, window_attn_skip_freq=2)),
    ({}, dict(spec=["local"])),
    ({}, dict(spec=["helix_megatron.megatron.specs", "gpt_layer_spec"])),
    (MAMBA, dict(spec=["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"])),
    ({}, dict(num_experts=0, mtp_num_layers=0)),
    (dict(window_size=(8, 0)), dict(window_size=[8, 0])),
    (dict(no_rope_freq=2), dict(no_rope_freq=[0, 1, 0, 1])),
    (EXPERTS | dict(moe_layer_freq=2), dict(moe_layer_freq=[1, 0, 1, 0])),
    (EXPERTS, dict(moe_router_load_balancing_type=["seq_aux_loss", "aux_loss"], moe_aux_loss_coeff=[1, 1])),
    (EXPERTS, dict(moe_router_topk_scaling_factor=1.0, moe_expert_capacity_factor=1.0)),
    ({}, dict(use_te_activation_func=True, use_transformer_engine_op_fuser=True)),
    (EXPERTS, dict(moe_shared_expert_overlap=True)),
    (LINEAR, dict(linear_attention_freq=[1, 0, 1, 0])),
    (LINEAR, dict(experimental_attention_variant="gdn")),
    ({}, dict(gdp_num_householder=1, mhc_num_residual_streams=2)),  # read by nothing
    (YARN, dict(yarn_original_max_position_embeddings=4096, yarn_beta_fast=32, yarn_beta_slow=1)),
    (MAMBA, dict(hybrid_layer_pattern="M*|M*")),
    (
        dict(hybrid_layer_pattern="M*M*/MM/MM", mtp_num_layers=2),  # as older Megatrons wrote it
        dict(hybrid_layer_pattern=None, hybrid_override_pattern="M*M*", mtp_hybrid_override_pattern="MM"),
    ),
    (MUP | dict(mup_base_hidden_size=64), dict(mup_base_hidden_size=None)),
    (dict(group_query_attention=False), dict(num_query_groups=8, group_query_attention=True)),
    (dict(add_bias_linear=True), dict(add_qkv_bias=True)),  # as older Megatrons left it
    (dict(heterogeneous_layers_config_encoded_json=None), dict(heterogeneous_layers_config_path=None)),
]


@pytest.mark.parametrize(("both", "here"), SAME, ids=[", ".join(here) for _, here in SAME])
def test_the_same_function_is_loaded_whatever_else_changes(both, here):
    compatibility.refuse_other_function(arguments(**both), arguments(**both | here))
    if "padded_vocab_size" not in here:
        compatibility.refuse_other_function(arguments(**both | here), arguments(**both))


def test_finetuning_is_told_and_goes_on(capsys):
    compatibility.refuse_other_function(arguments(), arguments(rotary_base=500, finetune=True))
    assert "--finetune of another model than was saved: --rotary-base is 500" in capsys.readouterr().out
    compatibility.refuse_other_function(arguments(), arguments(rotary_base=500, finetune=True, rank=1))
    assert capsys.readouterr().out == ""


def without(args, *names):
    return Namespace(**{name: value for name, value in vars(args).items() if name not in names})


def test_an_older_megatron_had_what_it_does_not_mention_turned_off():
    older = without(arguments(), "attention_output_gate", "no_rope_freq", "softmax_type", "kv_channels")
    compatibility.refuse_other_function(older, arguments())
    with pytest.raises(HelixConfigError, match="--no-rope-freq"):
        compatibility.refuse_other_function(older, arguments(no_rope_freq=2))
    former = Namespace(**vars(without(arguments(), "layernorm_epsilon")), norm_epsilon=1e-6)
    with pytest.raises(HelixConfigError, match="--norm-epsilon is 1e-05 here and was 1e-06"):
        compatibility.refuse_other_function(former, arguments())
    one_p = Namespace(**vars(without(arguments(), "layernorm_zero_centered_gamma")), apply_layernorm_1p=True)
    with pytest.raises(HelixConfigError, match="--apply-layernorm-1p is not given here and was given"):
        compatibility.refuse_other_function(one_p, arguments())
    biased = Namespace(**vars(without(arguments(), "add_bias_linear")), disable_bias_linear=False)
    with pytest.raises(HelixConfigError, match="--disable-bias-linear is given here"):
        compatibility.refuse_other_function(biased, arguments())


def test_what_an_incomplete_checkpoint_leaves_out_is_said(capsys):
    partial = without(arguments(), "normalization", "qk_layernorm")
    compatibility.refuse_other_function(partial, arguments(normalization="RMSNorm", qk_layernorm=True))
    said = capsys.readouterr().out
    assert "does not say whether it was trained with --normalization, --qk-layernorm" in said
    with pytest.raises(HelixConfigError, match="--rotary-base"):
        compatibility.refuse_other_function(partial, arguments(rotary_base=500))


def test_a_gpt_that_a_hybrid_model_takes_in_is_megatrons_to_pair():
    hybrid = arguments(hybrid_layer_pattern="*-*-*-*-", num_layers=8, spec=["hybrid", "spec"])
    compatibility.refuse_other_function(arguments(), hybrid)
    with pytest.raises(HelixConfigError, match="--hybrid-layer-pattern"):
        compatibility.refuse_other_function(hybrid, arguments())


# ---- restoring ----
@pytest.mark.training
@pytest.mark.parametrize(
    "changed",
    [
        YARN | dict(yarn_correction_range_round_to_int=False, yarn_beta_fast=8.0, mscale=0.5),
        dict(no_rope_freq=2, layernorm_epsilon=1e-6, normalization="RMSNorm", rotary_base=500),
        dict(no_rope_freq=[0, 0, 1, 0], rotary_seq_len_interpolation_factor=2, window_size=(-1, 0)),
        dict(swiglu=False, quick_geglu=True, add_bias_linear=True, layernorm_zero_centered_gamma=True),
        EXPERTS | dict(moe_layer_freq=[0, 1, 1, 1], moe_router_topk=1),
        dict(spec=["a.module", "a_function"]),
    ],
)
def test_flags_give_every_meaning_back(parser, changed):
    """Through Megatron's own parser, which has everything else at its defaults."""
    saved = arguments(**changed)
    words = compatibility.format_flags(compatibility.non_default_arguments(saved))
    sizes = "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8 --kv-channels 8"
    sizes += " --group-query-attention --num-query-groups 2 --max-position-embeddings 64"
    parsed = parser.parse_args([*sizes.split(), *words])
    assert compatibility.differences(saved, parsed) == ({}, {})
    unlike = compatibility.non_default_arguments(saved)
    for name in unlike:  # none of them is for nothing
        fewer = {other: value for other, value in unlike.items() if other != name}
        forgotten = parser.parse_args([*sizes.split(), *compatibility.format_flags(fewer)])
        assert name in compatibility.differences(saved, forgotten)[0]


def test_what_no_flag_sets_is_not_restored():
    with pytest.raises(ValueError, match=r"no flag of Megatron sets softmax_scale, which is 0\.5"):
        compatibility.format_flags(compatibility.non_default_arguments(arguments(softmax_scale=0.5)))


def test_nothing_is_unlike_megatrons_defaults_in_a_model_of_defaults():
    plain = arguments(position_embedding_type="learned_absolute", swiglu=False, add_bias_linear=True)
    assert compatibility.non_default_arguments(plain) == {}
    assert model_arguments.flag_of("rotary_base") == "--rotary-base"
