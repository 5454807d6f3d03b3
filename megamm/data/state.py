"""What resuming needs: where the plan stands, which weights held when, what is kept out. The same on every rank.

The state is independent of world size, accumulation, threads and prefetch depth, so a run may go on at any other scale. It
grows only with changes that somebody made (weights, exclusions), never with steps or samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megamm.core.errors import DataError
from megamm.data.mixture import Segment

STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class PlanState:
    """A place in the plan.

    Attributes:
        window: Window of positions whose rows come next.
        row: The next row of that window.
        segments: History of the mixture's weights.
    """

    window: int
    row: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Samples kept out from a step on: `keys` are `dataset/key`; each keeps its position and enters the ledger."""

    after_step: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoaderState:
    """What resuming after a step needs.

    Attributes:
        step: Steps that were delivered.
        plan: Where the next one begins.
        identity: Name -> value of everything that the plan is made from (see `DataPlan.identity`).
        exclusions: What is kept out, and since when.
    """

    step: int
    plan: PlanState
    identity: Mapping[str, str]
    exclusions: tuple[Exclusion, ...] = ()

    def excluding(self, keys: Iterable[str]) -> LoaderState:
        """The state with more samples (`dataset/key`) kept out from the next step on."""
        return replace(self, exclusions=(*self.exclusions, Exclusion(self.step, tuple(sorted(keys)))))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; equal states give equal values."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "window": self.plan.window,
            "row": self.plan.row,
            "weights": [
                {"start": segment.start, "weights": list(segment.weights), "drawn": list(segment.drawn)} for segment in self.plan.segments
            ],
            "exclusions": [{"after_step": one.after_step, "keys": list(one.keys)} for one in self.exclusions],
            "identity": dict(self.identity),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LoaderState:
        """Read what `to_json` gave.

        Raises:
            DataError: Another version, or not a state at all.
        """
        if value.get("version") != STATE_VERSION:
            raise DataError(
                f"data state has version {value.get('version')!r}, not {STATE_VERSION}; resume with the megamm that wrote it, or start anew"
            )
        try:
            segments = tuple(Segment(one["start"], tuple(one["weights"]), tuple(one["drawn"])) for one in value["weights"])
            exclusions = tuple(Exclusion(one["after_step"], tuple(one["keys"])) for one in value["exclusions"])
            plan = PlanState(int(value["window"]), int(value["row"]), segments)
            return cls(int(value["step"]), plan, {str(name): str(part) for name, part in value["identity"].items()}, exclusions)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"data state cannot be read ({type(error).__name__}: {error}); resume from another checkpoint") from None


def check_identity(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuse to go on with other data or another plan than the state belongs to.

    Raises:
        DataError: Something differs; the message names it with both values.
    """
    changed = [
        f"{name} was {saved.get(name, 'not there')}, is {current.get(name, 'gone')}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise DataError(
            f"the data plan changed since the checkpoint: {'; '.join(changed[:3])}{more}; "
            "bring back the shards and settings of the run, or start a new one"
        )
