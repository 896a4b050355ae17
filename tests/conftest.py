"""Marks of tests that not every Megatron can run, and which files may share a machine with which."""

import importlib.metadata

import pytest
from training import Trainer

from helix_megatron import compat

LACKS = {
    "training": ("megatron.training", compat.has_training()),
    "dynamic_engine": ("a dynamic engine that Helix serves", compat.megatron().dynamic_engine),
}


def pytest_report_header():
    version = importlib.metadata.version("megatron-core")
    missing = [what for what, there in LACKS.values() if not there]
    return f"megatron-core {version}" + (f", without {' and '.join(missing)}" if missing else "")


def pytest_collection_modifyitems(items):
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
