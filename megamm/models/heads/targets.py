"""Targets of a micro-batch as tensors, split by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamm.core.types import HeadTargets, HiddenCells


@dataclass(frozen=True, slots=True)
class Hidden:
    """What is hidden of pictures or sounds. Legend: n cells, v values of one.

    Attributes:
        numbers: int64[n], among all cells of the micro-batch.
        values: float32[n, v], what was there; not a number past the end of a sound.
        documents: int64[n], whose they are.
    """

    numbers: torch.Tensor
    values: torch.Tensor
    documents: torch.Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """What a head is to answer. Legend: D documents, n labels of one, h, w its pixels.

    Attributes:
        weights: float32[D].
        ids: int64[n] of each document.
        boxes: float32[n, 4] of each document, centre and size in shares of the view.
        pixels: int64[2, h, w] of each document: classes with 0 for none, and whether the pixel is inside its instance.
        scales: What each part of a document's loss is multiplied by, so that the weighted mean over the documents of the global batch
            is the head's loss over that batch: Σ weights / a global count.
        pictures: What is hidden of them; None where nothing is.
        sounds: Likewise.
    """

    weights: torch.Tensor
    ids: list[torch.Tensor]
    boxes: list[torch.Tensor]
    pixels: list[torch.Tensor]
    scales: tuple[float, ...]
    pictures: Hidden | None = None
    sounds: Hidden | None = None

    @classmethod
    def of(cls, targets: HeadTargets, scales: Sequence[float], device: torch.device) -> Targets:
        """Move targets to `device`."""

        def move(array) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        def hide(cells: HiddenCells | None) -> Hidden | None:
            return None if cells is None else Hidden(move(cells.numbers), move(cells.values), move(cells.documents))

        num_ids, grids = targets.num_ids.tolist(), targets.grids.tolist()
        pixels = move(targets.pixels).long().split([rows * columns for rows, columns in grids], dim=1)
        return cls(
            weights=move(targets.weights),
            ids=list(move(targets.ids).split(num_ids)),
            boxes=list(move(targets.boxes).split(num_ids if len(targets.boxes) else [0] * len(num_ids))),
            pixels=[one.view(2, rows, columns) for one, (rows, columns) in zip(pixels, grids, strict=True)],
            scales=tuple(scales),
            pictures=hide(targets.pictures),
            sounds=hide(targets.sounds),
        )


def loss_scales(weight_sum: float, counts: Sequence[float]) -> tuple[float, ...]:
    """`Targets.scales` of a global batch.

    Args:
        weight_sum: Σ weights over its documents.
        counts: Σ weight x count over its documents, for each count; where nothing is counted, there is no loss to scale.
    """
    return tuple(weight_sum / (count or 1.0) for count in counts)
