"""What the reference run's detector changes of a recipe."""

from dataclasses import replace

import pytest

from benchmarks.reference.detector import AUGMENT, detector_overrides
from benchmarks.reference.parts import tables
from megamm.config import load_recipe
from megamm.core.errors import ConfigError
from megamm.core.lengths import image_num_tokens, patch_grid


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_a_row_holds_one_picture_and_each_cell_asks(name):
    overrides = detector_overrides(load_recipe(name)) | {"data.train": {"cells": {"shards": "x.tar", "augment": AUGMENT}}}
    recipe = load_recipe(name, tables(overrides))
    features, head = recipe.model.image_features, recipe.model.head
    assert head is not None and (head.kind, head.queries, head.states) == ("detector", "cells", "vision")
    grid = patch_grid(240, 320, patch_size=features.patch_size, max_patches=features.max_patches, merge=features.merge)
    assert features.max_patches / 2 < grid[0] * grid[1] <= recipe.data.row_patches
    assert image_num_tokens(grid, features.merge) + 40 < recipe.batch.row_tokens
    assert recipe.data.train["cells"].augment.image_flip and not recipe.model.text.trainable


def test_a_recipe_without_a_vision_tower_is_refused():
    recipe = load_recipe("tiny")
    with pytest.raises(ConfigError, match="no vision tower"):
        detector_overrides(replace(recipe, model=replace(recipe.model, vision=None)))
