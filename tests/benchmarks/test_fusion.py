"""The comparison of fusions: what is compared is the same but for how it is fused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fusion import ALONE, QUESTIONS, RECIPE, WAYS, datasets_of, head_of
from benchmarks.reference.parts import tables
from megamm.config import load_recipe

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.set)
@pytest.mark.parametrize("name", WAYS)
def test_ways_differ_in_the_head_alone(question, name):
    way = WAYS[name]
    recipe = load_recipe(RECIPE, tables({**head_of(question, way), **way.model, **datasets_of(question)}))
    start = load_recipe(RECIPE)
    for part in ("vision", "audio", "image_features", "audio_features"):
        assert getattr(recipe.model, part) == getattr(start.model, part)
    assert (recipe.batch, recipe.optim) == (start.batch, start.optim)
    assert (recipe.model.head is None) == (name == "tokens")
    if recipe.model.head is not None:
        assert recipe.model.head.labels == question.labels


@pytest.mark.integration
@pytest.mark.skipif(not os.environ.get("MEGAMM_DATA"), reason="MEGAMM_DATA is not set, so there are no digits to fuse")
def test_a_quick_comparison_goes_the_whole_way(tmp_path):
    command = [sys.executable, "-m", "benchmarks.fusion", "--quick", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    child = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    rows = json.loads((tmp_path / "fusion-quick.json").read_text())["rows"]
    assert len(rows) == 2 + len(WAYS) + len(ALONE)
    assert all(isinstance(row["value"], float | int) and "samples" in row["peer"] for row in rows)
    assert [row["goal"] for row in rows if row["goal"]] == ["<= 0.55"] * len(ALONE), "one half alone must not tell"


def test_absent_data_is_named(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MEGAMM_DATA"}
    command = [sys.executable, "-m", "benchmarks.fusion", "--work", str(tmp_path)]
    child = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 1 and child.stderr.startswith("benchmarks.fusion: MEGAMM_DATA is not set")
