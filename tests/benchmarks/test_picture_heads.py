"""What the reference run's heads for pictures change of a recipe."""

from dataclasses import replace

import pytest

from benchmarks.reference.parts import tables
from benchmarks.reference.picture_heads import PICTURE_HEADS, picture_head_overrides
from megamm.config import load_recipe
from megamm.core.errors import ConfigError
from megamm.core.lengths import image_num_tokens, patch_grid


@pytest.mark.parametrize("name", ["small", "tiny"])
@pytest.mark.parametrize("kind", PICTURE_HEADS)
def test_a_row_holds_one_picture(name, kind):
    augment = dict(PICTURE_HEADS[kind].augment)
    overrides = picture_head_overrides(load_recipe(name), kind) | {"data.train": {"cells": {"shards": "x.tar", "augment": augment}}}
    recipe = load_recipe(name, tables(overrides))
    features, head = recipe.model.image_features, recipe.model.head
    assert head is not None and (head.kind, head.states) == (kind, "vision")
    assert head.queries == ("cells" if kind == "detector" else "learned")
    grid = patch_grid(240, 320, patch_size=features.patch_size, max_patches=features.max_patches, merge=features.merge)
    assert features.max_patches / 2 < grid[0] * grid[1] <= recipe.data.row_patches
    assert image_num_tokens(grid, features.merge) + 40 < recipe.batch.row_tokens
    assert recipe.data.train["cells"].augment.image_flip and not recipe.model.text.trainable


@pytest.mark.parametrize("kind", PICTURE_HEADS)
def test_a_recipe_without_a_vision_tower_is_refused(kind):
    recipe = load_recipe("tiny")
    with pytest.raises(ConfigError, match=f"no vision tower; a {kind}"):
        picture_head_overrides(replace(recipe, model=replace(recipe.model, vision=None)), kind)
