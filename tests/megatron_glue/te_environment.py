"""The environment of tests that need Transformer Engine's Python code or Megatron-Bridge."""

import os
import sys
from pathlib import Path

import pytest

STANDIN = Path(__file__).parent / "te_standin"
ROOT = Path(__file__).parents[2]
FOLDER = Path(f"{sys.prefix}-te")  # scripts/env.sh fills it


def available() -> bool:
    """Whether Transformer Engine's Python code is here."""
    return (FOLDER / "transformer_engine").exists()


def environment() -> dict[str, str]:
    """os.environ with the stand-in, and behind it the wheels, on PYTHONPATH; skips the test without them."""
    if not available():
        pytest.skip(f"no Transformer Engine in {FOLDER}: scripts/env.sh installs te_requirements.txt there")
    path = [STANDIN, FOLDER, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
