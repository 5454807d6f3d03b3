"""Towers with folders of their own in a run that starts from another one: which weights are taken, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from megamm.checkpoint.base import Base
from megamm.config import Recipe, to_dict
from megamm.config.schema import Adapter
from megamm.core.errors import ConfigError
from megamm.core.files import write_json
from megamm.inference.load import run_config
from megamm.models.build import build_model
from megamm.tokenizers.text import TextTokenizer
from megamm.train.build import load_start
from megamm.train.origin import Origin, find_origin
from megamm.train.run_folder import RunFolder
from tests.support.tiny_run import recipe, write_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("world")]
VISION = "model.vision_tower."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`base`, a run from nothing; `first` and `second`, vision towers of its shapes; `started`, the same run but begun with `first`."""
    root = tmp_path_factory.mktemp("origins")
    loaded = write_run(root / "base")
    loaded.model.save_pretrained(root / "exported")
    for path in (root / "base" / "tokenizer").iterdir():
        shutil.copyfile(path, root / "exported" / path.name)
    for name in ("first", "second"):
        AutoModel.from_config(loaded.config.vision_config).save_pretrained(root / name)
    shutil.copytree(root / "base", root / "started")
    write_json(root / "started" / "config.json", to_dict(naming(vision=root / "first")))
    shutil.copytree(root / "started" / "checkpoints" / "step_00000003", root / "copied")
    return root


def naming(adapter: Adapter | None = None, **folders: Path) -> Recipe:
    """The tiny recipe with a folder for some towers."""
    one = recipe()
    towers = {name: dataclasses.replace(getattr(one.model, name), pretrained=str(path)) for name, path in folders.items()}
    return dataclasses.replace(one, model=dataclasses.replace(one.model, **towers), adapter=adapter or one.adapter)


def origin_of(root: Path, source: str, one: Recipe, world) -> Origin:
    tokenizer = TextTokenizer.load(root / "base" / "tokenizer")
    origin = find_origin(root / source, RunFolder(root / "new"), one, tokenizer, world)
    assert origin is not None
    return origin


@pytest.mark.parametrize(
    ("source", "vision", "replaced"),
    [
        ("base", None, ()),
        ("base", "first", ("vision",)),
        ("base/checkpoints/step_00000003", "first", ("vision",)),
        ("started", None, ()),
        ("started", "first", ()),
        ("started", "../{}/second/../first", ()),
        ("started", "second", ("vision",)),
        ("exported", None, ()),
        ("exported", "exported", ()),
        ("copied", None, ()),
    ],
)
def test_a_tower_is_the_sources_unless_the_recipe_names_another_folder(root, world, source, vision, replaced):
    folders = {} if vision is None else {"vision": root / vision.format(root.name)}
    one = naming(**folders)
    origin = origin_of(root, source, one, world)
    assert origin.towers == replaced
    assert origin.to_json().get("towers", []) == list(replaced)
    config = run_config(one, TextTokenizer.load(root / "base" / "tokenizer").vocabulary)
    model = build_model(config, None)
    filled = load_start(model, one, config, origin)
    assert filled >= {name for name, _ in model.named_parameters()}
    expected = build_model(config, None)
    load_start(expected, recipe(), config, Origin("", origin.base, is_needed=True))
    tower = AutoModel.from_pretrained(root / vision).state_dict() if replaced else {}
    for name, value in model.state_dict().items():
        own = tower[name.removeprefix(VISION)] if replaced and name.startswith(VISION) else expected.state_dict()[name]
        assert torch.equal(value, own), name


def test_a_resumed_run_remembers_them_and_reads_nothing(root, world, tmp_path):
    one, run = naming(vision=root / "first"), RunFolder(tmp_path / "run")
    origin = origin_of(root, "base", one, world)
    run.checkpoints.joinpath("step_00000001").mkdir(parents=True)
    write_json(run.origin, origin.to_json())
    tokenizer = TextTokenizer.load(root / "base" / "tokenizer")
    recorded = find_origin(root / "base", run, one, tokenizer, world)
    assert recorded == dataclasses.replace(origin, is_needed=False)
    config = run_config(one, tokenizer.vocabulary)
    assert load_start(build_model(config, None), one, config, recorded) == set()


def test_a_run_without_a_source_starts_from_all_folders(root):
    one = naming(vision=root / "first", text=root / "exported")
    config = run_config(one, TextTokenizer.load(root / "base" / "tokenizer").vocabulary)
    filled = load_start(build_model(config, None), one, config, None)
    assert {name.split(".")[1] for name in filled} == {"vision_tower", "language_model"}


@pytest.mark.parametrize(
    ("source", "adapter", "message"),
    [
        (
            "base",
            Adapter(method="lora", rank=2),
            "a run that trains an adapter alone keeps none of its own; leave it out, or set adapter.train_base",
        ),
        ("exported", None, "does not say whether its vision tower began as model.vision.pretrained="),
        ("copied", None, "start from where it lay in its run"),
    ],
)
def test_what_could_only_be_guessed_or_lost_is_refused(root, world, source, adapter, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        origin_of(root, source, naming(adapter, vision=root / "first"), world)


def test_a_tower_comes_without_the_adapter_of_the_one_that_it_replaces(root, world, tmp_path):
    """Which would be for other weights: it begins anew, at no change."""
    adapter = Adapter(method="dora", targets=("text.q_proj", "vision.fc1"), rank=2, train_base=True)
    one = naming(adapter, vision=root / "first")
    config = run_config(one, TextTokenizer.load(root / "base" / "tokenizer").vocabulary)
    before = build_model(config, None)
    exported = tmp_path / "adapted"
    before.save_pretrained(exported)
    filled = load_start(build_model(config, None), one, config, Origin("", Base(str(exported), ""), is_needed=True, towers=("vision",)))
    added = {name for name in filled if ".lora_" in name}
    assert added and not any(name.startswith(VISION) for name in added)
