"""Attribution by gradients: an average gradient times the difference between what is there and nothing.

Methods differ in where gradients are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megamm.inference.explain.log_odds import LogOdds, Values, alone

NOISE_SHARE = 0.15
"""Standard deviation of SmoothGrad's noise in shares of an input's range (the paper's figures: 0.1 to 0.2)."""

TOLERANCE = 0.01
"""Integrated gradients are as good as wanted when they sum to what they should but for this share of it, or of one nat."""

_TOKENS_AT_ONCE = 4096
LEAST_STEPS = 8
"""Gradients that `integrated_gradients` takes of each stretch, so at least."""


def gradient_times_input(log_odds: LogOdds, num_steps: int, seed: int) -> Values:
    """The gradient at the input."""
    return _contributions(log_odds, iter([(1.0, log_odds.values)]))


def smooth_times_input(log_odds: LogOdds, num_steps: int, seed: int) -> Values:
    """The mean of `num_steps` gradients at the input under noise.

    Source: arXiv:1706.03825.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = ({kind: value + _noise(log_odds, kind, generator) for kind, value in log_odds.values.items()} for _ in range(num_steps))
    return _contributions(log_odds, ((1 / num_steps, values) for values in noisy))


def integrated_gradients(log_odds: LogOdds, num_steps: int, seed: int) -> Values:
    """Gradients on the straight way from the baseline to the input; all contributions sum to the change of the log odds.

    Over a stretch of the way they must sum to its change as well, which shows where the rule of Gauss and Legendre errs: the stretch where
    it errs most is halved until all are right within `TOLERANCE`, or `num_steps` gradients have been taken.

    Source: arXiv:1703.01365, equation 1.
    """
    stretches = [_stretch(log_odds, 0.0, 1.0, log_odds.at_baseline, log_odds.at_input)]
    wanted = TOLERANCE * max(1.0, abs(log_odds.at_input - log_odds.at_baseline))
    for _ in range((num_steps - LEAST_STEPS) // (2 * LEAST_STEPS)):
        if sum(one.error for one in stretches) <= wanted:
            break
        worst = max(stretches, key=lambda one: one.error)
        stretches.remove(worst)
        middle = (worst.start + worst.stop) / 2
        with torch.no_grad():
            change = float(log_odds(alone(_on_the_way(log_odds, middle))))
        stretches.append(_stretch(log_odds, worst.start, middle, worst.at_start, change))
        stretches.append(_stretch(log_odds, middle, worst.stop, change, worst.at_stop))
    return {kind: torch.stack([one.contributions[kind] for one in stretches]).sum(0) for kind in log_odds.values}


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A part of the way from the baseline (0) to the input (1), the log odds at its ends, and what it contributes."""

    start: float
    stop: float
    at_start: float
    at_stop: float
    contributions: Values

    @property
    def error(self) -> float:
        """How far the contributions are from what they must sum to."""
        return abs(total(self.contributions) - (self.at_stop - self.at_start))


def total(contributions: Values) -> float:
    """Sum over everything."""
    return sum(float(one.double().sum()) for one in contributions.values())


def _stretch(log_odds: LogOdds, start: float, stop: float, at_start: float, at_stop: float) -> _Stretch:
    nodes, weights = (one * (stop - start) / 2 for one in np.polynomial.legendre.leggauss(LEAST_STEPS))
    points = ((weight, _on_the_way(log_odds, start + (stop - start) / 2 + node)) for node, weight in zip(nodes, weights, strict=True))
    return _Stretch(start, stop, at_start, at_stop, _contributions(log_odds, points))


def _on_the_way(log_odds: LogOdds, share: float) -> Values:
    return {kind: torch.lerp(log_odds.baseline[kind], value, float(share)) for kind, value in log_odds.values.items()}


def _contributions(log_odds: LogOdds, points: Iterator[tuple[float, Values]]) -> Values:
    """The weighted sum of gradients at points, times the input's difference from the baseline."""
    sums = {kind: torch.zeros_like(value) for kind, value in log_odds.values.items()}
    at_once = max(1, _TOKENS_AT_ONCE // _size(log_odds))
    while group := list(islice(points, at_once)):
        _add_gradients(log_odds, group, sums)
    return {kind: (value - log_odds.baseline[kind]) * sums[kind] for kind, value in log_odds.values.items()}


def _add_gradients(log_odds: LogOdds, group: Sequence[tuple[float, Values]], sums: Values) -> None:
    weights = torch.tensor([weight for weight, _ in group], dtype=torch.float32, device=log_odds.input_ids.device)
    batch = {kind: torch.stack([values[kind] for _, values in group]).requires_grad_() for kind in sums}
    gradients = torch.autograd.grad(log_odds(batch).sum(), list(batch.values()), allow_unused=True)
    for kind, gradient in zip(batch, gradients, strict=True):
        # A head may look at the towers alone.
        if gradient is not None:
            sums[kind] += torch.tensordot(weights, gradient, dims=1)


def _size(log_odds: LogOdds) -> int:
    """What a variant costs, in tokens of any tower."""
    media = sum(value.shape[0] * value.shape[-2 if kind == "image" else -1] for kind, value in log_odds.values.items() if kind != "text")
    return len(log_odds.input_ids) + media


def _noise(log_odds: LogOdds, kind: str, generator: torch.Generator) -> torch.Tensor:
    value = log_odds.values[kind]
    # Control tokens and padding, which do not differ from the baseline, stay as they are.
    moves = (value != log_odds.baseline[kind]).any(-2 if kind == "audio" else -1, keepdim=True)
    scale = NOISE_SHARE * (value.max() - value.min())
    return moves * scale * torch.randn(value.shape, generator=generator).to(value)
