"""Model shapes: parameter counts as published and as transformers builds them; flags that Megatron takes."""

import json

import pytest

from helix_megatron.models import presets
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
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert presets.find(name).num_parameters == PUBLISHED[name]


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


def hf_config(name: str, kind: str, **other) -> dict:
    shape = presets.find(name)
    return {"model_type": kind, **{key: getattr(shape, field) for field, key in HF_KEYS.items()}, **other}


LLAMA31_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip
FAMILIES = [
    ("llama-3.1-8b", "llama", {"rope_scaling": LLAMA31_ROPE}),
    ("qwen2-7b", "qwen2", {"sliding_window": 4096}),
    ("qwen3-8b", "qwen3", {"head_dim": 128}),
    ("mistral-7b", "mistral", {"sliding_window": None}),
    ("smollm2-135m", "llama", {}),
]


@pytest.mark.parametrize(("name", "kind", "other"), FAMILIES)
def test_a_config_json_gives_the_preset_and_as_many_parameters_as_transformers_builds(
    name, kind, other, tmp_path
):
    folder = tmp_path / name
    folder.mkdir()
    config = hf_config(name, kind, **other)
    (folder / "config.json").write_text(json.dumps(config))
    assert presets.from_hf_config(folder) == presets.find(name)

    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **settings)
        )
    assert presets.find(name).num_parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not known here; families: llama"),
        ({"num_local_experts": 8}, "num_local_experts is 8: experts have no shape here"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"attention_bias": True}, "attention_bias is True, mlp_bias None"),
    ],
)
def test_a_config_that_is_no_plain_dense_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        presets.from_hf_config(hf_config("llama-3-8b", "llama", **change))


def test_what_the_flags_do_not_say_is_noted():
    config = hf_config("mistral-7b", "mistral", sliding_window=4096, rope_scaling={"type": "yarn"})
    assert presets.from_hf_config(config).notes == (
        "RoPE scaling of type 'yarn'",
        "attention looks back 4096 positions only (--window-size)",
    )


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean llama-3\.1-70b"):
        presets.find("llama-3.1-70")


@pytest.mark.parametrize("name", presets.PRESETS)
def test_scaled_down_the_grids_stay_legal(name):
    shape = presets.find(name)
    small = shape.scaled(1 / 16, num_layers=2)
    assert (small.num_layers, small.num_attention_heads) == (2, shape.num_attention_heads)
    assert small.num_parameters < shape.num_parameters / 16
    for tp in (2, 4, 8):
        for m in (1, 2, 4):
            grid = (tp, tp // m, m)
            if tp % m == 0 and illegal_reason(shape.attention, *grid) is None:
                assert illegal_reason(small.attention, *grid) is None, grid
        assert small.ffn_hidden_size % tp == small.padded_vocab_size(tp) % tp == 0


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
                      "position_embedding_type"):  # fmt: skip
            assert getattr(args, field) == getattr(shape, field), (shape.name, field)
        assert args.untie_embeddings_and_output_weights is not shape.tied_embeddings
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        assert groups == shape.num_query_groups
        assert args.padded_vocab_size % 8 == 0
