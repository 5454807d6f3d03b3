"""Labelled boxes of a picture: queries that look at its states, matched with the boxes that are there.

Legend: D documents, Q queries, L labels.

Source: Carion et al. 2020, DETR. Matching is transformers', and over one batch the loss equals its `ForObjectDetectionLoss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from megamm.config import Head
from megamm.core.geometry import PictureView
from megamm.core.predictions import Box
from megamm.models.heads.queries import CellQueries, LearnedQueries
from megamm.models.heads.states import States
from megamm.models.heads.targets import Targets

_BOX_COST, _OVERLAP_COST = 5.0, 2.0
_LEAST_SCORE = 0.05


class DetectorHead(nn.Module):
    """Queries look at the picture's states, then each says a label, or none, and a box."""

    def __init__(self, settings: Head, width: int):
        super().__init__()
        size = settings.hidden_size
        self.labels, self.no_object_weight = settings.labels, settings.no_object_weight
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, size)
        self.queries = LearnedQueries(settings) if settings.queries == "learned" else CellQueries(settings)
        self.last_norm = nn.LayerNorm(size)
        self.classify = nn.Linear(size, len(settings.labels) + 1)
        self.place = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 4))

    def forward(self, *, states: States) -> dict[str, torch.Tensor]:
        """`labels` float[D, Q, L + 1], none last; `boxes` float32[D, Q, 4], centre and size in shares of the view; `mask` bool[D, Q]."""
        hidden, begin, mask = self.queries(self.project(self.norm(states.values)), states)
        hidden = self.last_norm(hidden)
        return {"labels": self.classify(hidden), "boxes": (self.place(hidden).float() + begin.logit()).sigmoid(), "mask": mask}

    def loss(self, logits: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """float32[D]: cross-entropy of the queries' labels, and distance and overlap of matched boxes; not finite where logits are not."""
        labels, boxes, mask = logits["labels"].float(), logits["boxes"], logits["mask"]
        if not bool(labels.isfinite().all() & boxes.isfinite().all()):
            # Matching refuses what is no number; a loss that is none leaves the weights as they are.
            return labels.sum((1, 2)) + boxes.sum((1, 2))
        wanted = torch.full(labels.shape[:2], len(self.labels), device=labels.device)
        distances = []
        for number, num_queries in enumerate(mask.sum(1).tolist()):
            queries, found = _match(labels[number, :num_queries], boxes[number, :num_queries], targets, number)
            wanted[number, queries] = targets.ids[number][found]
            distances.append(_distance(boxes[number, queries], targets.boxes[number][found]))
        weights = torch.ones(len(self.labels) + 1, device=labels.device)
        weights[-1] = self.no_object_weight
        entropies = (F.cross_entropy(labels.transpose(1, 2), wanted, weights, reduction="none") * mask).sum(1)
        return entropies * targets.scales[0] + torch.stack(distances) * targets.scales[1]

    def decode(self, logits: dict[str, torch.Tensor], views: Sequence[PictureView | None]) -> list[tuple[Box, ...]]:
        """Boxes of each picture in its source pixels, the surest first."""
        scores, numbers = logits["labels"].float().softmax(-1)[..., :-1].max(-1)
        scores, corners = scores * logits["mask"], corners_of(logits["boxes"])
        return [_boxes(self.labels, *one) for one in zip(scores.tolist(), numbers.tolist(), corners.tolist(), views, strict=True)]


def corners_of(boxes: torch.Tensor) -> torch.Tensor:
    """float[..., 4] as left, top, right, bottom from centre and size."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def _match(labels: torch.Tensor, boxes: torch.Tensor, targets: Targets, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of a document's queries and of the boxes that they are to find."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    # Made here, because ZeRO-3 follows every submodule that runs, and this one runs only where there are documents.
    match = HungarianMatcher(class_cost=1.0, bbox_cost=_BOX_COST, giou_cost=_OVERLAP_COST)
    wanted = [{"class_labels": targets.ids[number], "boxes": targets.boxes[number]}]
    ((queries, found),) = match({"logits": labels.detach()[None], "pred_boxes": boxes.detach()[None]}, wanted)
    return queries.to(labels.device), found.to(labels.device)


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
