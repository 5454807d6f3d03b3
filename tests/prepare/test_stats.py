"""What `data stats` says of real sidecars, against what the samples are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from megamm.cli import main
from megamm.config import to_dict
from megamm.data.planning.plan import DataPlan
from megamm.data.shards.index import load_index
from megamm.prepare.stats import SIDE_EDGES, Counts, recipe_stats, shard_stats
from megamm.tokenizers.text import TextTokenizer
from megamm.train.data import plan_all_lengths
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over

pytest.importorskip("matplotlib", reason="matplotlib is an extra")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A recipe over planned shards, its tokenizer and its plan."""
    root = tmp_path_factory.mktemp("data")
    make_data(root)
    recipe = recipe_over(root)
    tokenizer = TextTokenizer.load(Path(recipe.tokenizer.folder))
    list(plan_all_lengths(recipe, tokenizer))
    return recipe, tokenizer, DataPlan.open(recipe.data, recipe.batch, model=recipe.model, tokenizer=tokenizer, seed=recipe.seed)


@given(st.lists(arrays(np.int64, st.integers(0, 20), elements=st.integers(0, 500)), min_size=1, max_size=5))
def test_counts_hold_what_was_added(parts):
    counts = Counts(unit=0.5)
    for part in parts:
        counts.add(part)
    values = np.concatenate(parts)
    assert counts.num == len(values) and counts.total == values.sum() / 2
    if len(values):
        for share in (0.01, 0.5, 0.99):
            assert counts.quantile(share) == np.quantile(values, share, method="inverted_cdf") / 2
        assert (counts.to_json()["min"], counts.to_json()["max"]) == (values.min() / 2, values.max() / 2)


def test_a_recipes_numbers_are_those_of_its_plan(opened):
    recipe, tokenizer, plan = opened
    stats = recipe_stats(recipe, tokenizer)
    assert [(one.part, one.name) for one in stats.datasets] == [("train", name) for name in plan.datasets] + [("held_out", "pictures")]
    for one in stats.datasets[:-1]:
        dataset = plan.datasets[one.name]
        lengths = dataset.lengths[:, 0, 0]
        assert (one.num_samples, one.tokens.total) == (dataset.num_samples, lengths.sum())
        assert one.tokens.quantile(0.5) == np.quantile(lengths, 0.5, method="inverted_cdf")
        assert one.num_bytes == sum(tar.stat().st_size for tar in dataset.tars)
    by_name = {one.name: one for one in stats.datasets if one.part == "train"}
    assert by_name["both"].num_pictures == by_name["both"].seconds.num == 8
    assert by_name["sounds"].task_samples == Counter(speech_recognition=24)
    assert sum(by_name["sounds"].task_tokens.values()) == by_name["sounds"].tokens.total
    # Frames of the sounds: 6000 + 700 × (number mod 7) at 16 kHz, counted in twentieths of a second.
    seconds = sum(6000 + 700 * (number % 7) for number in range(24)) / 16000
    assert by_name["sounds"].seconds.total == pytest.approx(seconds, abs=24 * 0.025)


def test_pictures_lie_in_the_bins_of_their_sizes(opened):
    _, _, plan = opened
    stats = shard_stats(plan.datasets["pictures"].tars)
    (one,) = stats.datasets
    expected = Counter((8 + number % 5, 8 + number % 3) for number in range(24))
    found = {}
    for width, height in np.argwhere(one.sides):
        found[int(SIDE_EDGES[width]), int(SIDE_EDGES[height])] = int(one.sides[width, height])
    bins = Counter()
    for (width, height), num in expected.items():
        bins[tuple(int(SIDE_EDGES[np.searchsorted(SIDE_EDGES, side, side="right") - 1]) for side in (width, height))] += num
    assert found == bins
    # Shards alone have no rows, but all of them have lengths of one kind.
    assert stats.packing is None and one.tokens.num == 24


def test_tokens_that_are_not_planned_are_not_none(tmp_path, capsys):
    make_data(tmp_path)
    shards = sorted(map(str, tmp_path.glob("pictures/train-*.tar")))
    assert main(["data", "index", *shards]) == 0
    capsys.readouterr()
    assert main(["data", "stats", *shards]) == 0
    header, _, *rows, note = [line for line in capsys.readouterr().out.splitlines() if line]
    columns = [name.strip() for name in header.split("|")]
    for row in rows:
        cells = dict(zip(columns, [cell.strip() for cell in row.split("|")], strict=True))
        assert [cells[name] for name in ("tokens", "tokens p50", "tokens p99", "tokens max")] == ["-"] * 4
        assert int(cells["samples"]) > 0
    assert note.startswith("tokens: not planned") and "megamm data plan-lengths RECIPE" in note


def test_packing_is_measured_on_the_rows_of_the_plan(opened):
    recipe, tokenizer, plan = opened
    packing = recipe_stats(recipe, tokenizer).packing
    step = plan.next_step(plan.start())
    window = step.rows[0].window
    used = window.lengths[window.members, 0].sum() / (window.num_rows * recipe.batch.row_tokens)
    assert packing.fills["tokens"][0] == pytest.approx(used, rel=1e-12) and all(0 < fill <= 1 for fill in packing.fills["tokens"])
    assert packing.row_costs[: window.num_rows] == window.costs.tolist()
    assert set(packing.balance) == {2} and 1 <= packing.balance[2] < 2


def test_the_command_writes_tables_numbers_and_pictures(opened, tmp_path, capsys):
    recipe, _, plan = opened
    path = write_recipe(tmp_path / "mine.toml", to_dict(recipe))
    assert main(["data", "stats", str(path), "--output", str(tmp_path / "stats")]) == 0
    printed = capsys.readouterr()
    assert "| sounds | train | 1 | 24 |" in printed.out and "fill of 128 tokens a row" in printed.out
    names = {file.name for file in (tmp_path / "stats").iterdir()}
    assert names == {"tokens.png", "pictures.png", "seconds.png", "tasks.png", "packing.png", "row_costs.png", "stats.json"}
    for name in names - {"stats.json"}:
        picture = np.asarray(Image.open(tmp_path / "stats" / name).convert("L"))
        assert picture.shape[0] > 200 and picture.std() > 5
    written = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert sum(one["tokens"]["num"] for one in written["datasets"]) == 24 * 3 + 8 + 5
    assert main(["data", "stats", *(str(tar) for tar in plan.datasets["texts"].tars)]) == 0
    assert "text" in capsys.readouterr().out


def test_what_cannot_be_used_is_counted_by_kind(tmp_path, capsys):
    make_data(tmp_path, num_each=6)
    tar = tmp_path / "texts" / "train-00000.tar"
    (tmp_path / "texts" / "train-00000.tar.index").unlink()
    assert main(["data", "stats", str(tar)]) == 1
    assert "megamm data index" in capsys.readouterr().err
    assert main(["data", "stats", str(tar), "--seed", "3"]) == 1
    assert "overrides a recipe, but shards are named" in capsys.readouterr().err
    assert main(["data", "stats", "tiny", str(tar)]) == 1
    assert "name one recipe, or shards alone" in capsys.readouterr().err
    assert load_index(tmp_path / "sounds" / "train-00000.tar").num_samples == 6
