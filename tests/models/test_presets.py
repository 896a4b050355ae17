"""Model shapes: parameter counts as published and as transformers builds them; flags that Megatron takes."""

import json

import pytest

from helix_megatron.models import hf_config, presets
from helix_megatron.models import shape as shape_module
from helix_megatron.partition.grid import illegal_reason

# Published: the model cards' or the weight files' own counts.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_248_023_552,
    "phi-3-medium": 13_960_238_080,
    "smollm2-135m": 134_515_008,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3.5-397b-a17b": 396_346_350_336,  # without its vision encoder and multi-token prediction
    "mixtral-8x7b": 46_702_792_704,
}
ACTIVE = {  # as model cards count them: with both embeddings, gpt-oss without the input embedding
    "qwen3-30b-a3b": 3_353_032_704,
    "qwen3.5-397b-a17b": 17_349_040_896,
    "mixtral-8x7b": 12_879_925_248,
    "gpt-oss-20b": 3.61e9 + 201_088 * 2880,
    "gpt-oss-120b": 5.13e9 + 201_088 * 2880,
    "qwen3-235b-a22b": 22e9,
    "llama-3-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert presets.find(name).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_a_preset_has_the_published_number_of_active_parameters(name):
    rounded = isinstance(ACTIVE[name], float)
    assert presets.find(name).num_active_parameters == pytest.approx(ACTIVE[name], rel=1e-2 if rounded else 0)


def test_the_largest_megatron_gpt_has_a_trillion_parameters():
    shape = presets.find("GPT-1T")
    assert shape.num_parameters == pytest.approx(1008e9, rel=2e-3)  # "1008.0 billion" in the paper's table
    assert presets.find("paper-gpt").attention.num_attention_heads == 32


HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
}


def config_of(name: str, kind: str, **other) -> dict:
    shape = presets.find(name)
    config = {"model_type": kind, **{key: getattr(shape, field) for field, key in HF_KEYS.items()}, **other}
    if shape.num_moe_experts:
        experts = "num_experts" if "qwen" in kind else "num_local_experts"
        config |= {experts: shape.num_moe_experts, "num_experts_per_tok": shape.moe_router_topk}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: shape.num_layers]
    return config


LLAMA31_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"sliding_window": 128, "rope_scaling": {"rope_type": "yarn", "factor": 32.0},
        "layer_types": ["sliding_attention", "full_attention"] * 18}  # fmt: skip
FAMILIES = [
    ("llama-3.1-8b", "llama", {"rope_scaling": LLAMA31_ROPE}),
    ("qwen2-7b", "qwen2", {"sliding_window": 4096}),
    ("qwen3-8b", "qwen3", {"head_dim": 128}),
    ("mistral-7b", "mistral", {"sliding_window": None}),
    ("smollm2-135m", "llama", {}),
    ("qwen3-30b-a3b", "qwen3_moe", {"head_dim": 128, "moe_intermediate_size": 768}),
    ("qwen3-235b-a22b", "qwen3_moe", {"head_dim": 128, "moe_intermediate_size": 1536}),
    ("mixtral-8x7b", "mixtral", {}),
    ("gpt-oss-20b", "gpt_oss", {"head_dim": 64, **YARN}),
    ("gpt-oss-120b", "gpt_oss", {"head_dim": 64, **YARN}),
    ("qwen3.5-397b-a17b", "qwen3_5_moe_text", {
        "head_dim": 256, "partial_rotary_factor": 0.25, "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024, "full_attention_interval": 4, "linear_num_key_heads": 16,
        "linear_num_value_heads": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "other"), FAMILIES)
def test_a_config_json_gives_the_preset_and_as_many_parameters_as_transformers_builds(
    name, kind, other, tmp_path
):
    folder = tmp_path / name
    folder.mkdir()
    config = config_of(name, kind, **other)
    (folder / "config.json").write_text(json.dumps(config))
    assert hf_config.read(folder) == presets.find(name)

    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **settings)
        )
    assert presets.find(name).num_parameters == model.num_parameters()


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not known here; families: llama"),
        ({"num_local_experts": 8}, "num_local_experts is 8: experts have no shape here"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases of attention have no shape here"),
        ({"model_type": "qwen3", "linear_num_value_heads": 8}, "heads of linear attention have no shape"),
        ({"model_type": "mixtral"}, "has no num_experts_per_tok, which a mixtral"),
        ({"model_type": "qwen3_moe", **MOE, "decoder_sparse_step": 2}, "dense layers among them have no"),
        ({"model_type": "qwen3_moe", **MOE, "mlp_only_layers": [0]}, "dense layers among those with experts"),
        ({"model_type": "gpt_oss", **MOE}, "has no layer_types"),
        ({"model_type": "gpt_oss", **MOE, "layer_types": ["full_attention", "sliding_attention"] * 16},
         "not in every 1th"),
        ({"attention_bias": True}, "attention_bias is True, mlp_bias None"),
    ],
)
def test_a_config_that_is_no_plain_dense_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hf_config.read(config_of("llama-3-8b", "llama", **change))


