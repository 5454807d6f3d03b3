"""A run that was broken and resumed beside one that never was: the same samples, the same numbers, the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.drills.engine.ground import Ground
from megamm.checkpoint.manifest import LEDGER, committed, read_data_state, read_manifest, verify
from megamm.checkpoint.retain import LATEST
from megamm.core.errors import CheckpointError
from megamm.core.json_lines import read_json_lines
from megamm.data.planning.state import LoaderState
from megamm.train.positions import FILE as POSITIONS

_SAMPLES = ("sample_keys", "tokens", "supervised_tokens", "skipped_samples")
"""Numbers of a step that no number of ranks changes."""


@dataclass(frozen=True)
class Unbroken:
    """A run without faults that kept its checkpoints.

    Attributes:
        run: Its folder.
        lines: Step -> its line of numbers.
        positions: Step -> where the data plan stood after it, for steps with a checkpoint.
    """

    run: Path
    lines: dict[int, dict[str, Any]] = field(repr=False)
    positions: dict[int, dict[str, Any]] = field(repr=False)

    @classmethod
    def train(cls, ground: Ground, *overrides: str, every: int = 1) -> Unbroken:
        """Train it, each save while training waits, so that every `every`-th step has the state that it must have."""
        keep = (f"--checkpoint.every={every}", "--checkpoint.keep_last=1000000", "--checkpoint.asynchronous=false")
        ground.train("unbroken", *keep, *overrides)
        return cls.of(ground.path("unbroken"))

    @classmethod
    def of(cls, run: Path) -> Unbroken:
        """Read what it left."""
        positions = {step: _position(folder) for step, folder in committed(run / "checkpoints")}
        return cls(run, numbers(run), positions)

    def problems(self, run: Path, *, last_step: int, bit_for_bit: bool = True) -> list[str]:
        """What differs in a run that ended after `last_step`.

        Args:
            run: Its folder.
            last_step: How far it came.
            bit_for_bit: At an equal number of ranks every number of every step and every byte of every checkpoint must be equal; at
                another one the samples, the data's state and the ledger.

        Returns:
            Nothing where all is as it must be.
        """
        found = self._problems_of_steps(run, last_step, bit_for_bit) + self._problems_of_positions(run)
        checkpoints = committed(run / "checkpoints")
        if not checkpoints or checkpoints[-1][0] != last_step:
            found.append(f"the newest of {len(checkpoints)} checkpoints is not of step {last_step}")
        for step, folder in checkpoints:
            if step in self.positions:
                found += self.problems_of_checkpoint(step, folder, bit_for_bit=bit_for_bit)
        return found

    def _problems_of_steps(self, run: Path, last_step: int, bit_for_bit: bool) -> list[str]:
        steps = [line["step"] for line in _training_lines(run)]
        if steps != list(range(1, last_step + 1)):
            return [f"metrics.jsonl holds {len(steps)} steps, the last {steps[-1:]}, not each of {last_step} once"]
        for step, line in numbers(run).items():
            expected = self.lines[step]
            names = [name for name in expected if name in _SAMPLES or (bit_for_bit and _is_computed(name))]
            for name in names:
                if line[name] != expected[name]:
                    return [f"step {step}: {name} is {line[name]}, unbroken {expected[name]}"]
        return []

    def _problems_of_positions(self, run: Path) -> list[str]:
        for line in read_json_lines(run / POSITIONS):
            position = {name: value for name, value in line.items() if name != "scale"}
            if position != self.positions.get(line["step"], position):
                return [f"{POSITIONS}: the data stand elsewhere after step {line['step']}"]
        return []

    def problems_of_checkpoint(self, step: int, folder: Path, *, bit_for_bit: bool = True) -> list[str]:
        """What differs in one checkpoint, of which this run has its own."""
        own = self.run / "checkpoints" / folder.name
        try:
            found, expected = verify(folder), read_manifest(own)
        except CheckpointError as error:
            return [str(error)]
        names = sorted(expected.files) if bit_for_bit else [LEDGER]
        differing = [name for name in names if found.files.get(name) != expected.files[name]]
        if differing:
            return [f"{folder.name} differs from the unbroken one in {_where(folder, own, differing[0])}"]
        if _data_state(folder) != _data_state(own):
            return [f"{folder.name} differs from the unbroken one in where the data stand"]
        if bit_for_bit and (found.engine, found.files.keys()) != (expected.engine, expected.files.keys()):
            return [f"{folder.name}: {found.engine} and {len(found.files)} files, unbroken {expected.engine} and {len(expected.files)}"]
        return []


def numbers(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> the numbers of its training."""
    return {line["step"]: line for line in _training_lines(run)}


def last_commit(run: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max((step for step, _ in committed(run / "checkpoints")), default=0)


def left_in(checkpoints: Path) -> list[str]:
    """What lies in a folder of checkpoints and is none: temporary folders, deletions cut short, what was set aside."""
    names = {LATEST, *(folder.name for _, folder in committed(checkpoints))}
    return sorted(path.name for path in checkpoints.iterdir() if path.name not in names) if checkpoints.is_dir() else []


def same_state(one: Path, other: Path) -> list[str]:
    """What differs between two checkpoints of any numbers of ranks, tensor by tensor: weights, moments, buffers."""
    from tests.support.checkpoints import whole_state

    left, right = dict(whole_state(one)), dict(whole_state(other))
    if left.keys() != right.keys():
        return [f"{one} and {other} hold other tensors: {sorted(left.keys() ^ right.keys())[:3]}"]
    differing = [key for key in left if not torch.equal(left[key], right[key])]
    return [f"{one} and {other} differ in {len(differing)} tensors: {differing[:3]}"] if differing else []


def _training_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(run / "metrics.jsonl") if "sample_keys" in line]


def _is_computed(name: str) -> bool:
    return name.startswith(("loss", "lr/", "skipped/")) or name in ("grad_norm", "update_applied")


def _data_state(folder: Path) -> dict[str, Any]:
    """Without what is kept of losses beside it: these round in another way at another number of ranks."""
    return {name: value for name, value in read_data_state(folder).items() if name != "watch"}


def _position(folder: Path) -> dict[str, Any]:
    return LoaderState.from_json(read_data_state(folder)).position_json()


def _where(folder: Path, own: Path, name: str) -> str:
    """The file, and the first tensor of it that differs."""
    if not name.endswith(".safetensors") or not (folder / name).is_file():
        return name
    with safe_open(folder / name, framework="pt") as left, safe_open(own / name, framework="pt") as right:
        for key in right.keys():  # noqa: SIM118
            if key not in left.keys() or not torch.equal(left.get_tensor(key), right.get_tensor(key)):  # noqa: SIM118
                return f"{name}: {key}"
    return f"{name}, but in no tensor of it"
