"""Labels of a sample from its pooled states: one by softmax, or any number by sigmoid.

Legend: D documents, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from megamm.config import Head
from megamm.core.geometry import PictureView
from megamm.core.predictions import LabelScore
from megamm.models.heads.states import States
from megamm.models.heads.targets import Targets


class LinearHead(nn.Module):
    """A norm on each document's one pooled state, as many hidden layers as the recipe says, one linear layer."""

    def __init__(self, settings: Head, width: int):
        super().__init__()
        self.labels, self.multi_label = settings.labels, settings.multi_label
        self.norm = nn.LayerNorm(width)
        widths = [width, *[settings.hidden_size] * settings.hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(one, after) for one, after in pairwise(widths))
        self.classify = nn.Linear(widths[-1], len(settings.labels))

    def forward(self, *, states: States) -> dict[str, torch.Tensor]:
        """`labels` float[D, L], from one state of each document."""
        hidden = self.norm(states.values.squeeze(1))
        for layer in self.hidden:
            hidden = F.gelu(layer(hidden))
        return {"labels": self.classify(hidden)}

    def loss(self, logits: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """float32[D]: cross-entropy of the label, or the mean over labels of the binary cross-entropies."""
        logits_DL = logits["labels"].float()
        if not self.multi_label:
            return F.cross_entropy(logits_DL, torch.cat(targets.ids), reduction="none") * targets.scales[0]
        wanted = torch.zeros_like(logits_DL)
        for number, ids in enumerate(targets.ids):
            wanted[number, ids] = 1
        return F.binary_cross_entropy_with_logits(logits_DL, wanted, reduction="none").mean(1) * targets.scales[0]

    def decode(self, logits: dict[str, torch.Tensor], views: Sequence[PictureView | None]) -> list[tuple[LabelScore, ...]]:
        """Every label of each document with its probability, the likeliest first."""
        scores_DL = logits["labels"].float()
        scores_DL = scores_DL.sigmoid() if self.multi_label else scores_DL.softmax(-1)
        named = [[LabelScore(label, score) for label, score in zip(self.labels, scores, strict=True)] for scores in scores_DL.tolist()]
        return [tuple(sorted(one, key=lambda label: -label.score)) for one in named]
