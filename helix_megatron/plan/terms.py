"""A quantity as a product of named factors: computed and explained from the same place.

Term("K and V", {"2": 2, "layers": 80, "positions": 131072, ...}).value     the product
str(term)     "2 x layers 80 x positions 131,072 x ..."     what `helix plan --explain` shows
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Term:
    """One product.

    Args:
        name: what it is.
        factors: name of a factor to its number; a factor that is its own name ("2") is shown once.
    """

    name: str
    factors: Mapping[str, float]

    @property
    def value(self) -> float:
        return prod(self.factors.values())

    def times(self, factors: Mapping[str, float], name: str | None = None) -> Term:
        """With more factors, put first. A factor that is there already would be lost: ValueError."""
        twice = set(factors) & set(self.factors)
        if twice:
            raise ValueError(f"{self.name}: factor {', '.join(sorted(twice))} is given twice")
        return Term(name or self.name, {**factors, **self.factors})

    def __str__(self) -> str:
        shown = {name: f"{n:,.0f}" if n == round(n) else f"{n:,.4g}" for name, n in self.factors.items()}
        alone = [name for name, number in self.factors.items() if name == f"{number:g}"]
        return " x ".join(name if name in alone else f"{name} {shown[name]}" for name in shown)


def total(terms: Iterable[Term]) -> float:
    """Sum of the products."""
    return sum(term.value for term in terms)
