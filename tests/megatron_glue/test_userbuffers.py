"""--tp-comm-overlap: shapes that Transformer Engine's userbuffers would carry in part, or not at all.

The expectations are worked out from its kernels: 16 bytes a thread, launches for some numbers of ranks.
"""

import pytest

from helix_megatron.megatron.userbuffers import refuse_userbuffers
from helix_megatron.partition.grid import HelixConfigError


def carried(hidden: int, splits: int) -> int:
    """Columns of an output [tokens, h] that arrive: whole parts, of whole groups of 8 numbers."""
    return splits * (hidden // splits // 8 * 8)


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [48, 64, 96, 100, 576, 2048, 3584])
def test_refused_exactly_where_columns_would_be_lost(hidden, splits):
    layers = {name: {"num_splits": splits} for name in ("proj_fprop", "fc2_fprop")}
    if carried(hidden, splits) == hidden:
        refuse_userbuffers(64, hidden, 4, layers)
        return
    carries = {name: {"method": "ring_exchange"} for name in layers}
    for given in (layers, [carries, layers]):  # of each precision
        with pytest.raises(HelixConfigError, match=f"--hidden-size {hidden}"):
            refuse_userbuffers(64, hidden, 4, given)


@pytest.mark.parametrize(
    ("tokens", "hidden", "tp", "layers", "says"),
    [
        (60, 64, 6, {}, "2, 4, 8, 16, 32 tensor-parallel ranks, and would send nothing among 6"),
        (66, 64, 4, {}, "66 tokens, which 4 does not divide"),
        (64, 100, 4, {}, "8 numbers at once, which do not divide --hidden-size 100"),
        (64, 48, 4, {}, "output of proj_fprop in 4 parts of --hidden-size 48"),
        (64, 96, 4, {"qkv_dgrad": {"method": "pipeline", "num_splits": 8}}, "output of qkv_dgrad in 8 parts"),
    ],
)
def test_the_message_has_the_numbers(tokens, hidden, tp, layers, says):
    with pytest.raises(HelixConfigError, match=says):
        refuse_userbuffers(tokens, hidden, tp, layers)


def test_other_methods_split_nothing():
    ring = {"proj_fprop": {"method": "ring_exchange"}, "fc2_fprop": {"method": "ring_exchange"}}
    refuse_userbuffers(64, 48, 4, {**ring, "qkv_fprop": None})
