"""A tiny run that reads one handwritten digit anywhere in a picture of noise, trained in seconds.

`python -m tests.support.noisy_digits FOLDER` measures the table of docs/explain.md and draws its pictures into a folder.
"""

from __future__ import annotations

import dataclasses
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
from megamm.inference.explain import METHODS, Explanation, explain, read_question
from megamm.inference.load import Loaded, load_model, run_config
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
_EXAMPLE, _NUM_MEASURED = 3, 40
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


def share_inside(explanation: Explanation, box: tuple[int, int, int, int]) -> float:
    """Of all that speaks for the answer in a picture, what lies inside a box of source pixels."""
    left, top, right, bottom = box
    patches = [(one.xyxy, max(0.0, one.score)) for one in explanation.pictures[0].patches]
    inside = sum(one for (x1, y1, x2, y2), one in patches if x1 >= left and y1 >= top and x2 <= right and y2 <= bottom)
    return inside / sum(one for _, one in patches)


def untrained(loaded: Loaded) -> Loaded:
    """The same model with random weights."""
    torch.manual_seed(0)
    return dataclasses.replace(loaded, model=MegaMMForConditionalGeneration(loaded.model.config).eval())


def _measure(run: Path, scratch: Path) -> None:
    loaded = load_model(run, dtype=torch.float32)
    pictures, labels, boxes = noisy_digits(_NUM_MEASURED, seed=1234, held_out=True)
    asked = [
        read_question(loaded, QUESTION, images=[write_picture(picture, scratch / f"{number}.png")])
        for number, picture in enumerate(pictures)
    ]
    for name, model, method in [*((one, loaded, one) for one in METHODS), ("rollout, untrained", untrained(loaded), "rollout")]:
        answer = None if model is loaded else "1"
        found = [explain(model, one, answer=answer, method=method) for one in asked]
        shares = [share_inside(one, box) for one, box in zip(found, boxes, strict=True)]
        right = np.mean([one.answer.text == str(label) for one, label in zip(found, labels, strict=True)])
        print(f"{name:20} mean {np.mean(shares):.3f}  least {min(shares):.3f}  answers right {right:.3f}", flush=True)


def _draw(run: Path, scratch: Path, folder: Path) -> None:
    pictures, _, _ = noisy_digits(_EXAMPLE + 1, seed=1234, held_out=True)
    shown = write_picture(pictures[_EXAMPLE], scratch / "noise.png")
    for method in ("integrated", "rollout"):
        words = ["explain", str(run), "--image", str(shown), "--text", QUESTION, "--method", method, "--output", str(scratch / method)]
        if main(words):
            raise SystemExit(f"`megamm {' '.join(words)}` failed")
        shutil.copy(scratch / method / "image_0.png", folder / f"explain_{method}.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        trained = train_run(Path(name) / "run")
        _draw(trained, Path(name), Path(sys.argv[1]))
        _measure(trained, Path(name))
