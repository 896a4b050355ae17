"""The sections of `helix check`: what each proves, its function, and how long it may take.

A section is a function (rows: Rows, place: Place) in a module of this package. It writes its rows as it goes,
and what it raises is its failure. `spans`: under torchrun it runs in the ranks that torchrun has started;
every other section runs on the first machine and starts its ranks there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One of them; seconds are limits, not expectations."""

    name: str
    proves: str
    quick_s: float
    full_s: float
    spans: bool = False

    @property
    def function(self) -> str:
        """module:function."""
        return f"helix_megatron.check.{self.name}:check"

    def limit(self, quick: bool) -> float:
        return self.quick_s if quick else self.full_s


SECTIONS = (  # what a user must know first, in what takes least: a run that is cut short has most of it
    Section("exactness", "attention layers are as near to float64 as Megatron's own", 240, 1800),
    Section("kernels", "attention over a paged cache equals the formula; GB/s on a GPU", 180, 900),
    Section("graphs", "replays of CUDA graphs of steps equal eager steps", 180, 600),
    Section("layers", "what one rank of a large group computes: kernels, launches, memory", 180, 1200),
    Section("generation", "greedy tokens are those of transformers", 180, 900),
    Section("collectives", "latency and bandwidth of the grid's collectives, rates", 180, 1200, True),
    Section("training", "losses are vanilla's, also saved and loaded at other grids", 240, 1800),
)
BY_NAME = {section.name: section for section in SECTIONS}


def select_sections(names: list[str] | None) -> tuple[Section, ...]:
    """The sections of --only, in the table's order. ValueError for a name that is none."""
    unknown = [name for name in names or () if name not in BY_NAME]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: no such section; there are {', '.join(BY_NAME)}.")
    return tuple(section for section in SECTIONS if not names or section.name in names)
