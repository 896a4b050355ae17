"""docs/features.md says what happens: each feature beside sliced heads equals vanilla or is refused."""

import pytest
from feature_table import FEATURES, PAGE, _outcome, outcomes, render

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def found():
    return outcomes()


def test_nothing_is_computed_differently(found):
    assert {name: o for name, o in found.items() if o["kind"] == "different"} == {}
    assert len(found) == len(FEATURES)


def test_the_page_is_what_happened(found):
    assert PAGE.read_text() == render(found), "python tests/feature_table.py --write"


def test_other_losses_norms_or_m_of_1_do_not_work():
    good = {"losses": [5.0, 4.0, 3.0], "norms": [1.0, 1.0, 1.0], "grid": "2x2"}
    assert _outcome(good, good)["kind"] == "works"
    for other in (
        {"losses": [5.0, 4.0, 3.0002]},
        {"norms": [1.0, 1.0, 1.003]},
        {"grid": "2x1"},
        {"error": "KeyError: 0", "trace": ""},
    ):
        assert _outcome(good, {**good, **other})["kind"] == "different"
