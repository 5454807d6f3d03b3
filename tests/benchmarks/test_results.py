"""What benchmarks write: goals are compared, not believed."""

import json

import pytest

from benchmarks.results import Row, measured, write


@pytest.mark.parametrize(
    ("value", "goal", "holds"),
    [(1.6, "<= 1.6", True), (1.61, "<= 1.6", False), (4, ">= 4", True), (0, "== 0", True), (1, "== 0", False), (3.0, "", None)],
)
def test_a_goal_is_compared_with_the_value(value, goal, holds):
    assert Row("a", value, goal=goal).holds is holds


def test_words_reach_no_goal():
    assert Row("a", "not installed", goal="<= 2").holds is False
    assert Row("a", "not installed").holds is None


def test_a_goal_that_is_no_comparison_is_refused():
    with pytest.raises(ValueError, match="about 3"):
        Row("a", 1, goal="about 3")


def test_repeats_give_their_median_and_quartiles():
    row = measured("a", [5.0, 1.0, 3.0, 2.0, 4.0], "×")
    assert (row.value, row.spread) == (3.0, (2.0, 4.0))
    assert measured("a", [5.0]).spread is None


def test_the_files_hold_the_rows_with_what_holds(tmp_path):
    rows = [Row("reader", 1.23456, "×", "<= 1.6", (1.2, 1.3), "raw read"), Row("litdata", "not installed"), Row("lost", 2, goal="== 0")]
    path = write("data", "python -m benchmarks.data", rows, versions={"litdata": "0.2"}, folder=tmp_path)
    result = json.loads(path.read_text())
    assert set(result) == {"name", "command", "versions", "machine", "rows"}
    assert result["name"] == "data" and result["versions"]["litdata"] == "0.2"
    first = {"row": "reader", "value": 1.235, "unit": "×", "goal": "<= 1.6", "holds": True, "spread": [1.2, 1.3], "peer": "raw read"}
    assert result["rows"][0] == first
    assert [row["holds"] for row in result["rows"]] == [True, None, False]
    table = path.with_suffix(".md").read_text()
    assert "| reader | 1.235 × | 1.2 – 1.3 | <= 1.6 | yes | raw read |" in table
    assert "| lost | 2 |  | == 0 | **no** |  |" in table


def test_a_quick_run_never_replaces_a_result(tmp_path):
    path = write("data", "python -m benchmarks.data", [Row("a", 1)], folder=tmp_path)
    before = path.read_bytes()
    quick = write("data", "python -m benchmarks.data --quick", [Row("a", 2)], quick=True, folder=tmp_path)
    assert path.read_bytes() == before
    assert quick.name == "data-quick.json" and json.loads(quick.read_text())["name"] == "data-quick"
