"""The verdicts of `python -m helix_megatron.generate.check` can be bad ones."""

import math

import numpy as np
import pytest
import torch

from helix_megatron.generate import check


@pytest.fixture
def expected(tmp_path):
    """One prompt, two steps: tokens 1 and 0 of three."""
    logits = np.array([[[0, 2, 1], [3, 1, 0]]], dtype=np.float32)
    np.save(tmp_path / "logits.npy", logits)
    return check.Reference([[5]], [[1, 0]], str(tmp_path / "logits.npy"))


@pytest.mark.parametrize(
    ("second", "worst"), [([3, 1, 0], 0.0), ([3, 1.25, 0], 0.25), ([3, math.nan, 0], math.inf)]
)
def test_the_largest_difference_of_a_logit(expected, second, worst):
    comparison = check._Comparison(expected)
    comparison.see([0], torch.tensor([[0.0, 2, 1]]))
    comparison.see([0], torch.tensor([second]))
    assert comparison.worst == worst


def test_no_findings_are_no_success():
    results = check.Results(None, {})
    assert not results.equal
    results.add({"tp": 1, "kind": "sequence", "equal": True})
    assert results.equal
    results.add({"tp": 1, "kind": "needle", "tokens": [[1]]})
    results.add({"tp": 2, "kind": "needle", "tokens": [[2]]})
    assert not results.equal


def test_findings_of_another_code_are_not_taken_over(tmp_path):
    check.Results(tmp_path / "out.json", {"source": "a"}).add({"tp": 1, "kind": "sequence", "equal": True})
    assert check.Results(tmp_path / "out.json", {"source": "a"}).has(1, "sequence")
    with pytest.raises(ValueError, match="choose another --out"):
        check.Results(tmp_path / "out.json", {"source": "b"})
