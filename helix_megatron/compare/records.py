"""The finished runs of a comparison, one file each, and what may be put together.

    OUT/runs/<variant>.run-<k>.json    written when run k of a variant has ended, well or badly

A file is complete or absent: it is written beside its place, flushed, and renamed. After a kill -9 what has
ended is there and `--resume` goes on with the rest. Every file says on what machine, with what versions,
source and settings it was measured; files that disagree in that are refused, unless told otherwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = 2
"""Of the run files and of results.json; docs/compare.md describes it."""


def write_atomically(path: Path, text: str) -> None:
    """The whole text at `path`, or what was there before, whenever the machine stops."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def file_name(variant: str) -> str:
    """A file name for a variant: readable, and different for different names."""
    readable = re.sub(r"[^a-z0-9]+", "-", variant.lower()).strip("-")
    return f"{readable}-{hashlib.sha256(variant.encode()).hexdigest()[:6]}"


class Records:
    """The run files of one folder."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / "runs"

    def path(self, variant: str, run: int) -> Path:
        return self.folder / f"{file_name(variant)}.run-{run}.json"

    def save(self, record: dict[str, Any]) -> None:
        """Write one ended run, at once and whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(record["variant"], record["run"]), json.dumps(record | {"schema": SCHEMA}))

    def load(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(variant, run) → record of every file. ValueError for one that is damaged or of another schema."""
        found = {}
        for path in sorted(self.folder.glob("*.run-*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                key, schema = (record["variant"], record["run"]), record["schema"]
            except (ValueError, KeyError, TypeError) as error:
                damage = f"{path} is no record of a run ({error!r}); delete it to run it again."
                raise ValueError(damage) from error
            if schema != SCHEMA:
                raise ValueError(f"{path} has schema {schema}, this program reads {SCHEMA}; use --overwrite.")
            found[key] = record
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """ValueError when another process is comparing in this folder; the lock dies with its process."""
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                taken = f"another comparison is running in {self.out}; choose another --out."
                raise ValueError(taken) from error
            yield


def list_differences(records: list[dict[str, Any]], identity: dict[str, Any] | None) -> list[str]:
    """In what the records differ from each other and from `identity` (None: from each other only).

    One line for each field, such as "versions: torch is 2.14.1 in some and 2.13.0 in others".
    """
    known = [_flatten(one) for one in (*(r["identity"] for r in records), identity) if one]
    said = []
    for key in sorted({key for flat in known for key in flat}):
        values = sorted({str(flat.get(key, "absent")) for flat in known})
        if len(values) > 1:
            said.append(f"{key} is {' in some and '.join(values)} in others")
    settings: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        settings.setdefault(record["variant"], []).append(record["settings"])
    for variant, several in settings.items():
        keys = sorted({key for one in several for key in one})
        changed = [key for key in keys if any(one.get(key) != several[0].get(key) for one in several)]
        said += [f"configuration: {variant} was run with different {', '.join(changed)}"] if changed else []
    return said


def _flatten(identity: dict[str, Any]) -> dict[str, Any]:
    """Of two levels one: "versions: torch"."""
    parts = ({f"{k}: {n}": one for n, one in v.items()} if isinstance(v, dict) else {k: v}
             for k, v in identity.items())  # fmt: skip
    return {key: value for part in parts for key, value in part.items()}


def check_comparable(
    records: list[dict[str, Any]], identity: dict[str, Any] | None, settings: dict[str, Any], where: Path
) -> None:
    """ValueError, in one line, unless all records were measured alike, here (`identity`), with `settings`.

    Args:
        settings: variant name → what decides the numbers of a run of it now; others are not checked.
    """
    now = [r | {"settings": settings[r["variant"]]} for r in records if r["variant"] in settings]
    said = list_differences([*records, *now], identity)
    if said:
        shown = "; ".join(said[:4]) + (f"; and {len(said) - 4} more" if len(said) > 4 else "")
        raise ValueError(
            f"{where} holds runs that cannot be compared: {shown}. --overwrite starts anew, "
            "--allow-mixed puts them together and says so in the report."
        )
