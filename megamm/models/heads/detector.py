"""Labelled boxes of a picture: queries that look at its states, matched with the boxes that are there.

Legend: D documents, T states of one, W their width, Q queries, H width inside, L labels.

Source: Carion et al. 2020, DETR; queries begin at fixed places as in Wang et al. 2022, Anchor DETR. Matching is transformers', and over one
batch the loss equals its `ForObjectDetectionLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from megamm.config import Head
from megamm.core.geometry import PictureView
from megamm.core.predictions import Box
from megamm.models.heads.states import States
from megamm.models.heads.targets import Targets

_BOX_COST, _OVERLAP_COST = 5.0, 2.0
_LEAST_SCORE = 0.05


class DetectorHead(nn.Module):
    """Queries attend to each other and to the picture's states, then each says a label, or none, and a box."""

    def __init__(self, settings: Head, width: int):
        super().__init__()
        size = settings.hidden_size
        self.labels, self.num_queries, self.no_object_weight = settings.labels, settings.num_queries, settings.no_object_weight
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, size)
        self.queries, self.query_norm = nn.Embedding(settings.num_queries, size), nn.LayerNorm(size)
        self.layers = nn.ModuleList(_Layer(size, settings.num_heads) for _ in range(settings.num_layers))
        self.last_norm = nn.LayerNorm(size)
        self.classify = nn.Linear(size, len(settings.labels) + 1)
        self.place = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 4))

    def forward(self, *, states: States) -> dict[str, torch.Tensor]:
        """`labels` float[D, Q, L + 1], none last; `boxes` float32[D, Q, 4], centre and size in shares of the view."""
        pictures = self.project(self.norm(states.values))
        keys = pictures + position_code(_cell_middles(states), pictures.shape[-1]).to(pictures.dtype)
        begin = anchors(self.num_queries, pictures.device)
        queries = self.query_norm(self.queries(torch.arange(self.num_queries, device=pictures.device)))
        queries = queries + position_code(begin[:, :2], pictures.shape[-1]).to(pictures.dtype)
        hidden = queries.expand(len(pictures), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, keys, pictures, states.mask)
        hidden = self.last_norm(hidden)
        return {"labels": self.classify(hidden), "boxes": (self.place(hidden).float() + begin.logit()).sigmoid()}

    def loss(self, logits: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """float32[D]: cross-entropy of the queries' labels, and distance and overlap of matched boxes; not finite where logits are not."""
        labels, boxes = logits["labels"].float(), logits["boxes"]
        if not bool(labels.isfinite().all() & boxes.isfinite().all()):
            # Matching refuses what is no number; a loss that is none leaves the weights as they are.
            return labels.sum((1, 2)) + boxes.sum((1, 2))
        matched = _match(labels, boxes, targets)
        wanted = torch.full(labels.shape[:2], len(self.labels), device=labels.device)
        distances = []
        for number, (queries, found) in enumerate(matched):
            wanted[number, queries] = targets.ids[number][found]
            distances.append(_distance(boxes[number, queries], targets.boxes[number][found]))
        weights = torch.ones(len(self.labels) + 1, device=labels.device)
        weights[-1] = self.no_object_weight
        entropies = F.cross_entropy(labels.transpose(1, 2), wanted, weights, reduction="none").sum(1)
        return entropies * targets.scales[0] + torch.stack(distances) * targets.scales[1]

    def decode(self, logits: dict[str, torch.Tensor], views: Sequence[PictureView | None]) -> list[tuple[Box, ...]]:
        """Boxes of each picture in its source pixels, the surest first."""
        scores, numbers = logits["labels"].float().softmax(-1)[..., :-1].max(-1)
        corners = corners_of(logits["boxes"])
        return [_boxes(self.labels, *one) for one in zip(scores.tolist(), numbers.tolist(), corners.tolist(), views, strict=True)]


class _Layer(nn.Module):
    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.own_norm, self.own = nn.LayerNorm(size), _Attention(size, num_heads)
        self.cross_norm, self.cross = nn.LayerNorm(size), _Attention(size, num_heads)
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        own = self.own_norm(hidden)
        hidden = hidden + self.own(own, own, own)
        hidden = hidden + self.cross(self.cross_norm(hidden), keys, values, mask[:, None, None])
        return hidden + self.mlp(self.mlp_norm(hidden))


class _Attention(nn.Module):
    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        projected = (layer(one) for layer, one in ((self.query, queries), (self.key, keys), (self.value, values)))
        q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in projected)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def position_code(points: torch.Tensor, size: int) -> torch.Tensor:
    """float32[..., size]: sines and cosines of points float[..., 2] in shares, from a quarter of a wave over the view to eight.

    Shorter waves would be noise on the few cells of a picture, and slowed learning down where it was tried.
    """
    frequencies = 2 * math.pi * torch.logspace(-2, 3, size // 4, base=2, device=points.device)
    angles = (points.float()[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def anchors(num: int, device: torch.device) -> torch.Tensor:
    """float32[num, 4]: boxes spread evenly over the view, as centre and size."""
    side = math.ceil(math.sqrt(num))
    number = torch.arange(num, device=device)
    rows = math.ceil(num / side)
    size = torch.full((num,), 1 / (side + 1), device=device)
    return torch.stack([(number % side + 0.5) / side, (number // side + 0.5) / rows, size, size], dim=-1)


def corners_of(boxes: torch.Tensor) -> torch.Tensor:
    """float[..., 4] as left, top, right, bottom from centre and size."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def _cell_middles(states: States) -> torch.Tensor:
    """float32[D, T, 2]: x and y of each state's cell in shares of the view."""
    assert states.grids is not None, "a detector looks at a picture"
    number = torch.arange(states.values.shape[1], device=states.values.device)
    middles = [
        torch.stack([(number % columns + 0.5) / columns, (number // columns + 0.5) / rows], dim=-1) for rows, columns in states.grids
    ]
    return torch.stack(middles)


def _match(labels: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each document the numbers of queries and of the boxes that they are to find."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    # Made here, because ZeRO-3 follows every submodule that runs, and this one runs only where there are documents.
    match = HungarianMatcher(class_cost=1.0, bbox_cost=_BOX_COST, giou_cost=_OVERLAP_COST)
    wanted = [{"class_labels": ids, "boxes": one} for ids, one in zip(targets.ids, targets.boxes, strict=True)]
    pairs = match({"logits": labels.detach(), "pred_boxes": boxes.detach()}, wanted)
    return [(queries.to(labels.device), found.to(labels.device)) for queries, found in pairs]


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Scalar: over pairs of boxes, the weighted sum of L1 distances and of 1 - generalised overlap."""
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    overlaps = generalized_box_iou(corners_of(found), corners_of(wanted)).diagonal()
    return _BOX_COST * (found - wanted).abs().sum() + _OVERLAP_COST * (1 - overlaps).sum()


def _boxes(
    labels: Sequence[str], scores: list[float], numbers: list[int], corners: list[list[float]], view: PictureView | None
) -> tuple[Box, ...]:
    assert view is not None, "a detector saw a picture"
    found = []
    for score, number, (left, top, right, bottom) in zip(scores, numbers, corners, strict=True):
        (x1, y1), (x2, y2) = (view.source((min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0))) for x, y in ((left, top), (right, bottom)))
        xyxy = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        if score >= _LEAST_SCORE and xyxy[0] < xyxy[2] and xyxy[1] < xyxy[3]:
            found.append(Box(labels[number], xyxy, score))
    return tuple(sorted(found, key=lambda box: -box.score))
