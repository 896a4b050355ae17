"""The Transformer Engine layer spec with Helix, without a GPU: its own Python code on stood-in kernels."""

import json
import subprocess
import sys

import pytest
from te_environment import environment

HELIX = "--attention-impl helix --tensor-model-parallel-size"
COMMON = "--train-iters 8 --qk-layernorm"
OTHER = (  # a model of whole query heads on every rank, with LayerNorm and biases
    "--train-iters 8 --num-attention-heads 8 --num-query-groups 2 --hidden-size 64 --ffn-hidden-size 128 "
    "--normalization LayerNorm --add-qkv-bias"
)
CASES = {
    "local": (1, f"{COMMON} --transformer-impl local"),
    "vanilla": (1, COMMON),
    "1x2": (2, f"{COMMON} {HELIX} 2"),
    "1x4 sequence parallel": (4, f"{COMMON} {HELIX} 4 --sequence-parallel"),
    "1x8": (8, f"{COMMON} {HELIX} 8"),
    "other": (1, OTHER),
    "other 2x2 heads, sequence parallel": (4, f"{OTHER} {HELIX} 4 --sequence-parallel"),
}


@pytest.fixture(scope="module")
def results():
    """{case: losses and classes that ran}, all from one process that has Transformer Engine."""
    done = subprocess.run(
        [sys.executable, "-m", "te_worker"],
        input=json.dumps(CASES),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_give_the_local_specs_losses(results):
    losses = results["vanilla"]["losses"]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.3
    assert losses == pytest.approx(results["local"]["losses"], abs=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if "x" in name])
def test_losses_of_one_vanilla_rank(results, name):
    reference = results["other" if name.startswith("other") else "vanilla"]
    assert len(reference["losses"]) == 8
    assert results[name]["losses"] == pytest.approx(reference["losses"], abs=1e-4)
    te = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    te |= {"LayerNormLinear", "DotProductAttention", "UnfusedDotProductAttention"}  # Transformer Engine's own
    helix = {"HelixParallelSelfAttention", "HelixCoreAttention"}
    helix |= set() if name.startswith("other") else {"SliceNorm"}
    assert te <= set(reference["modules"]) and not helix & set(reference["modules"])
    assert te | helix <= set(results[name]["modules"])
