"""Transformer Engine chooses a kernel once for every shape, however shapes alternate."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helix_megatron.megatron import te_backends
from tests.megatron_glue.te_environment import environment


@pytest.fixture
def engine(monkeypatch):
    """Chooses as Transformer Engine does: anew when a call differs from the last one."""
    choice = {"attention_params": None, "kernel": None, "backend_selection_requires_update": False}
    chosen = []

    def attend(params):
        if choice["attention_params"] != params:
            choice.update(attention_params=params, backend_selection_requires_update=True)
        if choice["backend_selection_requires_update"]:
            chosen.append(params)
            choice.update(kernel=f"for {params}", backend_selection_requires_update=False)
        return choice["kernel"]

    monkeypatch.setitem(sys.modules, te_backends._MODULE, SimpleNamespace(_attention_backends=choice))
    monkeypatch.setattr(te_backends, "_kept", {})
    return SimpleNamespace(attend=attend, choice=choice, chosen=chosen)


def test_alternating_shapes_are_chosen_for_once(engine):
    for params in ("a", "b") * 3:
        assert te_backends.with_choice_of(params, lambda p=params: engine.attend(p)) == f"for {params}"
    assert engine.chosen == ["a", "b"]


def test_a_call_that_differs_in_more_than_shape_is_chosen_for_anew(engine):
    for params in ("deterministic", "not deterministic", "deterministic"):
        assert te_backends.with_choice_of("one shape", lambda p=params: engine.attend(p)) == f"for {params}"
    assert len(engine.chosen) == 3


def test_what_was_asked_to_be_chosen_anew_is(engine):
    te_backends.with_choice_of("a", lambda: engine.attend("a"))
    te_backends.with_choice_of("b", lambda: engine.attend("b"))
    engine.choice["backend_selection_requires_update"] = True  # as after another --attention-backend
    for params in ("a", "b"):
        te_backends.with_choice_of(params, lambda p=params: engine.attend(p))
    assert engine.chosen == ["a", "b", "a", "b"]


def test_layers_are_chosen_for_once():
    """Their ranks share query positions: two chunks, of two shapes, in every pass of each of two layers."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_glue.te_choice_worker"],
        env={**environment(), "NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = json.loads(done.stdout.splitlines()[-1])
    assert ranks == [{"found": True, "chosen": [4, 0, 0]}] * 2


def test_nothing_is_found_without_transformer_engine():
    assert te_backends.last_choice() is None or "transformer_engine" in sys.modules
