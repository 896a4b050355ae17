"""Run an unmodified training script of a Megatron-LM checkout with Helix available to it.

    torchrun --nproc-per-node 8 -m helix_megatron.run /path/to/Megatron-LM/pretrain_gpt.py \\
        <its own flags> --attention-impl helix

The script runs as `__main__` with its folder first on sys.path, exactly as `torchrun SCRIPT` would run
it: the megatron.core of its checkout comes before the installed one, and its Makefile compiles the data
set helper. (`helix_megatron.launch` has imported the installed one by then, so there that one serves.)
`--helix-config FILE.yaml` and `--helix-host-mode` work as in helix_megatron.pretrain_gpt.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from helix_megatron.megatron import entry


def run_script(argv: list[str]) -> None:
    """Run argv[0] as `__main__` with the flags argv[1:]. ValueError when it is not a file."""
    if not argv or argv[0].startswith("-"):
        raise ValueError(
            f"the first argument is the script to run, got {argv[0] if argv else 'nothing'}; "
            "for example: -m helix_megatron.run Megatron-LM/pretrain_gpt.py --attention-impl helix."
        )
    script = Path(argv[0])
    if not script.is_file():
        raise ValueError(f"no script at {script}.")
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [str(script), *entry.prepare_argv(argv[1:])]
    runpy.run_path(str(script), run_name="__main__")


def main(argv: list[str] | None = None) -> int:
    """The entry point: 0, or 2 after a one-line refusal."""
    argv = sys.argv[1:] if argv is None else argv
    return entry.run_guarded(lambda: run_script(argv), "helix_megatron.run")


if __name__ == "__main__":
    sys.exit(main())
