import re
from importlib import resources
from pathlib import Path

import pytest

from megamm.config.read import load_recipe, recipe_names
from megamm.models.build import config_from_recipe, num_parameters
from megamm.tokenizers.vocabulary import Vocabulary
from megamm.train.recipes import recipe_table
from tests.support.multimodal import CONTROL_IDS


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("tiny", 0.7e6, 1.3e6),
        ("tiny_lora", 0.7e6, 1.3e6),
        ("reference", 8e6, 9.5e6),
        ("reference_speaker", 0.5e6, 0.7e6),
        ("reference_sounds", 0.5e6, 0.7e6),
        ("small", 55e6, 65e6),
        ("1b", 1.0e9, 1.1e9),
    ],
)
def test_shipped_recipes_build_and_have_the_size_that_they_say(name, least, most):
    recipe = load_recipe(name)
    config = config_from_recipe(
        recipe.model,
        vocab_size=Vocabulary.from_config(recipe.tokenizer, recipe.tokenizer.text_size).size,
        control_ids=CONTROL_IDS,
        adapter=recipe.adapter,
    )
    assert least <= num_parameters(config)["total"] <= most


def test_the_adapter_on_the_quick_start_fits_its_model():
    base, tuned = load_recipe("tiny"), load_recipe("tiny_lora")
    assert (tuned.model, tuned.tokenizer) == (base.model, base.tokenizer)
    assert tuned.adapter.freezes_base


@pytest.mark.parametrize("name", ["small", "1b"])
def test_recipes_state_their_tokens(name):
    recipe = load_recipe(name)
    tokens = recipe.train.steps * recipe.batch.global_rows * recipe.batch.row_tokens
    assert f"{recipe.train.steps:,} steps of {recipe.batch.global_rows * recipe.batch.row_tokens:,} tokens" in _head(name)
    assert 15 <= tokens / {"small": 59e6, "1b": 1.016e9}[name] <= 25, "about 20 tokens a parameter"


def _head(name: str) -> str:
    return resources.files("megamm.recipes").joinpath(f"{name}.toml").read_text().split("name =")[0]


def test_the_table_of_the_readme_is_that_of_the_recipes():
    lines = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    told = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:8]] for line in lines if re.match(r"\| `\w+` \|", line)}
    found = {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:7] for line in recipe_table().splitlines()[1:]}
    assert told == found and set(recipe_names()) == told.keys()
