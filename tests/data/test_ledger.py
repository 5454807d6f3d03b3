"""The ledger: nothing twice, nothing lost, and a budget."""

from __future__ import annotations

import json

import pytest

from megamm.core.errors import DataError
from megamm.data.ledger import Skipped, check_budget, merge


def entry(position: int, reason: str = "damaged") -> Skipped:
    return Skipped(position, "digits", "train-00000.tar", f"k{position}", reason)


def test_entries_survive_json():
    assert Skipped.from_json(json.loads(json.dumps(entry(3).to_json()))) == entry(3)


def test_ranks_are_merged_by_position_without_repetition():
    assert merge([entry(5), entry(1), entry(5), entry(3)]) == [entry(1), entry(3), entry(5)]


def test_the_budget_is_a_share_of_at_least_a_thousand_samples():
    check_budget(10, 20, 0.01)
    check_budget(50, 5000, 0.01)
    with pytest.raises(DataError, match=r"11 of 20 samples were skipped.*digits/k10 in train-00000\.tar: damaged"):
        check_budget(11, 20, 0.01, last=entry(10))
    with pytest.raises(DataError, match="51 of 5000"):
        check_budget(50.25, 5000, 0.01)


def test_a_budget_of_zero_bears_nothing():
    check_budget(0, 0, 0.0)
    with pytest.raises(DataError, match="1 of 3"):
        check_budget(0.125, 3, 0.0)
