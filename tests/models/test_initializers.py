"""From its initial values on, what a model makes of pictures and sounds differs by what they show and say."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megamm.config import load_recipe
from megamm.config.schema import AudioFeatures
from megamm.data.media.decode import log_mel
from megamm.engine.weights import initialize_weights, run_initializers
from megamm.models.build import build_model, config_from_recipe
from megamm.models.initializers import initializers
from megamm.tokenizers.vocabulary import CONTROL_NAMES

NUM = 24
GRID, PATCH = 16, 12
FRAMES = 100


@pytest.fixture(scope="module")
def models():
    """The model of recipe `reference` as its classes begin it, and as training does."""
    control_ids = {name: number for number, name in enumerate(CONTROL_NAMES)}
    recipe = load_recipe("reference", ["--model.audio_features.normalize=none"])
    stock, ours = (build_model(config_from_recipe(recipe.model, vocab_size=256, control_ids=control_ids), None).eval() for _ in range(2))
    for model in (stock, ours):
        initialize_weights(model, 5)
    run_initializers(initializers(ours), 5)
    return stock, ours


def pictures() -> torch.Tensor:
    """Bright pictures with a dark square somewhere, as patches."""
    random = np.random.default_rng(0)
    values = np.full((NUM, GRID * PATCH, GRID * PATCH, 3), 0.6, dtype=np.float32) + random.normal(0, 0.02, (NUM, 1, 1, 3)).astype(
        np.float32
    )
    for picture in values:
        top, left = random.integers(0, GRID * PATCH - 40, 2)
        picture[top : top + 40, left : left + 40] = random.uniform(-0.9, 0.0, 3)
    patches = values.reshape(NUM, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return torch.from_numpy(patches.reshape(NUM, GRID * GRID, PATCH * PATCH * 3))


def sounds() -> torch.Tensor:
    """Noise through two resonances that glide: float32[NUM, mel, FRAMES]."""
    random = np.random.default_rng(0)
    time = np.arange(FRAMES * 160) / 16000
    waves = []
    for _ in range(NUM):
        starts, ends = random.uniform(200, 4000, (2, 2))
        tones = sum(np.sin(2 * np.pi * (start + (end - start) * time) * time) for start, end in zip(starts, ends, strict=True))
        waves.append((tones + 0.1 * random.standard_normal(len(time))).astype(np.float32))
    return torch.from_numpy(np.stack([log_mel(wave, AudioFeatures(num_mel=64)) for wave in waves]))


def shares(features: torch.Tensor) -> tuple[float, float]:
    """Of features[sample, place, channel]: the shares of their power that are common to no two samples, and that mark the place."""
    common = features.mean(dim=(0, 1))
    of_place = features.mean(dim=0)
    power = features.square().sum(-1).mean()
    return float((features - of_place).square().sum(-1).mean() / power), float((of_place - common).square().sum(-1).mean() / power)


@torch.no_grad()
def seen(model) -> torch.Tensor:
    grids, mask = torch.full((NUM, 2), GRID), torch.ones(NUM, GRID * GRID, dtype=torch.int64)
    return model.model.vision_tower(pixel_values=pictures(), pixel_attention_mask=mask, spatial_shapes=grids).last_hidden_state


@torch.no_grad()
def heard(model) -> torch.Tensor:
    mel = sounds()
    hidden = model.model.audio_tower(input_features=mel, input_features_mask=torch.ones(NUM, FRAMES, dtype=torch.int64)).last_hidden_state
    return hidden.reshape(NUM, -1, hidden.shape[-1])


def test_sounds_differ_by_what_they_say(models):
    stock, ours = (shares(heard(model))[0] for model in models)
    print(f"\nbetween sounds: {stock:.5f} of the power by the class's own values, {ours:.3f} by ours")
    assert stock < 0.005 and ours > 0.05


def test_pictures_differ_by_what_they_show_and_where(models):
    (stock, stock_place), (ours, our_place) = (shares(seen(model)) for model in models)
    print(f"\nbetween pictures: {stock:.4f}, {ours:.4f}; between places: {stock_place:.4f}, {our_place:.4f}")
    assert ours > 2 * stock and our_place > 10 * stock_place


def test_only_the_towers_that_are_named_begin_otherwise(models):
    _, ours = models
    config = copy.deepcopy(ours.config)
    config.vision_config.model_type = "clip_vision_model"
    found = {name.split(".")[1] for name, _, _ in initializers(SimpleNamespace(config=config, named_parameters=ours.named_parameters))}
    assert found == {"audio_tower"}


def test_the_same_seed_begins_the_same_and_only_the_towers_change(models):
    stock, ours = models
    again = build_model(ours.config, None)
    initialize_weights(again, 5)
    run_initializers(initializers(again), 5)
    for (name, one), other in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    changed = {name for (name, one), other in zip(ours.named_parameters(), stock.parameters(), strict=True) if not torch.equal(one, other)}
    assert changed == {name for name, _, _ in initializers(ours)} and not any(name.startswith("model.language_model") for name in changed)
