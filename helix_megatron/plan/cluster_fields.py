"""Fields of a cluster in a file: types, units, limits. Every error names file, field, value and unit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from math import isfinite
from typing import Any

from helix_megatron.megatron.yaml_config import check_keys
from helix_megatron.plan.hardware import Line, Rate, overhead_key
from helix_megatron.plan.layout import ELEMENT_BYTES, KINDS

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "recv")
_OVERHEADS = sorted(
    {
        overhead_key(*key)
        for key in product(
            KINDS, (False, True), ("a2a", "all_reduce"), ("heads", "dims"), ("sequence", "dim")
        )
    }
)

# (unit, least, most); zero is allowed where the last is true.
_NUMBERS: dict[str, tuple[str, float, float, bool]] = {
    "memory": ("bytes", 1e8, 1e15, False),
    "reserve": ("bytes", 1e6, 1e15, True),
    "fast": ("bytes/s", 1e6, 1e15, True),
    "slow": ("bytes/s", 1e6, 1e15, True),
    "flops": ("FLOP/s", 1e6, 1e18, False),
    "bandwidth": ("bytes/s", 1e3, 1e15, False),
    "launch": ("seconds", 0.0, 1.0, True),
    "latency": ("seconds", 1e-9, 100.0, False),
    "overhead": ("seconds", 0.0, 1e4, True),
}
_COUNTS = {"gpus_per_node": 1, "nodes": 1, "domain": 1, "slots": 0}
_LINE: tuple[Any, tuple[str, ...], tuple[str, ...]] = (Line, ("latency", "bandwidth"), ())
_PARTS = {"rates": (Rate, ("flops", "bandwidth"), ("launch",)), "lines": _LINE, "links": _LINE}


def read(name: str, value: Any, where: str, rates: Iterable[str]) -> Any:
    """The value of field `name` as Cluster has it.

    Args:
        where: file and field, for errors.
        rates: the kinds of operations that presets have rates of.
    Raises:
        ValueError: a wrong type, a value outside what can be, or an unknown key inside.
    """
    if name in _COUNTS:
        return count(value, where, _COUNTS[name])
    if name in _PARTS:
        return _entries(name, _mapping(value, where), where, rates)
    if name in ("layer_overhead", "step_overhead"):
        check_keys(_mapping(value, where), _OVERHEADS if name == "layer_overhead" else KINDS, where)
        return {key: number("overhead", seconds, f"{where}: {key}") for key, seconds in value.items()}
    if name == "fused":
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}; it is true (Transformer Engine's layers) or false.")
        return value
    if name == "sources":
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where} is {value!r}; a list of texts.")
        return tuple(value)
    if name == "name":
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where} is {value!r}; a text.")
        return value
    return number(name, value, where)


def number(name: str, value: Any, where: str) -> float:
    """A finite number of the field's unit, within its limits; YAML reads 5e10 as text, which is taken too."""
    unit, least, most, zero = _NUMBERS[name]
    try:
        given = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except ValueError:
        given = None
    if given is None or not isfinite(given):
        raise ValueError(f"{where} is {value!r}; a number of {unit}.")
    if least <= given <= most or (zero and given == 0):
        return given
    hint = ""
    if 0 < given < least and unit != "seconds":
        hint = f"; {given:g} G{unit[0].upper()} is {given * 1e9:.1e}"
    raise ValueError(f"{where} is {value!r} {unit}; it is between {least:g} and {most:g} {unit}{hint}.")


def count(value: Any, where: str, least: int) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where} is {value!r}; a whole number of at least {least}.")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}; it is a mapping.")
    return value


def _entries(name: str, value: Mapping[str, Any], where: str, rates: Iterable[str]) -> dict[str, Any]:
    """`rates`, `lines` or `links`: name of an entry to Rate or Line."""
    kind, needed, other = _PARTS[name]
    if name == "rates":
        check_keys(value, {*rates, *(f"{rate} {dtype}" for rate in rates for dtype in ELEMENT_BYTES)}, where)
    read_entries = {}
    for key, entry in value.items():
        here = f"{where}: {key}"
        if name == "lines":
            _check_line(str(key), here)
        if name == "links":
            _check_link(str(key), here)
        if not isinstance(entry, dict):
            raise ValueError(f"{here} is {entry!r}; it is a mapping of {', '.join((*needed, *other))}.")
        check_keys(entry, (*needed, *other), here)
        for part in needed:
            if part not in entry:
                raise ValueError(f"{here} has no {part}, a number of {_NUMBERS[part][0]}.")
        read_entries[key] = kind(
            **{part: number(part, given, f"{here}: {part}") for part, given in entry.items()}
        )
    if name == "lines" and value and not any(key.startswith("all_reduce ") for key in value):
        raise ValueError(f"{where} has no all_reduce, which stands in for what was not measured.")
    return read_entries


def _check_line(key: str, where: str) -> None:
    found = re.fullmatch(r"(\w+) x(\d+) @(\d+)", key)
    kinds = ", ".join(COLLECTIVES)
    if not found or found[1] not in COLLECTIVES:
        raise ValueError(f'{where}: a line is called "KIND xSIZE @BUSY"; kinds: {kinds}.')
    if not 2 <= int(found[2]) <= int(found[3]):
        raise ValueError(f"{where}: a group has 2 ranks or more, and at most the {found[3]} that are busy.")


def _check_link(key: str, where: str) -> None:
    found = re.fullmatch(r"(\w+) (\d+)x(\d+)( small)?", key)
    if not found or found[1] not in COLLECTIVES or int(found[2]) * int(found[3]) < 2:
        raise ValueError(
            f'{where}: a link is called "KIND DOMAINSxRANKS", ranks of each domain, two or more in all, and '
            f"for small messages the same with small behind it; kinds: {', '.join(COLLECTIVES)}."
        )
