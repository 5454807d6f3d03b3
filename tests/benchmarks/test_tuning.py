"""The short form of the benchmark of tuning: commands, and the table that comes of them."""

import pytest

from benchmarks.tuning import METHODS, QUICK, measure

pytestmark = [pytest.mark.distributed, pytest.mark.integration, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return {row.row: row for row in measure(QUICK, tmp_path_factory.mktemp("tuning"))}


def test_each_method_has_each_figure(rows):
    figures = ["accuracy", "trained parameters", "memory a rank", "state a rank", "step", "training", "checkpoint"]
    assert list(rows) == ["no tuning: accuracy", *(f"{method}: {figure}" for method in QUICK.methods for figure in figures)]
    assert all(row.holds is None for row in rows.values())
    for method in ("no tuning", *QUICK.methods):
        accuracy = rows[f"{method}: accuracy"]
        low, high = accuracy.spread
        assert 0 <= low <= accuracy.value <= high <= 1 and accuracy.peer.startswith(f"{QUICK.max_samples} held-out samples of digits")


def test_an_adapter_trains_and_keeps_less_than_the_model(rows):
    trained = rows["AdaLoRA: trained parameters"]
    total = int(trained.peer.removeprefix("of ").replace(",", ""))
    assert 0 < trained.value < 0.2 * total
    # Of each parameter that trains the checkpoint has a master, two moments and two averages in float32.
    assert rows["AdaLoRA: checkpoint"].value == pytest.approx(20 * trained.value / (1 << 20), rel=0.2)
    assert rows["AdaLoRA: state a rank"].value == pytest.approx(
        (26 * trained.value + 2 * (total - trained.value)) / 2 / (1 << 20), rel=0.01
    )


def test_the_table_has_the_methods_that_are_offered():
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names) == 9 and set(QUICK.methods) <= set(names)
