"""Small models of random weights and files to ask them about."""

import dataclasses

import pytest
import torch

from megamm.config.schema import Adapter
from megamm.data.media.features import MediaRules
from megamm.inference.explain.question import read_question
from megamm.inference.load import Loaded, run_config
from megamm.models.build import build_model
from tests.support import tiny_run
from tests.support.shards import flac, jpeg

QUESTION = "What digit is this?"


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    return tiny_run.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Two pictures of other shapes, a sound of more than one chunk and a short one."""
    folder = tmp_path_factory.mktemp("files")
    contents = {"a.jpg": jpeg(40, 30), "b.png": jpeg(10, 50, format="PNG"), "c.flac": flac(19000), "d.flac": flac(4000)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def make_loaded(pieces, tmp_path_factory):
    """From an adapter, a head and changes of the tiny model to a model whose weights are far enough from zero to carry signal."""

    def make(adapter=None, head=None, **model) -> Loaded:
        recipe = tiny_run.recipe(**model)
        recipe = dataclasses.replace(recipe, adapter=adapter or Adapter(), model=dataclasses.replace(recipe.model, head=head))
        torch.manual_seed(0)
        network = build_model(run_config(recipe, pieces.vocabulary), head).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        media = MediaRules.of(recipe.model, recipe.data)
        return Loaded(model=network, tokenizer=pieces, media=media, recipe=recipe, step=None, source=tmp_path_factory.getbasetemp())

    return make


@pytest.fixture(scope="session")
def plain(make_loaded):
    return make_loaded()


@pytest.fixture(scope="session")
def question(plain, files):
    """About everything at once."""
    return read_question(plain, QUESTION, images=[files / "a.jpg", files / "b.png"], audios=[files / "c.flac", files / "d.flac"])
