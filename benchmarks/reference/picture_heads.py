"""The heads of the reference run that look at pictures: what they change of a recipe, to learn from two hundred of them in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamm.config import Recipe
from megamm.core.errors import ConfigError

_QUESTION_TOKENS = 48


@dataclass(frozen=True, slots=True)
class PictureHead:
    """A head on the vision tower of the model of all tasks.

    Attributes:
        set: What it learns and is judged on.
        head: Section `model.head`; its states are the vision tower's.
        augment: How its training pictures are changed.
        steps: Of its training.
    """

    set: str
    head: Mapping[str, Any]
    augment: Mapping[str, Any]
    steps: int


PICTURE_HEADS: Mapping[str, PictureHead] = {
    # Each cell asks for the box whose middle it is (`docs/heads.md`).
    "detector": PictureHead(
        "bccd_320",
        {"kind": "detector", "labels": ["Platelets", "RBC", "WBC"], "queries": "cells", "num_layers": 2, "lr_scale": 2.0},
        {
            "image_flip": True,
            "image_crop": 0.4,
            "image_stretch": 0.1,
            "image_brightness": 0.15,
            "image_contrast": 0.15,
            "image_hue": 0.02,
        },
        steps=900,
    ),
    # Eight times finer than its cells: a pixel and a half of the view.
    "segmenter": PictureHead(
        "nuclei256",
        {"kind": "segmenter", "labels": ["nucleus"], "num_layers": 3, "hidden_size": 64, "lr_scale": 2.0},
        {"image_flip": True, "image_turns": True, "image_crop": 0.4, "image_brightness": 0.2, "image_contrast": 0.2},
        steps=1100,
    ),
}
"""Name of the part -> its head."""


def picture_head_overrides(recipe: Recipe, name: str) -> dict[str, Any]:
    """Values of a recipe's keys that put a head on its vision tower, beside its data.

    A row holds one picture, so that a step is eight of them whatever the recipe packs: few pictures want many small steps. The decoder does
    not lead to the head, and stays as it is.

    Args:
        recipe: Of the model of all tasks.
        name: In `PICTURE_HEADS`.

    Raises:
        ConfigError: The recipe has no vision tower.
    """
    if recipe.model.vision is None:
        raise ConfigError(f"recipe {recipe.name} has no vision tower; a {name} needs model.vision")
    of, features = PICTURE_HEADS[name], recipe.model.image_features
    return {
        "model.head": {**of.head, "states": "vision"},
        "model.text.trainable": False,
        "data.row_patches": features.max_patches,
        "batch.row_tokens": features.max_patches // features.merge**2 + _QUESTION_TOKENS,
        "batch.global_rows": 8,
        "batch.micro_rows": 4,
        "batch.accumulation": 0,
        "train.steps": of.steps,
        "schedule.kind": "cosine",
        "schedule.warmup_steps": 50,
        "schedule.decay_steps": 0,
        "schedule.min_ratio": 0.02,
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.05,
    }
