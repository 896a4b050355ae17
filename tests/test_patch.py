"""The patch for a Megatron-LM checkout: it fits, comes off again, is refused elsewhere, does nothing unasked.

The megatron-core wheel carries the checkout's megatron/training byte for byte, so a copy of that serves.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helix_megatron import compat

ROOT = Path(__file__).parents[1]
PATCHED = "megatron/training/arguments.py"


@pytest.fixture
def tree(tmp_path):
    """A folder laid out like a checkout, with what the patch and its script look at."""
    wheel = Path(importlib.util.find_spec("megatron.core").origin).parents[2]
    shutil.copytree(
        wheel / "megatron/training", tmp_path / "megatron/training", ignore=shutil.ignore_patterns("*.pyc")
    )
    (tmp_path / "megatron/core").mkdir()
    shutil.copy(wheel / "megatron/core/package_info.py", tmp_path / "megatron/core")
    return tmp_path


def patch(action, tree):
    script = ROOT / "scripts/patch_megatron.sh"
    return subprocess.run([script, action, tree], capture_output=True, text=True)


def test_applies_once_and_comes_off(tree):
    before = (tree / PATCHED).read_bytes()
    assert patch("check", tree).returncode == 1
    assert patch("apply", tree).returncode == 0
    after = (tree / PATCHED).read_bytes()
    assert after != before
    again = patch("apply", tree)
    assert f"Megatron-LM {compat.version()}" in again.stdout and not again.stderr
    assert again.returncode == 0 and "already applied" in again.stdout
    assert (tree / PATCHED).read_bytes() == after
    assert patch("check", tree).returncode == 0
    assert patch("revert", tree).returncode == 0
    assert (tree / PATCHED).read_bytes() == before
    assert patch("revert", tree).returncode == 0


def test_a_patch_release_that_it_was_not_tried_on_is_named(tree):
    (tree / "megatron/core/package_info.py").write_text("MAJOR = 0\nMINOR = 19\nPATCH = 9\n")
    applied = patch("apply", tree)
    assert applied.returncode == 0 and "0.19.9 is not one of those that it was tried on" in applied.stderr


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_a_tree_that_cannot_be_written_is_an_error(tree, tmp_path_factory, monkeypatch, action):
    """As on a full disk: the patch fits, and git fails when it writes."""
    if action == "revert":
        assert patch("apply", tree).returncode == 0
    before = (tree / PATCHED).read_bytes()
    folder = tmp_path_factory.mktemp("bin")
    git = folder / "git"
    git.write_text(f'#!/bin/sh\ncase "$*" in *--check*) exec {shutil.which("git")} "$@" ;; esac\nexit 1\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    failed = patch(action, tree)
    assert failed.returncode == 2 and f"could not write to {tree}" in failed.stderr
    assert (tree / PATCHED).read_bytes() == before


def test_a_checkout_inside_another_repository(tree):
    subprocess.run(["git", "init", "-q", tree], check=True)
    inner = tree / "third_party/megatron-lm"
    inner.mkdir(parents=True)
    shutil.move(tree / "megatron", inner)
    assert patch("apply", inner).returncode == 0
    assert b"helix_megatron" in (inner / PATCHED).read_bytes()


@pytest.mark.parametrize("minor, patch_level", [(18, 2), (20, 0)])
def test_another_version_is_refused(tree, minor, patch_level):
    (tree / "megatron/core/package_info.py").write_text(
        f"MAJOR = 0\nMINOR = {minor}\nPATCH = {patch_level}\n"
    )
    before = (tree / PATCHED).read_bytes()
    refused = patch("apply", tree)
    assert refused.returncode == 2
    assert f"Megatron-LM 0.{minor}.{patch_level}" in refused.stderr and "core_v0.19.0" in refused.stderr
    assert (tree / PATCHED).read_bytes() == before


def test_edited_lines_are_refused(tree):
    text = (tree / PATCHED).read_text()
    (tree / PATCHED).write_text(text.replace("def parse_and_validate_args(", "def parse_then_validate_args("))
    refused = patch("apply", tree)
    assert refused.returncode == 2 and "checkout core_v0.19.0" in refused.stderr


def test_what_is_not_a_checkout_is_refused(tmp_path):
    assert "package_info.py" in patch("apply", tmp_path).stderr
    assert "no folder" in patch("apply", tmp_path / "absent").stderr
    assert "no action" in patch("remove", tmp_path).stderr


# Megatron is imported once and every case is a fork of that; it stops once its flags are parsed.
PARSE = """
import json, os, sys
sys.path.insert(0, {tree!r})
from megatron.training import arguments
assert arguments.__file__.startswith({tree!r}), arguments.__file__

def stop(args, *rest):
    seen = [getattr(args, name, None) for name in ("attention_impl", "helix_dim_parallel_size")]
    print(json.dumps([*seen, "helix_megatron.megatron.integrate" in sys.modules]), flush=True)
    os._exit(0)

arguments.set_global_variables = stop
arguments.validate_args = stop
for importable, flags in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    if not importable:
        sys.modules["helix_megatron"] = None
    sys.argv = ["pretrain_gpt.py", *flags]
    try:
        arguments.parse_and_validate_args()
    except BaseException as error:
        print(json.dumps(str(error)), flush=True)
        os._exit(1)
"""


def test_flags_through_the_patched_tree(tree):
    assert patch("apply", tree).returncode == 0
    cases = {  # (helix_megatron importable, flags): [attention_impl, dim_parallel_size, helix imported]
        (True, ("--attention-impl", "helix", "--helix-dim-parallel-size", "2")): ["helix", 2, True],
        (True, ("--attention-impl=megatron",)): ["megatron", None, True],
        (True, ()): [None, None, False],
        (False, ()): [None, None, False],
        (False, ("--attention-impl", "helix")): "import of helix_megatron halted; None in sys.modules",
    }
    command = [sys.executable, "-c", PARSE.format(tree=str(tree)), json.dumps(list(cases))]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line[:1] in '["']
    assert found == list(cases.values())
