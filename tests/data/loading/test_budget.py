"""The budget of skipped samples: a share since the run began, and so many in a row."""

from __future__ import annotations

import pytest

from megamm.core.errors import DataError
from megamm.data.ledger import EXCLUDED, BudgetSpent, Skipped
from megamm.data.loading.budget import Budget


def entry(position: int, reason: str = "damaged") -> Skipped:
    return Skipped(position, "digits", "train-00000.tar", f"k{position}", reason)


def test_samples_skipped_in_a_row_end_the_run_and_a_delivered_one_begins_anew():
    budget = Budget(1.0, 3)
    for _ in range(5):
        budget.charge([entry(0), entry(1), None])
    budget.charge([entry(2), entry(3)])
    with pytest.raises(DataError, match=r"4 samples in a row were skipped, data\.max_skipped_in_a_row is 3; the last is digits/k5 in"):
        budget.charge([entry(4), entry(5)])


def test_excluded_samples_are_not_held_against_a_run():
    budget = Budget(0.0, 1)
    budget.charge([entry(number, EXCLUDED) for number in range(50)])
    # They say nothing of the data either: bad samples around them are still in a row.
    with pytest.raises(DataError, match="2 samples in a row"):
        Budget(1.0, 1).charge([entry(0), entry(1, EXCLUDED), entry(2)])


def test_the_share_goes_on_where_the_run_stood():
    Budget(0.01, 100, num_planned=0, num_skipped=0).charge([entry(0)])
    with pytest.raises(DataError, match="51 of 5001 samples were skipped"):
        Budget(0.01, 100, num_planned=5000, num_skipped=50).charge([entry(0)])
    Budget(0.01, 100, num_planned=5200, num_skipped=50).charge([entry(0)])


@pytest.mark.parametrize(("max_share", "max_in_a_row"), [(1.0, 1), (0.0, 100)])
def test_the_error_holds_all_that_the_step_skipped(max_share, max_in_a_row):
    results = [entry(1), None, entry(2), entry(3), entry(4, EXCLUDED), entry(5)]
    with pytest.raises(BudgetSpent) as caught:
        Budget(max_share, max_in_a_row).charge(results, unfit=[entry(0)], num_unfit=1.0)
    assert [one.position for one in caught.value.skipped] == [0, 1, 2, 3, 4, 5]


def test_a_step_names_a_few_samples_and_counts_the_others_each_once(caplog):
    bad = [entry(number) for number in range(5)]
    budget = Budget(1.0, 1000)
    budget.charge(bad)
    budget.charge(bad)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["skipped"] * 3 + ["and"]
    assert lines[-1].startswith("and 2 more samples")
