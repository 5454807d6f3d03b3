"""Self-supervision: what was hidden of pictures and sounds is filled in from the towers' states of what is left.

Legend: D documents, P cells of all pictures or states of all sounds of a micro-batch, W width of states, n hidden cells, v values of one.

Source: Xie et al. 2022, SimMIM: hidden cells stay in place as zeros, one linear layer says what was there, and the loss is the mean
absolute difference over what was hidden alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megamm.core.lengths import AUDIO_STATE_FRAMES
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.targets import Targets

_ORDER = ("vision", "audio")


class MaskedHead(nn.Module):
    """A norm and a linear layer a tower, from each of its states to the values of the cell there.

    Attributes:
        widths: Of the states of each tower that is looked at.
    """

    def __init__(self, widths: Mapping[str, int], config: MegaMMConfig):
        super().__init__()
        self.widths = dict(widths)
        sizes = cell_sizes(config)
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in widths.items()})
        self.fill = nn.ModuleDict({name: nn.Linear(width, sizes[name]) for name, width in widths.items()})

    def forward(self, *, states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """float[P, v] of each tower, from float[P, W]; a tower that saw nothing brings any state, because ranks gather the same weights."""
        return {name: self.fill[name](self.norms[name](states[name])) for name in self.widths}

    def loss(self, logits: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """float32[D]: sums of the absolute differences of hidden values."""
        total = torch.zeros(len(targets.weights), device=targets.weights.device)
        for name, hidden, scale in zip(_ORDER, (targets.pictures, targets.sounds), targets.scales, strict=True):
            if name not in logits:
                continue
            if hidden is None:
                total = total + (logits[name] * 0.0).sum().float()
                continue
            found = logits[name][hidden.numbers].float()
            is_there = hidden.values.isfinite()
            off = torch.where(is_there, found - hidden.values.nan_to_num(), 0.0).abs().sum(1)
            total = total.index_add(0, hidden.documents, off * scale)
        return total


def cell_sizes(config: MegaMMConfig) -> dict[str, int]:
    """Values of a picture's cell and of a sound's state, by tower."""
    features = config.image_features
    side = features["patch_size"] if config.is_patch_tower else features["stride"]
    bands = 0 if config.audio_config is None else config.audio_config.num_mel_bins
    return {"vision": 3 * side**2, "audio": AUDIO_STATE_FRAMES * bands}
