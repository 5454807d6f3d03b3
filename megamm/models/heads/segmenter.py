"""Instances of a picture, pixel by pixel: a class for each, and whether it lies inside its instance, which keeps neighbours apart.

Legend: D documents, R, C rows and columns of cells, W width of states, H width inside, h, w pixels, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from megamm.config import Head
from megamm.core.geometry import PictureView
from megamm.core.masks import run_lengths
from megamm.core.predictions import Instance
from megamm.models.heads.states import States
from megamm.models.heads.targets import Targets

_IGNORED = -100
_INSIDE = 0.5


class SegmenterHead(nn.Module):
    """States on their grid, made twice as fine by each stage of a convolution, then scores a pixel.

    What lies beside a picture on the padded grid stays zero behind every stage, so that a picture's answer does not depend on others.
    """

    def __init__(self, settings: Head, width: int):
        super().__init__()
        self.labels = settings.labels
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, settings.hidden_size)
        self.stages = nn.ModuleList(_Stage(settings.hidden_size) for _ in range(settings.num_layers))
        self.classify = nn.Linear(settings.hidden_size, len(settings.labels) + 2)

    def forward(self, *, states: States) -> dict[str, torch.Tensor]:
        """`pixels` float[D, h, w, 1 + L + 1]: no instance, the labels, and whether it is inside; `mask` bool[D, h, w]."""
        maps, mask = states.maps()
        hidden = self.project(self.norm(maps)) * mask[..., None]
        for stage in self.stages:
            hidden, mask = (one.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) for one in (hidden, mask))
            hidden = stage(hidden) * mask[..., None]
        return {"pixels": self.classify(hidden), "mask": mask}

    def loss(self, logits: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """float32[D]: sums over pixels of the cross-entropies of class and inside."""
        pixels = logits["pixels"].float()
        classes = torch.full(pixels.shape[:3], _IGNORED, device=pixels.device)
        inside = pixels.new_zeros(pixels.shape[:3])
        for number, one in enumerate(targets.pixels):
            rows, columns = one.shape[1:]
            classes[number, :rows, :columns], inside[number, :rows, :columns] = one[0], one[1].float()
        entropies = F.cross_entropy(pixels[..., :-1].permute(0, 3, 1, 2), classes, ignore_index=_IGNORED, reduction="none")
        borders = F.binary_cross_entropy_with_logits(pixels[..., -1], inside, reduction="none") * (classes != _IGNORED)
        return (entropies + borders).sum((1, 2)) * targets.scales[0]

    def decode(self, logits: dict[str, torch.Tensor], views: Sequence[PictureView | None]) -> list[tuple[Instance, ...]]:
        """Instances of each picture over its source pixels."""
        pixels = logits["pixels"].detach().float()
        chances = torch.cat([pixels[..., :-1].softmax(-1), pixels[..., -1:].sigmoid()], dim=-1).cpu().numpy()
        found = []
        for one, mask, view in zip(chances, logits["mask"].cpu().numpy(), views, strict=True):
            assert view is not None, "a segmenter saw a picture"
            rows, columns = mask.any(1).sum(), mask.any(0).sum()
            found.append(_instances(one[:rows, :columns], self.labels, view))
        return found


class _Stage(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.mix = nn.Conv2d(size, size, 3, padding=1)
        self.norm = nn.LayerNorm(size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return hidden + F.gelu(self.norm(mixed))


def split_instances(is_set: np.ndarray, is_inner: np.ndarray) -> tuple[np.ndarray, int]:
    """int[h, w], the value k where instance k is, and how many there are.

    Connected inner pixels are the seed of an instance, and every other pixel goes to the nearest seed; a connected piece without a
    seed is an instance of its own.

    Args:
        is_set: bool[h, w], pixels of any instance.
        is_inner: bool[h, w], pixels away from the border of theirs.
    """
    from scipy import ndimage

    seeds, num_seeds = ndimage.label(is_set & is_inner)
    pieces, num_pieces = ndimage.label(is_set)
    has_seed = np.zeros(num_pieces + 1, dtype=bool)
    has_seed[pieces[seeds > 0]] = True
    for piece in range(1, num_pieces + 1):
        if not has_seed[piece]:
            num_seeds += 1
            seeds[pieces == piece] = num_seeds
    if not num_seeds:
        return seeds, 0
    rows, columns = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    return np.where(is_set, seeds[rows, columns], 0), num_seeds


def _instances(chances: np.ndarray, labels: Sequence[str], view: PictureView) -> tuple[Instance, ...]:
    """Of float32[h, w, 1 + L + 1] probabilities."""
    classes = chances[..., :-1]
    numbers, num = split_instances(classes.argmax(-1) > 0, chances[..., -1] > _INSIDE)
    source = _over_source(numbers, view)
    found = []
    for number in range(1, num + 1):
        pixels = source == number
        # Finer than the source's pixels, an instance may lie between their middles.
        if pixels.any():
            mean = classes[numbers == number].mean(0)
            label = int(mean[1:].argmax())
            found.append(Instance(labels[label], (view.height, view.width), run_lengths(pixels), float(mean[1 + label])))
    return tuple(sorted(found, key=lambda instance: -instance.score))


def _over_source(values: np.ndarray, view: PictureView) -> np.ndarray:
    """int[H, W]: the value of the cell under the middle of each source pixel, 0 outside the view."""
    ys, xs = np.meshgrid(np.arange(view.height) + 0.5, np.arange(view.width) + 0.5, indexing="ij")
    to = view.to_view
    columns = np.floor((to.a * xs + to.b * ys + to.c) * values.shape[1]).astype(np.int64)
    rows = np.floor((to.d * xs + to.e * ys + to.f) * values.shape[0]).astype(np.int64)
    is_seen = (columns >= 0) & (columns < values.shape[1]) & (rows >= 0) & (rows < values.shape[0])
    return np.where(is_seen, values[rows.clip(0, values.shape[0] - 1), columns.clip(0, values.shape[1] - 1)], 0)
