"""Recipes over real data, and plans of jobs over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megamm.config import to_dict
from megamm.submit.job import Plan, Request, plan_job
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and a tokenizer; tests read them only."""
    root = tmp_path_factory.mktemp("submit") / "data"
    make_data(root, num_each=6)
    return root


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Path:
    """A recipe of somebody's own over the data."""
    return write_recipe(tmp_path / "mine.toml", to_dict(recipe_over(data)))


@pytest.fixture
def plan(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plan a job of two nodes with two GPUs each; words go to sbatch, overrides to the recipe."""
    monkeypatch.delenv("MEGAMM_SITE", raising=False)

    def planned(*overrides: str, sbatch: tuple[str, ...] = ("--nodes=2", "--gpus-per-node=2"), **changes) -> Plan:
        request = {"command": "pretrain", "recipe": str(recipe), "run": tmp_path / "run", "arguments": ()}
        return plan_job(Request(**{**request, **changes}, overrides=overrides, sbatch=sbatch))  # type: ignore[arg-type]

    return planned
