"""Activation checkpointing of decoder and towers: which blocks recompute their activations in the backward."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_EVERY = {"full": 1, "selective": 2}


def set_activation_checkpointing(model: nn.Module, mode: Literal["none", "selective", "full"]) -> int:
    """Choose the blocks that keep only their input and are recomputed in the backward.

    The blocks' own switches are set instead of calling `gradient_checkpointing_enable`, which besides makes embeddings
    require gradients, so that frozen towers would run a backward that nobody reads. Convolutional towers have no such
    blocks and keep their activations.

    Args:
        model: The composed model; every stack of blocks in it is counted from its own start.
        mode: `none`, `selective` (the first and then every second block of a stack) or `full` (every block).

    Returns:
        How many blocks are recomputed.
    """
    recompute = partial(checkpoint, use_reentrant=False)
    num_recomputed = 0
    for stack in model.modules():
        blocks = [child for child in stack.children() if isinstance(child, GradientCheckpointingLayer)]
        for index, block in enumerate(blocks):
            block.gradient_checkpointing = mode != "none" and index % _EVERY[mode] == 0
            block._gradient_checkpointing_func = recompute
            num_recomputed += block.gradient_checkpointing
    return num_recomputed