def test_what_the_flags_do_not_say_is_noted():
    config = config_of("mistral-7b", "mistral", sliding_window=4096, rope_scaling={"type": "yarn"})
    assert hf_config.read(config).notes == (
        "RoPE scaling of type 'yarn'",
        "attention looks back 4096 positions only (--window-size)",
    )


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean llama-3\.1-70b"):
        presets.find("llama-3.1-70")


@pytest.mark.parametrize("name", presets.PRESETS)
def test_scaled_down_the_grids_stay_legal(name):
    shape = presets.find(name)
    small = shape.scaled(1 / 16, num_layers=2 * shape.layer_period)
    assert (small.num_attention_layers, small.num_attention_heads) == (
        2 * shape.layer_period // (shape.linear_attention_freq or 1), shape.num_attention_heads
    )  # fmt: skip
    assert small.num_parameters < shape.num_parameters / 16
    for tp in (2, 4, 8):
        for m in (1, 2, 4):
            grid = (tp, tp // m, m)
            if tp % m == 0 and illegal_reason(shape.attention, *grid) is None:
                assert illegal_reason(small.attention, *grid) is None, grid
        assert all(size % tp == 0 for _, size in small.divided_sizes)
        assert small.moe_ffn_hidden_size % tp == small.padded_vocab_size(tp) % tp == 0


def test_every_flag_is_megatrons_and_sets_what_it_says(monkeypatch):
    import sys

    from megatron.training.arguments import parse_args

    from helix_megatron.megatron.yaml_config import known_flags, to_argv

    known = known_flags()
    for shape in presets.PRESETS.values():
        argv = to_argv(shape.model_args(padded_vocab_size=shape.padded_vocab_size(8)), shape.name, known)
        monkeypatch.setattr(sys, "argv", ["test", *argv])
        args = parse_args()
        for field in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
                      "swiglu", "rotary_percent", "use_rope_scaling", "normalization", "qk_layernorm",
                      "add_bias_linear", "add_qkv_bias", "max_position_embeddings",
                      "position_embedding_type", "quick_geglu", "attention_output_gate", "softmax_type",
                      "moe_shared_expert_gate"):  # fmt: skip
            assert getattr(args, field) == getattr(shape, field), (shape.name, field)
        assert args.untie_embeddings_and_output_weights is not shape.tied_embeddings
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        assert groups == shape.num_query_groups
        assert args.padded_vocab_size % 8 == 0
        for field in shape_module._NUMBERS:
            assert not getattr(shape, field) or getattr(args, field) == getattr(shape, field), field
        assert (args.num_experts or 0) == shape.num_moe_experts
        assert args.window_size == ((shape.window_size, 0) if shape.window_size else None)
        assert args.layernorm_zero_centered_gamma is shape.layernorm_zero_centered_gamma
