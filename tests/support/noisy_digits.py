"""A tiny run that reads one handwritten digit anywhere in a picture of noise, trained in seconds.

`python -m tests.support.noisy_digits FOLDER` draws the pictures of docs/explain.md into a folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from megamm.cli import main
from megamm.config import Engine, Recipe, to_dict
from megamm.config.schema import ImageFeatures, Model, Tower, Training
from megamm.core.files import write_json
from megamm.core.types import Message, Part
from megamm.inference.load import run_config
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.tasks import template
from tests.support.checkpoints import write_checkpoint
from tests.support.tiny_run import TOKENIZER, tokenizer

QUESTION = "What digit is this?"
DIGITS = (0, 1, 2, 3)
SIDE, DIGIT_SIDE, PATCH = 40, 16, 8
"""Pixels of a picture's side, of its digit's side, and of a patch's: 25 patches, 4 of them the digit's."""

_NUM_STEPS, _BATCH, _LR = 300, 32, 3e-3
_NOISE = 0.5
_EXAMPLE = 3
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def noisy_digits(count: int, *, seed: int, held_out: bool = False) -> tuple[np.ndarray, list[int], list[tuple[int, int, int, int]]]:
    """Pictures uint8[count, SIDE, SIDE] with their digits and the digits' boxes (left, top, right, bottom)."""
    scans = _scans()
    chosen = np.flatnonzero(np.isin(scans.target, DIGITS) & ((np.arange(len(scans.target)) % 5 == 0) == held_out))
    random = np.random.default_rng(seed)
    pictures = random.uniform(0, _NOISE, (count, SIDE, SIDE))
    labels, boxes = [], []
    for picture in pictures:
        scan = random.choice(chosen)
        left, top = (int(one) for one in PATCH * random.integers(0, (SIDE - DIGIT_SIDE) // PATCH + 1, 2))
        place = picture[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE]
        np.maximum(place, scans.images[scan].repeat(2, 0).repeat(2, 1) / 16, out=place)
        labels.append(int(scans.target[scan]))
        boxes.append((left, top, left + DIGIT_SIDE, top + DIGIT_SIDE))
    return np.rint(pictures * 255).astype(np.uint8), labels, boxes


def train_run(run: Path) -> Path:
    """Write a run whose checkpoint holds a model that answers `QUESTION` about such pictures."""
    pieces = tokenizer(run / "tokenizer")
    engine = Engine(precision="fp32")
    recipe = Recipe(name="noisy-digits", model=_model(), tokenizer=TOKENIZER, engine=engine, train=Training(steps=_NUM_STEPS))
    write_json(run / "config.json", to_dict(recipe))
    torch.manual_seed(0)
    model = MegaMMForConditionalGeneration(run_config(recipe, pieces.vocabulary))
    message = Message("user", (Part("image", member="0.png"), Part("text", text=QUESTION)))
    ids = torch.from_numpy(template.prompt([message], pieces, image_tokens=[(SIDE // PATCH) ** 2])).long()
    answers = torch.tensor([pieces.encode(str(digit))[-1] for digit in range(10)])
    end = torch.tensor(pieces.vocabulary.control_id("end"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_NUM_STEPS, pct_start=0.1)
    for step in range(_NUM_STEPS):
        pictures, labels, _ = noisy_digits(_BATCH, seed=step)
        wanted = torch.stack([answers[labels], end.expand(_BATCH)], dim=1)
        input_ids = torch.cat([ids.expand(_BATCH, -1), wanted[:, :1]], dim=1)
        logits = model(input_ids=input_ids, **_tower_input(pictures), logits_to_keep=2, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    write_checkpoint(run / "checkpoints", _NUM_STEPS, {name: value.detach() for name, value in model.named_parameters()}, buffers={})
    return run


def write_picture(picture: np.ndarray, path: Path) -> Path:
    """A picture as a file."""
    Image.fromarray(picture).save(path)
    return path


@cache
def _scans() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()


def _model() -> Model:
    decoder = {**_TOWER, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "rope_theta": 10000.0}
    vision = {**_TOWER, "patch_size": PATCH, "num_patches": (SIDE // PATCH) ** 2}
    return Model(
        text=Tower(type="qwen3", config=decoder),
        vision=Tower(type="siglip2_vision_model", config=vision),
        image_features=ImageFeatures(patch_size=PATCH, max_patches=(SIDE // PATCH) ** 2),
    )


def _tower_input(pictures: np.ndarray) -> dict[str, torch.Tensor]:
    """What `image_input` makes of grey pictures, all at once."""
    count, grid = len(pictures), SIDE // PATCH
    cells = pictures.reshape(count, grid, PATCH, grid, PATCH).transpose(0, 1, 3, 2, 4).reshape(count, grid * grid, PATCH * PATCH)
    pixels = torch.from_numpy(cells.repeat(3, axis=2)).float() / 127.5 - 1
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(count, grid * grid, dtype=torch.long),
        "spatial_shapes": torch.full((count, 2), grid),
    }


def _draw_examples(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run = train_run(Path(scratch) / "run")
        pictures, _, _ = noisy_digits(4, seed=1234, held_out=True)
        shown = write_picture(pictures[_EXAMPLE], Path(scratch) / "noise.png")
        for method in ("integrated", "rollout"):
            output = Path(scratch) / method
            words = ["explain", str(run), "--image", str(shown), "--text", QUESTION, "--method", method, "--output", str(output)]
            if main(words):
                raise SystemExit(f"`megamm {' '.join(words)}` failed")
            shutil.copy(output / "image_0.png", folder / f"explain_{method}.png")


if __name__ == "__main__":
    _draw_examples(Path(sys.argv[1]))
