"""Marks of tests that not every Megatron can run, the order of the files, the training fixture."""

import importlib.metadata
import os
from pathlib import Path

import pytest

from helix_megatron import compat
from tests.training import Trainer

# Children of tests import this checkout too: the package and the workers in tests.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

LACKS = {
    "training": ("megatron.training", compat.has_training()),
    "dynamic_engine": ("a dynamic engine that Helix serves", compat.megatron().dynamic_engine),
    "resharding": ("a planner of resharding that Helix knows", compat.megatron().resharding),
}


def pytest_report_header():
    version = importlib.metadata.version("megatron-core")
    missing = [what for what, there in LACKS.values() if not there]
    return f"megatron-core {version}" + (f", without {' and '.join(missing)}" if missing else "")


# Files go to the workers of `-n 2` as a whole (their fixtures are shared), in this order: what takes long
# starts first, so that the workers end together.
LONG = """slurm real_models checkpoint features faults training launch generate kv_cache compare_harness
    attention_exact""".split()


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    for item in items:
        for mark, (what, there) in LACKS.items():
            if not there and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"this megatron-core has not {what}"))


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """Runs Megatron's training loop; see training.py."""
    if not compat.has_training():
        pytest.skip("this megatron-core has not megatron.training")
    return Trainer(lambda: tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("index"))
