"""A head of what a run starts from: it goes on where it answers the same, and begins anew where it answers something else."""

import logging
from dataclasses import replace

import pytest
import torch

from megamm.checkpoint.base import Base
from megamm.config import Head
from megamm.models.heads.head import BackboneHead
from megamm.train.origin import Origin, load_origin
from tests.support.tiny_run import random_model, write_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("world")]
HEAD = Head("linear", ("left", "right"), states="vision")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with a head of random weights, and the head."""
    run = tmp_path_factory.mktemp("runs") / "linear"
    loaded = write_run(run, head=HEAD)
    return run / "checkpoints" / "step_00000003", loaded.model.head


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, ""),
        ({"lr_scale": 3.0}, ""),
        ({"labels": ("right", "left")}, "labels"),
        ({"multi_label": True}, "multi_label"),
        ({"states": "audio"}, "states"),
        ({"pool": "last"}, "pool"),
        ({"labels": ("left", "right", "none")}, "labels"),
        ({"hidden_layers": 1}, "form"),
    ],
)
def test_a_head_that_answers_something_else_begins_anew(trained, tmp_path, caplog, monkeypatch, changes, differs):
    checkpoint, before = trained
    loaded = random_model(tmp_path, seed=1)
    torch.manual_seed(2)
    loaded.model.head = BackboneHead(replace(HEAD, **changes), loaded.config)
    begun = loaded.model.head.kind.classify.weight.detach().clone()
    monkeypatch.setattr(logging.getLogger("megamm"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="megamm"):
        filled = load_origin(loaded.model, Origin("", Base(path=str(checkpoint), digest="", step=3), is_needed=True))
    expected = begun if differs else before.kind.classify.weight
    assert torch.equal(loaded.model.head.kind.classify.weight, expected)
    assert any(name.startswith("head.") for name in filled) == (not differs)
    assert (f"another {differs} than the recipe's, which begins anew" in caplog.text) == bool(differs)


def test_a_checkpoint_without_its_recipe_says_by_its_shapes(trained, tmp_path):
    checkpoint, before = trained
    alone = tmp_path / "a" / "b" / "c"
    alone.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    loaded = random_model(tmp_path, seed=1)
    loaded.model.head = BackboneHead(HEAD, loaded.config)
    load_origin(loaded.model, Origin("", Base(path=str(alone), digest="", step=3), is_needed=True))
    assert torch.equal(loaded.model.head.kind.classify.weight, before.kind.classify.weight)
