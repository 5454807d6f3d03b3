"""The characters that a sound says, aligned by nobody.

Legend: D documents, T states of one, U time steps a state, W width of states, C characters.

Source: Graves et al. 2006, Connectionist temporal classification; the loss is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from megamm.config import Head
from megamm.core.geometry import PictureView
from megamm.models.heads.states import States
from megamm.models.heads.targets import Targets

_PAUSE = 0


class CtcHead(nn.Module):
    """Each state is spread over several time steps, each of which says a character or pauses."""

    def __init__(self, settings: Head, width: int):
        super().__init__()
        self.characters, self.num_steps = settings.labels, settings.time_steps
        self.norm = nn.LayerNorm(width)
        self.spread = nn.Linear(width, settings.hidden_size * settings.time_steps)
        self.say = nn.Linear(settings.hidden_size, 1 + len(settings.labels))

    def forward(self, *, states: States) -> dict[str, torch.Tensor]:
        """`characters` float[D, T x U, 1 + C], the pause first; `num_steps` int64[D] of them are the document's."""
        spread = F.gelu(self.spread(self.norm(states.values)))
        logits = self.say(spread.view(len(spread), states.values.shape[1] * self.num_steps, -1))
        return {"characters": logits, "num_steps": states.mask.sum(1) * self.num_steps}

    def loss(self, logits: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """float32[D]: the negative log likelihood of all alignments together."""
        log_probs = logits["characters"].float().log_softmax(-1).transpose(0, 1)
        lengths = torch.tensor([len(ids) for ids in targets.ids], device=log_probs.device)
        return F.ctc_loss(log_probs, torch.cat(targets.ids) + 1, logits["num_steps"], lengths, reduction="none") * targets.scales[0]

    def decode(self, logits: dict[str, torch.Tensor], views: Sequence[PictureView | None]) -> list[str]:
        """Of each time step the likeliest, of equal neighbours one, pauses left out."""
        texts = []
        for best, num_steps in zip(logits["characters"].argmax(-1), logits["num_steps"].tolist(), strict=True):
            said = torch.unique_consecutive(best[:num_steps]).tolist()
            texts.append("".join(self.characters[number - 1] for number in said if number != _PAUSE))
        return texts
