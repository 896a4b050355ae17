"""What is shown while a comparison runs: how far it is, what runs, in which stage, and each run's end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console

from helix_megatron.compare import summary


class Progress:
    """A bar over all runs and a line for the current one; on something that is no terminal, lines alone."""

    def __init__(self, console: Console, total: int | None) -> None:
        """total: how many runs there are in all; None when this machine does not know."""
        self.console = console
        self.shown = bars.Progress(
            bars.SpinnerColumn(),
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=30),
            bars.TextColumn("{task.fields[stage]}", markup=False),
            bars.TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.whole = self.shown.add_task("comparison", total=total, stage="")
        self.total = total

    def __enter__(self) -> Progress:
        self.shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shown.stop()

    @contextmanager
    def running(self, variant: str, run: int, runs: int, folder: Path) -> Iterator[None]:
        """Follow one run's stage, which its rank 0 writes to folder/progress, while entered."""
        stop = threading.Event()
        line = self.shown.add_task(f"{variant}, run {run} of {runs}", total=None, stage="launching")

        def follow() -> None:
            while not stop.wait(0.2):
                stage = folder / "progress"
                if stage.exists():
                    self.shown.update(line, stage=stage.read_text())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.shown.remove_task(line)

    def ended(self, record: dict[str, Any]) -> None:
        """Say how a run ended, and move the bar."""
        self.shown.advance(self.whole)
        self.console.print(summary.one_line(record), highlight=False, markup=False)
