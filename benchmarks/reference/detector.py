"""The detector head of the reference run: what it changes of a recipe, to learn boxes from 205 pictures in a quarter of an hour."""

from __future__ import annotations

from typing import Any

from megamm.config import Recipe
from megamm.core.errors import ConfigError

AUGMENT = {
    "image_flip": True,
    "image_crop": 0.4,
    "image_stretch": 0.1,
    "image_brightness": 0.15,
    "image_contrast": 0.15,
    "image_hue": 0.02,
}
"""How its training pictures are changed."""
_HEAD = {
    "kind": "detector",
    "labels": ["Platelets", "RBC", "WBC"],
    "states": "vision",
    "queries": "cells",
    "num_layers": 2,
    "lr_scale": 2.0,
}
_QUESTION_TOKENS = 48


def detector_overrides(recipe: Recipe) -> dict[str, Any]:
    """Values of a recipe's keys that put a detector on its vision tower, beside its data.

    Each cell asks for the box whose middle it is (`docs/heads.md`). A row holds one picture, so that a step is eight of them whatever the
    recipe packs: few pictures want many small steps. The decoder does not lead to the head, and stays as it is.

    Raises:
        ConfigError: The recipe has no vision tower.
    """
    if recipe.model.vision is None:
        raise ConfigError(f"recipe {recipe.name} has no vision tower; a detector needs model.vision")
    features = recipe.model.image_features
    return {
        "model.head": _HEAD,
        "model.text.trainable": False,
        "data.row_patches": features.max_patches,
        "batch.row_tokens": features.max_patches // features.merge**2 + _QUESTION_TOKENS,
        "batch.global_rows": 8,
        "batch.micro_rows": 4,
        "batch.accumulation": 0,
        "train.steps": 900,
        "schedule.kind": "cosine",
        "schedule.warmup_steps": 50,
        "schedule.decay_steps": 0,
        "schedule.min_ratio": 0.02,
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.05,
    }
