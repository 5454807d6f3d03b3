"""From a collated micro-batch to the arguments of the model's forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megamm.core.types import Batch
from megamm.models.heads.targets import Targets


def batch_inputs(batch: Batch, device: torch.device, dtype: torch.dtype, head_scales: Sequence[float] = ()) -> dict[str, Any]:
    """Forward arguments of a micro-batch on `device`.

    Args:
        batch: One micro-batch of one rank.
        device: Where the model is.
        dtype: Type of pictures and sounds: the model's. Loss weights stay float32.
        head_scales: `Targets.scales` of the global batch, where a head answers.

    Returns:
        Keyword arguments of `MegaMMForConditionalGeneration.forward`. Media that the batch lacks are left out.
    """

    def move(array: np.ndarray, kind: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device=device, dtype=kind, non_blocking=True)

    inputs: dict[str, Any] = {
        "input_ids": move(batch.input_ids),
        "position_ids": move(batch.position_ids),
        "labels": move(batch.labels),
        "weights": move(batch.weights),
        "document_lengths": batch.document_lengths,
        "num_padding": batch.num_padding,
        "use_cache": False,
    }
    if batch.pixels is not None:
        inputs["pixel_values"] = move(batch.pixels, dtype)
        if batch.pixel_mask is not None:
            inputs["pixel_attention_mask"] = move(batch.pixel_mask)
            inputs["spatial_shapes"] = torch.from_numpy(batch.image_grids)
    if batch.mel is not None:
        inputs["input_features"] = move(batch.mel, dtype)
        inputs["input_features_mask"] = move(batch.mel_mask)
    if batch.head is not None:
        inputs |= {"run_head": True, "head_targets": Targets.of(batch.head, head_scales, device)}
    return inputs
