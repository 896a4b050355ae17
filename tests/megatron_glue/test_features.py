"""docs/features.md says what happens: each feature beside sliced heads equals vanilla or is refused."""

import pytest

from tests.megatron_glue.feature_table import FEATURES, HEAD, PAGE, Feature, _outcome, here, outcomes, render
from tests.megatron_glue.te_environment import available

# One fixture trains every row: minutes, and longer on a busy machine.
pytestmark = [pytest.mark.training, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def found():
    return outcomes(here())


def test_nothing_is_computed_differently(found):
    assert {name: o for name, o in found.items() if o["kind"] == "different"} == {}
    assert len(found) == len(here())
    assert len(here()) == len(FEATURES) or not available()


def test_the_page_is_what_happened(found):
    """Row by row: without Transformer Engine the others."""
    page = PAGE.read_text()
    assert page.startswith(HEAD)
    rows = page.removeprefix(HEAD).splitlines(keepends=True)
    assert len(rows) == len(FEATURES), "python -m tests.megatron_glue.feature_table --write"
    for row, f in zip(rows, FEATURES, strict=True):
        if f.title in found:
            assert row == render(f, found[f.title]), "python -m tests.megatron_glue.feature_table --write"


def test_rows_have_names_of_their_own():
    assert len({f.title for f in FEATURES}) == len(FEATURES)


RAN = {"losses": [5.0, 4.0, 3.0], "norms": [1.0, 1.0, 1.0], "begun": 3, "plan": "grid 2x2, exact", "ran": {}}
ROW = Feature("a row", "")


@pytest.mark.parametrize(
    "other",
    [
        {"losses": [5.0, 4.0, 3.0002]},
        {"losses": [5.0, 4.0]},
        {"losses": [5.0, 4.0, float("nan")]},
        {"norms": [1.0, 1.0, 1.0002]},
        {"plan": "grid 4x1: heads are not sliced, attention is Megatron's own"},
        {"plan": None},
        {"error": "KeyError: 0", "trace": ""},
        {"error": "HelixConfigError: no", "trace": "", "begun": 1},
    ],
)
def test_what_does_not_work(other):
    assert _outcome(ROW, RAN, RAN)["kind"] == "works"
    assert _outcome(ROW, RAN, {**RAN, **other})["kind"] == "different"


def test_a_feature_must_be_on():
    row = Feature("a row", "", "--a-flag", ran=("recomputed",), says="placement dims")
    ran = {**RAN, "ran": {"recomputed": 1}, "plan": "grid 2x2, exact softmax, query placement dims"}
    off = {**RAN, "losses": [5.0, 4.0, 3.1]}
    assert _outcome(row, RAN, ran, off, {})["kind"] == "works"
    assert (
        "differ by 1.0e-03 and 0.0e+00 only"
        in _outcome(row, RAN, ran, {**RAN, "losses": [5, 4, 3.001]}, {})["text"]
    )
    assert "not recomputed" in _outcome(row, RAN, {**ran, "ran": {}}, off, {})["text"]
    assert "without the feature too" in _outcome(row, RAN, ran, off, {"recomputed": 3})["text"]
    assert "placement dims" in _outcome(row, RAN, {**ran, "plan": RAN["plan"]}, off, {})["text"]


def test_refused_before_the_first_step_or_by_vanilla_with_the_same_words():
    refused = {**RAN, "error": "HelixConfigError: no", "trace": "", "losses": [], "begun": 0}
    assert _outcome(ROW, RAN, refused) == {"kind": "refused", "text": "no"}
    fault = {**refused, "error": "RuntimeError: no CUDA"}
    assert _outcome(ROW, fault, fault)["kind"] == "needs a GPU"
    assert _outcome(ROW, {**fault, "error": "RuntimeError: other"}, fault)["kind"] == "different"
