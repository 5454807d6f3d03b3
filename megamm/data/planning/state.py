"""What resuming needs: where the plan stands, which weights held when, what is kept out. The same on every rank.

The state is independent of world size, accumulation, workers and prefetch depth, so a run may go on at any other scale. It
grows only with changes that somebody made (weights, exclusions, accepted changes of the data) and with stretches that were left out,
never with steps or samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megamm.core.errors import DataError
from megamm.core.files import canonical_json, digest_text
from megamm.data.planning.mixture import Segment, StepWeights
from megamm.data.planning.stretch import Stretch
from megamm.data.planning.values import as_count, as_counts, as_list, as_text, as_texts, as_weights

STATE_VERSION = 4


@dataclass(frozen=True, slots=True)
class Pass:
    """Where the passes over a dataset are counted from.

    Attributes:
        drawn: Samples of the dataset that the run drew before.
        epoch: Number of the pass that begins there.
    """

    drawn: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class PlanState:
    """A place in the plan.

    Attributes:
        position: First position of the window whose rows come next.
        row: The next row of that window.
        num_steps: Steps of data that were planned before it, those that were left out included; weights of a schedule count by it.
        names: The datasets, sorted; weights and passes are in this order.
        segments: History of the mixture's weights.
        schedule: Weights that steps to come will bring.
        passes: Where the passes over each dataset are counted from.
    """

    position: int
    row: int
    num_steps: int
    names: tuple[str, ...]
    segments: tuple[Segment, ...]
    schedule: tuple[StepWeights, ...]
    passes: tuple[Pass, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "position": self.position,
            "row": self.row,
            "num_steps": self.num_steps,
            "datasets": list(self.names),
            "weights": [{"start": one.start, "weights": list(one.weights), "drawn": list(one.drawn)} for one in self.segments],
            "schedule": [{"step": one.step, "weights": list(one.weights)} for one in self.schedule],
            "passes": [[one.drawn, one.epoch] for one in self.passes],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanState:
        """Read what `to_json` gave; raises KeyError, TypeError or ValueError where it is something else."""
        names, position = as_texts(value["datasets"]), as_count(value["position"])
        segments = tuple(_segment(one, names) for one in as_list(value["weights"]))
        schedule = tuple(StepWeights(as_count(one["step"]), as_weights(one["weights"], len(names))) for one in as_list(value["schedule"]))
        passes = tuple(Pass(*as_counts(one, 2)) for one in as_list(value["passes"]))
        if list(names) != sorted(set(names)) or len(passes) != len(names):
            raise ValueError("datasets are not sorted, or passes not one for each")
        starts = [one.start for one in segments]
        if not starts or starts != sorted(set(starts)) or starts[0] > position:
            raise ValueError(f"weights that begin at {starts} are none for position {position} or do not ascend")
        return cls(position, as_count(value["row"]), as_count(value["num_steps"]), names, segments, schedule, passes)

    def without_past(self) -> PlanState:
        """The same place without the weights that held before it: as large as the list of datasets."""
        first = max(number for number, segment in enumerate(self.segments) if not number or segment.start <= self.position)
        return replace(self, segments=self.segments[first:])


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Samples kept out from a step on: `keys` are `dataset/key`; each keeps its position and enters the ledger."""

    after_step: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DataChange:
    """Other data or settings that somebody accepted.

    Every position of the old plan before `position` was delivered or is in the ledger, but for the rows from `left_row` on of its
    window at `left_position`, which were given up. Which samples these held is known to the old shards alone; none where `left_row` is 0.

    Attributes:
        after_step: The last step of the old plan.
        position: First position of the new one.
        left_position: First position of the window that was open.
        left_row: The next row of that window.
        old: Fingerprint of the old plan.
        new: Fingerprint of the new one.
        changed: What differs, by the names of `DataPlan.identity`.
    """

    after_step: int
    position: int
    left_position: int
    left_row: int
    old: str
    new: str
    changed: tuple[str, ...]

    def __str__(self) -> str:
        given_up = (
            f"the window at {self.left_position} was given up from row {self.left_row} on" if self.left_row else "no row was given up"
        )
        names = ", ".join(self.changed)
        return f"after step {self.after_step} other data or settings hold from position {self.position} on, {given_up}: {names}"


