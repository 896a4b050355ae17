"""Which Megatron this is: the versions Helix knows, and where they differ.

What depends on the version is a column of `KNOWN`; other modules ask `megatron()` and never compare versions.

    core   Python   megatron.training   dynamic engine with sliced heads   tested
    0.16   3.10+    not in the wheel    refused                            in every test run
    0.17   3.12+    refused             refused                            by hand: 0.17.1
    0.18   3.12+    refused             refused                            by hand: 0.18.2
    0.19   3.12+    served              served                             in every test run
    0.20   3.12+    served              served                             by hand: its development tree

The training loops of 0.17 and 0.18 are configured and called each in a way of its own: Helix's flags and
entry points are refused there. By hand is `HELIX_MEGATRON="0.17 0.18" scripts/test_oldest.sh`, or, for what
is not released, `scripts/test_next.sh CHECKOUT`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helix_megatron.partition.grid import HelixConfigError


@dataclass(frozen=True)
class Megatron:
    """What is particular to one minor version of megatron-core.

    Args:
        training: megatron.training is there and called as Helix does (entry points, flags, `helix compare`).
        layer_arguments: what SelfAttention takes besides the arguments that all versions know.
        writer_queue: the function that makes the queue of checkpoint writers.
        forked_writer: the class of the background writer has a method that starts it.
        dynamic_engine: the dynamic inference context is one that Helix can re-read as sharded positions.
        resharding: the planner of megatron.core.resharding is one that Helix can tell of sliced heads.
        hybrid: HybridModel's layer specs are in megatron.core.models.hybrid.
        handoff: its engine can hand a prompt's cache over to an engine of other ranks.
        matrix_optimizer: module and name of what builds optimizers of whole matrices (Muon).
    """

    training: bool = True
    layer_arguments: tuple[str, ...] = ("pp_layer_offset", "name")
    writer_queue: str = "get_write_results_queue"
    forked_writer: bool = True
    dynamic_engine: bool = False
    resharding: bool = False
    hybrid: bool = False
    handoff: bool = False
    matrix_optimizer: tuple[str, str] = ("megatron.core.optimizer", "_get_megatron_emerging_optimizer")


_MUON = ("megatron.core.optimizer.muon", "get_megatron_muon_optimizer")
KNOWN = {
    "0.16": Megatron(
        training=False,
        layer_arguments=(),
        writer_queue="_get_write_results_queue",
        forked_writer=False,
        matrix_optimizer=_MUON,
    ),
    "0.17": Megatron(training=False, layer_arguments=("pp_layer_offset",), matrix_optimizer=_MUON),
    "0.18": Megatron(training=False),
    "0.19": Megatron(dynamic_engine=True, resharding=True, hybrid=True),
    "0.20": Megatron(dynamic_engine=True, resharding=True, hybrid=True, handoff=True),
}
NEWEST = "0.19"
_TESTED = "0.16.1, 0.17.1, 0.18.2 (layers, checkpoints), 0.19.2 (everything), 0.20's development tree"


def version() -> str:
    """The megatron-core that is installed, e.g. "0.19.2".

    Raises:
        HelixConfigError: there is none.
    """
    try:
        from megatron.core import package_info
    except ImportError as error:
        raise HelixConfigError(
            f"megatron-core is not installed; pip install 'megatron-core=={NEWEST}.*'"
        ) from error
    return str(package_info.__shortversion__)


def megatron() -> Megatron:
    """The row of the installed Megatron.

    Raises:
        HelixConfigError: naming the version found and those known.
    """
    found = version()
    row = KNOWN.get(".".join(found.split(".")[:2]))
    if row is None:
        raise HelixConfigError(
            f"megatron-core {found} is not supported by this version of Helix, which knows "
            f"{', '.join(KNOWN)} (tested: {_TESTED}); pip install 'megatron-core=={NEWEST}.*'"
        )
    return row


def has_training() -> bool:
    """Whether megatron.training is there (in the wheel or a checkout on PYTHONPATH) and Helix serves it."""
    row = KNOWN.get(".".join(version().split(".")[:2]))
    return row is not None and row.training and importlib.util.find_spec("megatron.training") is not None


def need_training() -> None:
    """Refuse a Megatron without a megatron.training that the entry points and flags can use.

    Raises:
        HelixConfigError: with what works without it.
    """
    megatron()
    if not has_training():
        there = importlib.util.find_spec("megatron.training") is not None
        what = "has another megatron.training than Helix knows" if there else "has no megatron.training"
        raise HelixConfigError(
            f"megatron-core {version()} {what}, which flags and entry points need; with Python 3.12 or "
            f"newer, pip install 'megatron-core=={NEWEST}.*'. "
            "Layers, specs and checkpoints of models that you build yourself work with this version "
            "(helix_megatron.with_helix_attention)"
        )


def cache_blocks(allocator: Any) -> int:
    """Blocks of the dynamic engine's cache, the spare one, its last, included; 0.20 renames their count."""
    return int(allocator.dummy_block_idx) + 1


def tensor_parallel_size(groups: Any, config: Any) -> int:
    """Ranks that a layer's weights are spread over.

    Args:
        groups: Megatron's ProcessGroupCollection, which has None for a group that it was not given; or None.
        config: asked where `groups` does not say.
    """
    tp = getattr(groups, "tp", None)
    return int(config.tensor_model_parallel_size if tp is None else tp.size())


def tensor_parallel_group(groups: Any) -> Any:
    """The tensor-parallel group of a ProcessGroupCollection, which answers None for one that it has not.

    Raises:
        HelixConfigError: it has none; Megatron's own layers would take themselves for alone.
    """
    tp = getattr(groups, "tp", None)
    if tp is None:
        raise HelixConfigError(
            f"{type(groups).__name__} was given without a tensor-parallel group (tp), which Helix attention "
            "divides heads over; add it, or leave pg_collection out for Megatron's own groups"
        )
    return tp


def as_class(build: Callable[..., Any]) -> type:
    """A class whose construction calls `build` and gives what that returns.

    Old Megatrons build a layer's modules from classes only (a function they take for the module itself), new
    ones call whatever the layer spec has.
    """
    return type("Built", (), {"__new__": lambda cls, *args, **kwargs: build(*args, **kwargs)})


def yarn_scale(config: Any) -> float:
    """The factor by which YaRN scales rotated queries and keys; new layers keep it as an attribute."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    return float(yarn._yarn_get_concentration_factor_from_config(config))
