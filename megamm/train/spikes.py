"""Which steps are not as they should be: losses that jump, and updates that were not applied. Pure arithmetic on what ranks agree on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamm.config import Spike
from megamm.core.errors import CheckpointError

_SIGMA = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation (Rousseeuw and Croux 1993, section 1)."""
_NOTHING_SEEN = {"first_step": 0, "num_spiking": 0, "num_unapplied": 0, "num_unapplied_total": 0, "num_overflows": 0}
_LEAST_SPREAD = 0.01
"""Share of the median: a loss that barely moves at all would otherwise spike at its next breath."""
_TINY = 1e-30
"""Keeps the logarithm of a norm of 0 finite."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Steps after which a run must not simply go on.

    Attributes:
        first_step: The first of them.
        reason: What happened, in one line.
        is_spike: A spike; otherwise more updates were not applied than the recipe bears.
    """

    first_step: int
    reason: str
    is_spike: bool


class SpikeWatch:
    """Watches the steps of a run, one after the other, the same on every rank.

    State: the usual values of the last `spike.window` steps, and what is known of the steps that are out of the usual right now. It
    goes into every checkpoint, so a run that resumes judges as one that was never interrupted.
    """

    def __init__(self, spike: Spike, max_unapplied: int):
        """Begin anew.

        Args:
            spike: What counts as a spike.
            max_unapplied: Updates in a row that may be missing.
        """
        self._spike = spike
        self._max_unapplied = max_unapplied
        self.restore(None)

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go back to what `to_json` gave; None begins anew.

        Raises:
            CheckpointError: That is something else.
        """
        try:
            values = saved or {"losses": (), "norms": (), **_NOTHING_SEEN}
            self._losses, self._norms = (self._window(values[name]) for name in ("losses", "norms"))
            counts = {name: int(values[name]) for name in _NOTHING_SEEN}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the record of past losses cannot be read ({error}); resume from another checkpoint") from None
        self._first_step, self._num_spiking, self._num_unapplied = (counts[name] for name in ("first_step", "num_spiking", "num_unapplied"))
        self._num_unapplied_total, self._num_overflows = counts["num_unapplied_total"], counts["num_overflows"]

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "first_step": self._first_step,
            "num_spiking": self._num_spiking,
            "num_unapplied": self._num_unapplied,
            "num_unapplied_total": self._num_unapplied_total,
            "num_overflows": self._num_overflows,
        }

    def totals(self) -> dict[str, int]:
        """Updates of the run that were not applied: those whose loss or gradient was not finite, and overflows of fp16."""
        return {"unapplied_updates": self._num_unapplied_total, "overflows": self._num_overflows}

    def see(self, step: int, *, loss: float, grad_norm: float, not_applied: str) -> Trouble | None:
        """Judge a step.

        Args:
            step: Its number; each follows the one before.
            loss: Of the global batch.
            grad_norm: Of its gradient before clipping.
            not_applied: `StepResult.not_applied`.

        Returns:
            What is wrong, at the step at which the recipe's patience ends; the watch then begins to count anew.
        """
        if not_applied == "overflow":
            # fp16 looks for its scale: that says nothing of the model.
            self._num_overflows += 1
            return None
        if not grad_norm and not loss:
            # Nothing was supervised.
            return None
        if not_applied:
            return self._unapplied(step, not_applied)
        self._num_unapplied = 0
        excess = self._excess(loss, grad_norm)
        if not excess:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self._first_step, self._num_spiking = 0, 0
            return None
        self._first_step = self._first_step or step
        self._num_spiking += 1
        if self._num_spiking < self._spike.patience:
            return None
        trouble = Trouble(self._first_step, f"{_steps(self._first_step, step)}: {excess}", is_spike=True)
        # What was usual is no more: a run that goes on must learn it anew, or it would tell of every step.
        self._losses.clear()
        self._norms.clear()
        self._first_step, self._num_spiking = 0, 0
        return trouble

    def _unapplied(self, step: int, why: str) -> Trouble | None:
        self._first_step = self._first_step or step
        self._num_unapplied += 1
        self._num_unapplied_total += 1
        if self._num_unapplied <= self._max_unapplied:
            return None
        updates = "the update was" if self._num_unapplied == 1 else f"{self._num_unapplied} updates in a row were"
        reason = f"{updates} not applied, because the {why} is not finite"
        return Trouble(self._first_step, f"{_steps(self._first_step, step)}: {reason}", is_spike=False)

    def _excess(self, loss: float, grad_norm: float) -> str:
        """What is above its bound, and which that is; empty where nothing is."""
        if len(self._losses) < self._spike.window:
            return ""
        # Losses tremble by an amount, norms by a factor: those are compared as logarithms, or their long tail would alarm.
        bound, usual = _bound(np.asarray(self._losses), self._spike.factor, _LEAST_SPREAD * abs(float(np.median(self._losses))))
        if loss > bound:
            return f"loss {loss:.4g} is above {bound:.4g} (usual is {usual:.4g})"
        log_bound, log_usual = _bound(np.log(np.asarray(self._norms) + _TINY), self._spike.factor, _LEAST_SPREAD)
        bound, usual = math.exp(log_bound), math.exp(log_usual)
        return f"gradient norm {grad_norm:.4g} is above {bound:.4g} (usual is {usual:.4g})" if grad_norm > bound else ""

    def _window(self, values: Iterable[float]) -> deque[float]:
        window = deque(map(float, values), maxlen=self._spike.window)
        if not all(map(math.isfinite, window)):
            raise ValueError("a value is not finite")
        return window


def _bound(values: np.ndarray, factor: float, least_spread: float) -> tuple[float, float]:
    """What is a spike above values float64[n], and their median."""
    middle = float(np.median(values))
    spread = _SIGMA * float(np.median(np.abs(values - middle)))
    return middle + factor * max(spread, least_spread), middle


def _steps(first: int, last: int) -> str:
    return f"step {last}" if first == last else f"steps {first} to {last}"
