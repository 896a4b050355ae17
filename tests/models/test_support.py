"""The README's table of models and sizes: computed, and Megatron's part asked of Megatron itself."""

import re
from pathlib import Path

import pytest

from helix_megatron.models import presets
from helix_megatron.models.support import find_support

README = Path(__file__).parents[2] / "README.md"
SIZES = [*range(1, 17), 20, 24, 28, 32]


def asked_of_megatron(shape, tp):
    """The message of TransformerConfig, or None where it takes the layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    try:
        TransformerConfig(
            num_layers=1,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            kv_channels=shape.kv_channels,
            ffn_hidden_size=shape.ffn_hidden_size,
            tensor_model_parallel_size=tp,
        )
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", presets.PRESETS)
def test_what_megatron_says_is_what_its_configuration_says(name):
    shape = presets.find(name)
    for tp in SIZES:
        found, message = find_support(shape, tp), asked_of_megatron(shape, tp)
        of_heads = bool(found.refusal) and "MLP" not in found.refusal
        assert of_heads == (message is not None), (tp, found.refusal, message)
        if message is not None:  # the same number is named
            assert re.search(r"\d+", found.refusal).group() in message, (tp, found.refusal, message)


def test_copies_of_k_and_v():
    shape = presets.find("llama-3.1-8b")
    copies = {tp: find_support(shape, tp).kv_copies for tp in (4, 8, 16, 32)}
    assert copies == {4: 1, 8: 1, 16: 2, 32: 4}  # 8 KV heads
    assert find_support(shape, 7).kv_copies == 0


def test_the_rows_of_the_readme():
    row = r"^\| (\S+) \| (\d+) / (\d+) \| (\d+) \| ([^|]+) \| ([^|]+) \|$"
    rows = re.findall(row, README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for name, heads, groups, tp, megatron, helix in rows:
        shape = presets.find(name)
        assert (shape.num_attention_heads, shape.num_query_groups) == (int(heads), int(groups))
        found = find_support(shape, int(tp))
        assert (megatron, helix) == (found.megatron, found.helix)
