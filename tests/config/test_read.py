import pytest

from megamm.config import from_dict, load_recipe, load_resolved, recipe_names, to_dict
from megamm.core.errors import ConfigError
from megamm.core.files import write_json


def test_every_shipped_recipe_is_valid_and_survives_json():
    assert {"tiny", "small", "1b"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert from_dict(to_dict(recipe)) == recipe


def test_override_reaches_any_depth():
    recipe = load_recipe("tiny", ["--optim.lr", "3e-4", "--data.train.digits.weight=2", "--model.text.config.hidden_size", "32"])
    assert recipe.optim.lr == 3e-4
    assert recipe.data.train["digits"].weight == 2.0
    assert recipe.model.text.config["hidden_size"] == 32


def test_override_of_text_is_never_read_as_a_number():
    assert load_recipe("tiny", ["--data.root", "1e5"]).data.root == "1e5"
    assert load_recipe("tiny", ["--data.train.digits.shards", "7"]).data.train["digits"].shards == "7"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--optim.lrr", "1"], ["optim.lrr", "did you mean 'lr'"]),
        (["--optim.lr", "fast"], ["optim.lr", '"fast"', "valid number"]),
        (["--optim.lr", "-1"], ["optim.lr", "-1", "greater than 0"]),
        (["--batch.row_tokens", "1.5"], ["batch.row_tokens", "valid integer"]),
        (["--batch.row_tokens", "true"], ["batch.row_tokens", "true", "integer"]),
        (["--data.train.digits.wieght", "2"], ["data.train.digits.wieght", "did you mean 'weight'"]),
        (["--batch.global_rows", "9999999999999"], ["batch.global_rows", "9999999999999", "less than or equal to 1048576"]),
        (["--batch.row_tokens", "9999999999999"], ["batch.row_tokens", "less than or equal to 16777216"]),
        (["--data.window", "9999999999999"], ["data.window", "less than or equal to 1048576"]),
        (["--schedule.kind", "cosin"], ["schedule.kind", "cosine"]),
        (["--name.x", "1"], ["name", "not a table"]),
        (["--optim.lr"], ["--optim.lr", "VALUE"]),
        (["lr=1"], ["lr=1", "--dotted.key value"]),
    ],
)
def test_mistakes_are_one_line_with_the_fix(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_misspelt_key_is_named_and_not_the_one_that_is_missing_for_it():
    mapping = '{ task = "captioning", image = "jpg", anser = "txt" }'
    with pytest.raises(ConfigError, match=r"mapping\.anser is not a key of a recipe; did you mean 'answer'\?"):
        load_recipe("tiny", ["--data.train.text.mapping", mapping])


def test_a_misspelt_dataset_is_a_new_one_without_shards():
    with pytest.raises(ConfigError, match=r"data\.train\.digit\.shards is missing; set it; did you mean 'digits'\?"):
        load_recipe("tiny", ["--data.train.digit.weight", "2"])


@pytest.mark.parametrize("name", ["a/b", "a.b", "", "a b"])
def test_a_dataset_is_named_so_that_its_samples_and_settings_can_be(name):
    """`--exclude` takes the part before the first '/' for the dataset."""
    recipe = to_dict(load_recipe("tiny"))
    recipe["data"]["train"][name] = recipe["data"]["train"]["digits"]
    with pytest.raises(ConfigError, match=r"data\.train\..*pattern") as caught:
        from_dict(recipe)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_suggests_a_known_one():
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load_recipe("tinny")


def test_file_that_is_no_toml_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("name = ")
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML"):
        load_recipe(str(path))


def test_missing_required_key_is_named():
    with pytest.raises(ConfigError, match=r"model is missing"):
        from_dict({"name": "x"})


def test_resolved_config_is_what_a_run_archived(tmp_path):
    recipe = load_recipe("tiny", ["--seed", "9"])
    write_json(tmp_path / "config.json", to_dict(recipe))
    assert load_resolved(tmp_path / "config.json") == recipe
    with pytest.raises(ConfigError, match="does not exist"):
        load_resolved(tmp_path / "other" / "config.json")


def test_hyphens_are_kept_so_that_a_dataset_may_have_them():
    recipe = load_recipe("tiny", ["--data.train.my-set.shards", "my-set/*.tar"])
    assert recipe.data.train["my-set"].shards == "my-set/*.tar"
    with pytest.raises(ConfigError, match=r"optim.weight-decay is not a key of a recipe; did you mean 'weight_decay'"):
        load_recipe("tiny", ["--optim.weight-decay", "0.1"])
