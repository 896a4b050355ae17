"""The user's Helix settings, and what they mean for one attention layer.

Pure arithmetic: no torch, no Megatron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from helix_megatron.partition.grid import AttentionShape, HelixConfigError, HelixGrid, check_grid
from helix_megatron.partition.layout import HelixLayout

SOFTMAX_KINDS = ("exact", "per-slice")
COMM_TYPES = ("auto", "a2a", "all_reduce")
QUERY_PLACEMENTS = ("auto", "dims", "heads")
CORE_ATTENTIONS = ("auto", "spec")
KV_CACHES = ("auto", "sequence", "dim")
SHORT_CONTEXT = 6144
"""Up to so many tokens a cache of slices ("dim") decodes faster: one collective a layer in place of two, and
few scores to sum (benchmarks/decode.py)."""


@dataclass(frozen=True)
class HelixConfig:
    """What the user asked for; every default means "choose for me" or "as Megatron computes"."""

    head_parallel_size: int | None = None
    """n, head groups. None: from the model and the tensor-parallel size."""

    dim_parallel_size: int | None = None
    """m, slices of each head. None: likewise."""

    slice_weights: tuple[float, ...] | None = None
    """m positive numbers: sizes of the slices, for ranks of unequal speed. None: as equal as can be."""

    softmax: str = "exact"
    """"exact": ordinary attention over the whole head. "per-slice": softmax inside each slice, the
    formula of the Helix paper; a different model (H*m heads of dimension d/m)."""

    comm_type: str = "auto"
    """How slices meet in exact attention: "a2a" (gather K and V, exchange queries; the default) or
    "all_reduce" (sum partial scores; s^2 memory, for reference and very short sequences)."""

    query_placement: str = "auto"
    """"dims": query heads are sliced like keys. "heads": every rank holds whole query heads (needs
    m | H/n). "auto": heads where legal and useful."""

    core_attention: str = "auto"
    """What computes attention on whole heads. "spec": the layer spec's core. "auto": likewise, but
    PyTorch's fused scaled_dot_product_attention for Megatron's unfused local core."""

    kv_cache: str = "auto"
    """What the m ranks of a dim group cache in inference. "sequence": whole heads of 1/m of the positions.
    "dim": slices of all positions; every step sums scores over the whole context. "auto": sequence; in host
    mode dim where `context_length` is known and short."""

    context_length: int | None = None
    """Inference: tokens of the longest request, prompt and answer. None: not known, or no inference."""

    host_mode: bool = False
    """Ranks are processes of one host: "auto" follows what was measured there (SHORT_CONTEXT)."""

    kv_interleave_size: int = 32
    """Consecutive positions that one rank keeps in a "sequence" cache, before the next rank's turn."""

    overlap_chunks: int = 1
    """Parts into which the new tokens of an inference step are cut: the exchange of one part's attention runs
    while the next part attends. 1: no overlap. For the "sequence" cache."""

    overlap_exchange: bool = True
    """Training with whole query heads: K and V travel while the query is normed and rotated, their gradients
    while the query's are. The numbers are the same without."""

    recompute_exchange: bool = False
    """Selective recompute keeps slices, and exchanges them again in the backward; else it keeps the whole
    heads that attention is given."""

    hierarchical_allreduce: bool = False
    """Reduce over the tensor-parallel group level by level; for grids that span nodes (levels.py)."""

    adaptive_grad_scaling: bool = False
    """Per-slice softmax in fp16: run the backward of attention in the middle of fp16's range
    (gradient_range.py). Nothing else changes, and nothing at all with exact softmax."""

    rotary_percent: float = 1.0
    """Share of a head that RoPE rotates; 0 without RoPE. Megatron's flag of the same name."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("softmax", SOFTMAX_KINDS),
            ("comm_type", COMM_TYPES),
            ("query_placement", QUERY_PLACEMENTS),
            ("core_attention", CORE_ATTENTIONS),
            ("kv_cache", KV_CACHES),
        ):
            if getattr(self, name) not in choices:
                raise HelixConfigError(
                    f"helix {name} {getattr(self, name)!r} is unknown; choose from {', '.join(choices)}"
                )
        _check_weights(self.slice_weights)
        if self.slice_weights is not None and self.softmax == "per-slice":
            raise HelixConfigError(
                f"slice weights {_listed(self.slice_weights)} were given with per-slice softmax, whose "
                "slices are heads and hence equal; leave them out"
            )
        if self.softmax == "per-slice" and self.comm_type != "auto":
            raise HelixConfigError(
                f"comm type {self.comm_type!r} was given with per-slice softmax, which exchanges nothing; "
                "leave the comm type at 'auto'"
            )
        if self.softmax == "per-slice" and self.kv_cache != "auto":
            raise HelixConfigError(
                f"KV cache {self.kv_cache!r} was given with per-slice softmax, whose slices are cached as "
                "heads of their own; leave the KV cache at 'auto'"
            )
        if self.overlap_chunks < 1:
            raise HelixConfigError(
                f"overlap chunks {self.overlap_chunks}: the tokens of a step are cut into 1 part at least"
            )
        if self.overlap_chunks > 1 and (self.softmax == "per-slice" or self.kv_cache == "dim"):
            what = "per-slice softmax" if self.softmax == "per-slice" else "KV cache 'dim'"
            raise HelixConfigError(
                f"overlap chunks {self.overlap_chunks} was given with {what}, which has no exchange to "
                "overlap; leave it at 1"
            )
        if self.context_length is not None and self.context_length < 1:
            raise HelixConfigError(
                f"context length {self.context_length}: a request has at least 1 token; leave it out where "
                "it is not known"
            )
        if self.kv_interleave_size < 1:
            raise HelixConfigError(
                f"KV interleave size {self.kv_interleave_size}: a rank keeps at least 1 position in its turn"
            )

    def resolve(
        self,
        num_attention_heads: int,
        num_query_groups: int,
        kv_channels: int,
        tensor_model_parallel_size: int,
        rotary_interleaved: bool = False,
        output_gate: bool = False,
    ) -> HelixPlan:
        """Settle every choice for one layer.

        Raises:
            HelixConfigError: the settings do not fit the layer.
        """
        rotary_dim = int(kv_channels * self.rotary_percent)
        shape = AttentionShape(
            num_attention_heads, num_query_groups, kv_channels, rotary_dim, rotary_interleaved
        )
        per_slice = self.softmax == "per-slice"
        sizes = self.head_parallel_size, self.dim_parallel_size
        grid = check_grid(shape, tensor_model_parallel_size, *sizes, even=per_slice)
        self._check_count_of_weights(grid)
        if self.hierarchical_allreduce and 1 in (grid.head_parallel_size, grid.dim_parallel_size):
            raise HelixConfigError(
                f"--helix-hierarchical-allreduce needs two levels, but Helix grid {grid} has one; leave it "
                "out, or choose a grid with n > 1 and m > 1"
            )
        comm_type = "none" if per_slice else {"auto": "a2a"}.get(self.comm_type, self.comm_type)
        placement, kv_cache = self.query_placement, "none" if per_slice else self.kv_cache
        if kv_cache == "auto":
            # Measured on a host; on a GPU dim takes far longer (docs/results.md).
            length = self.context_length
            short = self.host_mode and length is not None and length <= SHORT_CONTEXT
            # Whole query heads would be exchanged before and after the sum; overlap needs an exchange.
            sliced = placement != "heads" and self.overlap_chunks == 1
            kv_cache = "dim" if short and sliced else "sequence"
        if placement == "auto":
            query_heads = num_attention_heads // grid.head_parallel_size
            whole_heads = query_heads % grid.dim_parallel_size == 0
            # Summed scores need sliced queries: whole heads would be exchanged before and after.
            summed = comm_type != "a2a" or kv_cache == "dim"
            # Weights are to share out all of the projections, not those of K and V alone.
            weighted = self.slice_weights is not None
            placement = "heads" if whole_heads and not summed and not weighted else "dims"
        fused = self.core_attention == "auto"
        layout = HelixLayout(shape, grid, placement, per_slice, output_gate, self.slice_weights)
        scaled = self.adaptive_grad_scaling and per_slice
        interleave, chunks = self.kv_interleave_size, self.overlap_chunks
        return HelixPlan(
            layout, comm_type, fused, kv_cache, interleave, chunks, scaled, self.overlap_exchange,
            self.recompute_exchange,
        )  # fmt: skip

    def _check_count_of_weights(self, grid: HelixGrid) -> None:
        weights, m = self.slice_weights, grid.dim_parallel_size
        if weights is None or len(weights) == m > 1:
            return
        what = "does not slice heads" if m == 1 else f"has {m} slices"
        way_out = "leave the weights out, or choose a grid with" if m == 1 else f"give {m} weights, or choose"
        raise HelixConfigError(
            f"{len(weights)} slice weights ({_listed(weights)}) were given, but Helix grid {grid} {what}; "
            f"{way_out} --helix-dim-parallel-size {len(weights) if len(weights) > 1 else 'M'}"
        )


def parse_weights(text: str) -> tuple[float, ...]:
    """The numbers of `--helix-slice-weights`, separated by commas.

    Raises:
        HelixConfigError: one is not a number.
    """
    numbers = []
    for word in text.split(","):
        try:
            numbers.append(float(word))
        except ValueError:
            raise HelixConfigError(
                f"--helix-slice-weights {text}: {word.strip()!r} is not a number; give one positive number "
                "for each slice, such as 2,1,1"
            ) from None
    _check_weights(tuple(numbers))
    return tuple(numbers)


def _check_weights(weights: tuple[float, ...] | None) -> None:
    wrong = [weight for weight in weights or () if not (weight > 0 and math.isfinite(weight))]
    if wrong or weights == ():
        raise HelixConfigError(
            f"slice weights {_listed(weights or ()) or 'of nothing'}: "
            + (f"{wrong[0]:g} is not a positive number; " if wrong else "")
            + "give one positive number for each slice, such as 2,1,1"
        )


def _listed(weights: tuple[float, ...]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)


@dataclass(frozen=True)
class HelixPlan:
    """Settled choices for one attention layer.

    Args:
        layout: shape, grid and placement.
        comm_type: "a2a", "all_reduce", or "none" (per-slice softmax).
        fused_core: replace Megatron's unfused local core by PyTorch's fused attention.
        kv_cache: "sequence", "dim", or "none" (per-slice softmax: Megatron's own).
        kv_interleave_size, overlap_chunks: as in HelixConfig.
        adaptive_grad_scaling: likewise; false with exact softmax.
        overlap_exchange, recompute_exchange: as in HelixConfig.
    """

    layout: HelixLayout
    comm_type: str
    fused_core: bool = True
    kv_cache: str = "sequence"
    kv_interleave_size: int = 32
    overlap_chunks: int = 1
    adaptive_grad_scaling: bool = False
    overlap_exchange: bool = True
    recompute_exchange: bool = False

    @property
    def grid(self) -> HelixGrid:
        return self.layout.grid

    @property
    def is_megatron(self) -> bool:
        """m = 1: nothing is sliced, the layer is Megatron's own."""
        return self.grid.dim_parallel_size == 1

    @property
    def paged_dim(self) -> int:
        """Channels of a KV head in a token's place of Megatron's paged cache, the same on every rank.

        With "sequence" a place holds 1/m of a whole head, rounded up; with "dim" the longest slice.
        """
        d, m = self.layout.shape.kv_channels, self.grid.dim_parallel_size
        return -(-d // m) if self.kv_cache == "sequence" else max(self.layout.all_slice_dims)

    def describe(self) -> str:
        """One line for the log."""
        if self.is_megatron:
            return f"grid {self.grid}: heads are not sliced, attention is Megatron's own"
        softmax = "per-slice" if self.layout.per_slice else "exact"
        sizes = ", ".join(map(str, self.layout.all_slice_dims))
        slices = f"slice of {self.layout.slice_dim}" if self.layout.is_even else f"slices of {sizes}"
        return (
            f"grid {self.grid}, {softmax} softmax, comm type {self.comm_type}, "
            f"query placement {self.layout.query_placement}, {slices} "
            f"of {self.layout.shape.kv_channels} dimensions"
            + (", adaptive gradient scaling in fp16" if self.adaptive_grad_scaling else "")
        )
