"""Linear layers with a trainable change of low rank beside a weight that may stay as it is: LoRA, DoRA and AdaLoRA.

The layer owns all that its forward reads, base weight included, so that ZeRO-3, which gathers a module's own parameters, needs no
exception for it; and the base weight keeps its name, so that a checkpoint of the base fits. Names and arithmetic of the change are
those of the peft library, which loads it (`export.peft_folder`).

Shape legend: I input channels, O output channels, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class LowRankLinear(nn.Linear):
    """A linear layer whose weight is changed by a product of two narrow matrices.

    The change is zero at first: `lora_B` is. DoRA learns lengths and directions of the weight's rows apart; its lengths are right once
    `reset_magnitude` was called on the base weight.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether the base layer has one.
        rank: R.
        alpha: The change is multiplied by `alpha / rank`.
        dropout: Share of the change's inputs that is dropped in training.
        has_magnitude: Whether the lengths of the weight's rows are learned by themselves (DoRA).

    Source: LoRA (arXiv:2106.09685, equation 3), DoRA (arXiv:2402.09353, equation 5).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, *, rank: int, alpha: float, dropout: float, has_magnitude: bool):
        super().__init__(in_features, out_features, bias=bias)
        self.scaling = alpha / rank
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        self.lora_magnitude_vector = nn.Parameter(torch.ones(out_features)) if has_magnitude else None
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float[..., I] to float[..., O]."""
        change = F.dropout(features, self.dropout, self.training)
        change = F.linear(F.linear(change, self._inward()), self.lora_B) * self.scaling
        if self.lora_magnitude_vector is None:
            return F.linear(features, self.weight, self.bias) + change
        # Lengths are taken as constants in the backward, as section 4.3 of the paper suggests.
        factor = self.lora_magnitude_vector / self._lengths().to(features.dtype)
        out = (F.linear(features, self.weight) + change) * factor
        return out if self.bias is None else out + self.bias

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Let DoRA begin at the base: the lengths are those of the weight's rows."""
        assert self.lora_magnitude_vector is not None, "only DoRA learns lengths"
        self.lora_magnitude_vector.copy_(self._lengths())

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """float32[O, I] of the plain linear layer that does the same."""
        weight = self._changed_weight()
        if self.lora_magnitude_vector is None:
            return weight
        return weight * (self.lora_magnitude_vector.float() / weight.norm(dim=1))[:, None]

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """float32[O] of the changed weight's rows."""
        return self._changed_weight().norm(dim=1)

    def _changed_weight(self) -> torch.Tensor:
        return self.weight.float() + self.scaling * (self.lora_B.float() @ self._inward().float())

    def _inward(self) -> torch.Tensor:
        """float[R, I], the factor that inputs meet first."""
        return self.lora_A


class TripletLinear(LowRankLinear):
    """A linear layer whose weight is changed by a sum of triplets: a left vector, a number, a right vector (AdaLoRA).

    The change is zero at first: the numbers are. A triplet whose number stays zero is a rank that the layer does without; who
    trains the layer decides which (`train.rank_budget`), and the factor of the change stays that of the first rank.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether the base layer has one.
        rank: R, the number of triplets.
        alpha: The change is multiplied by `alpha / rank`, with a hundred-thousandth added to the rank as peft does.
        dropout: Share of the change's inputs that is dropped in training.

    Source: AdaLoRA (arXiv:2303.10512, equation 3).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, *, rank: int, alpha: float, dropout: float):
        super().__init__(in_features, out_features, bias, rank=rank, alpha=alpha, dropout=dropout, has_magnitude=False)
        self.scaling = alpha / (rank + 1e-5)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1))
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)

    def _inward(self) -> torch.Tensor:
        return self.lora_A * self.lora_E
