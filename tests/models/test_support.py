"""The README's table of models and sizes: computed, and Megatron's part asked of Megatron itself."""

import re
from pathlib import Path

import pytest

from helix_megatron.models import presets
from helix_megatron.models.popular import POPULAR
from helix_megatron.models.support import find_support
from tests.models.model_table import PAGE, render

README = Path(__file__).parents[2] / "README.md"
SIZES = [*range(1, 17), 20, 24, 28, 32]


def asked_of_megatron(shape, tp):
    """The message of TransformerConfig, or None where it takes the layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        TransformerConfig(
            num_layers=1,
            hidden_size=getattr(shape, "hidden_size", shape.num_attention_heads * shape.kv_channels),
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            kv_channels=shape.kv_channels,
            ffn_hidden_size=getattr(shape, "ffn_hidden_size", None),
            tensor_model_parallel_size=tp,
        )
    except ValueError as error:
        return str(error)
    return None


EVERY = [*presets.PRESETS.values(), *POPULAR.values()]


@pytest.mark.parametrize("shape", EVERY, ids=lambda shape: shape.name)
def test_what_megatron_says_is_what_its_configuration_says(shape):
    for tp in SIZES:
        found, message = find_support(shape, tp), asked_of_megatron(shape, tp)
        of_heads = re.match(r"\d+ (KV )?heads are no", found.refusal) is not None
        assert of_heads == (message is not None), (tp, found.refusal, message)
        if message is not None:  # the same number is named
            assert re.search(r"\d+", found.refusal).group() in message, (tp, found.refusal, message)


def test_copies_of_k_and_v():
    shape = presets.find("llama-3.1-8b")
    copies = {tp: find_support(shape, tp).kv_copies for tp in (4, 8, 16, 32)}
    assert copies == {4: 1, 8: 1, 16: 2, 32: 4}  # 8 KV heads
    assert find_support(shape, 7).kv_copies == 0


def test_the_page_of_models_people_ask_about():
    assert len(POPULAR) == 30
    assert PAGE.read_text(encoding="utf-8") == render(), "python -m tests.models.model_table --write"


def test_shapes_that_both_tables_know_are_the_same():
    both = set(POPULAR) & set(presets.PRESETS)
    assert {"llama-3.1-70b", "qwen3-8b", "smollm2-135m"} <= both
    for name in both:
        preset = presets.find(name)
        assert POPULAR[name].attention == preset.attention
        assert POPULAR[name].divided_sizes == preset.divided_sizes


@pytest.mark.parametrize(
    ("name", "model_type", "settings"),
    [  # models whose published shape is what transformers has by default
        ("gpt-oss-20b", "gpt_oss", {}),
        ("mixtral-8x7b", "mixtral", {}),
        ("qwen3-30b-a3b", "qwen3_moe", {"head_dim": 128}),
        ("qwen3-next-80b-a3b", "qwen3_next", {}),
        ("qwen3.5-35b-a3b", "qwen3_5_moe_text", {}),
        ("llama-4-scout", "llama4_text", {}),
        ("minimax-m2", "minimax_m2", {}),
        ("falcon-7b", "falcon", {"num_kv_heads": 1}),
    ],
)
def test_shapes_are_those_of_transformers(name, model_type, settings):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **settings)
    shape = POPULAR[name]
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_kv_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    assert (heads, groups, channels) == (
        shape.num_attention_heads,
        shape.num_query_groups,
        shape.kv_channels,
    )
    if hasattr(config, "linear_num_key_heads"):
        gdn = [size for what, size in shape.divided_sizes if "GDN" in what]
        assert gdn == [config.linear_num_key_heads, config.linear_num_value_heads]


def test_what_stops_both():
    nemotron = find_support(POPULAR["nemotron-3-nano-30b-a3b"], 16)
    assert nemotron.refusal == nemotron.helix_refusal == "the Mamba layers' 8 groups do not divide by 16"
    assert "the GDN layers' 16 key heads" in find_support(POPULAR["qwen3.5-4b"], 12).helix_refusal
    assert find_support(POPULAR["mixtral-8x7b"], 7).helix == "1x7"  # experts do not bound T


def test_the_rows_of_the_readme():
    row = r"^\| (\S+) \| (\d+) / (\d+) \| (\d+) \| ([^|]+) \| ([^|]+) \|$"
    rows = re.findall(row, README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for name, heads, groups, tp, megatron, helix in rows:
        shape = presets.find(name)
        assert (shape.num_attention_heads, shape.num_query_groups) == (int(heads), int(groups))
        found = find_support(shape, int(tp))
        assert (megatron, helix) == (found.megatron, found.helix)