@dataclass(frozen=True, slots=True)
class LoaderState:
    """What resuming after a step needs.

    Attributes:
        step: Steps that were trained: the run's own count, which goes back where the run does.
        plan: Where the next one begins.
        identity: Name -> value of everything that the plan is made from (see `DataPlan.identity`).
        exclusions: What is kept out, and since when.
        changes: Accepted changes of the identity, oldest first.
        stretches: Steps of data that are left out, in the order of the decisions; some may still be to come.
    """

    step: int
    plan: PlanState
    identity: Mapping[str, str]
    exclusions: tuple[Exclusion, ...] = ()
    changes: tuple[DataChange, ...] = ()
    stretches: tuple[Stretch, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Digest of `identity`."""
        return fingerprint_of(self.identity)

    def excluding(self, keys: Iterable[str]) -> LoaderState:
        """The state with more samples (`dataset/key`) kept out from the next step on."""
        return replace(self, exclusions=(*self.exclusions, Exclusion(self.step, tuple(sorted(keys)))))

    def leaving_out(self, stretches: Iterable[Stretch]) -> LoaderState:
        """The state with more data left out (`DataPlan.leave_out` makes a stretch)."""
        return replace(self, stretches=(*self.stretches, *stretches))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; equal states give equal values."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            **self.plan.to_json(),
            "exclusions": [{"after_step": one.after_step, "keys": list(one.keys)} for one in self.exclusions],
            "changes": [{**asdict(one), "changed": list(one.changed)} for one in self.changes],
            "stretches": [one.to_json() for one in self.stretches],
            "identity": dict(self.identity),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LoaderState:
        """Read what `to_json` gave.

        Raises:
            DataError: Another version, or not a state at all.
        """
        try:
            _check_version(value)
            exclusions = tuple(Exclusion(as_count(one["after_step"]), as_texts(one["keys"])) for one in as_list(value["exclusions"]))
            changes = tuple(_change(one) for one in as_list(value["changes"]))
            stretches = tuple(Stretch.from_json(one) for one in as_list(value["stretches"]))
            identity = {name: as_text(part) for name, part in value["identity"].items()}
            return cls(as_count(value["step"]), PlanState.from_json(value), identity, exclusions, changes, stretches)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"data state cannot be read ({type(error).__name__}: {error}); resume from another checkpoint") from None

    def position_json(self) -> dict[str, Any]:
        """The place alone, as plain JSON values: no larger than the list of datasets, enough to plan the steps that follow."""
        to_come = [one.to_json() for one in self.stretches if one.last > self.plan.num_steps]
        place = self.plan.without_past().to_json()
        return {"version": STATE_VERSION, "step": self.step, **place, "stretches": to_come, "plan": self.fingerprint}

    @classmethod
    def from_position_json(cls, value: Mapping[str, Any], identity: Mapping[str, str]) -> LoaderState:
        """Read what `position_json` gave.

        Args:
            value: The place.
            identity: Of the plan that it is a place of.

        Returns:
            A state that leads to the same steps; it does not know what was excluded, accepted or left out before.

        Raises:
            DataError: Another version, a place in another plan, or not a place at all.
        """
        try:
            _check_version(value)
            step, plan, expected = as_count(value["step"]), PlanState.from_json(value), as_text(value["plan"])
            stretches = tuple(Stretch.from_json(one) for one in as_list(value["stretches"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"a place in the data cannot be read ({type(error).__name__}: {error}); take that of another step") from None
        if expected != fingerprint_of(identity):
            raise DataError(
                f"step {step} was planned from other data or settings (plan {expected[:12]}, now {fingerprint_of(identity)[:12]}); "
                "bring back the shards and settings of that time to look it up"
            )
        return cls(step, plan, dict(identity), stretches=stretches)


def fingerprint_of(identity: Mapping[str, str]) -> str:
    """Digest of a plan's identity."""
    return digest_text(canonical_json(dict(identity)))


def check_identity(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuse to go on with other data or another plan than the state belongs to.

    Raises:
        DataError: Something differs; the message names it with both values.
    """
    changed = [f"{name} was {saved.get(name, 'not there')}, is {current.get(name, 'gone')}" for name in differences(saved, current)]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise DataError(
            f"the data plan changed since the checkpoint: {'; '.join(changed[:3])}{more}; "
            "bring back the shards and settings of the run, go on with what is there now with --accept-data-change, or start a new run"
        )


def differences(saved: Mapping[str, str], current: Mapping[str, str]) -> tuple[str, ...]:
    """Sorted names whose values differ between two identities."""
    return tuple(name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name))


def _check_version(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.40} is no object")
    if value.get("version") != STATE_VERSION:
        raise DataError(
            f"data state has version {value.get('version')!r}, not {STATE_VERSION}; resume with the megamm that wrote it, or start anew"
        )


def _segment(value: Any, names: tuple[str, ...]) -> Segment:
    return Segment(as_count(value["start"]), as_weights(value["weights"], len(names)), as_counts(value["drawn"], len(names)))


def _change(value: Any) -> DataChange:
    counts = {name: as_count(value[name]) for name in ("after_step", "position", "left_position", "left_row")}
    texts = {name: as_text(value[name]) for name in ("old", "new")}
    return DataChange(**{**value, **counts, **texts, "changed": as_texts(value["changed"])})
