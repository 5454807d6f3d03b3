"""What a run that nothing happened to looks like, and how far another one is from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megamm.checkpoint.consolidate import consolidate
from megamm.checkpoint.manifest import committed, verify
from megamm.core.json_lines import read_json_lines
from megamm.train.positions import FILE as POSITIONS
from megamm.train.trace import trace_step


@dataclass(frozen=True)
class Difference:
    """Between a run and an unbroken one.

    Attributes:
        num_samples: Of all steps that are missing, there twice, or made of other samples; also of those whose place in the data plan
            is noted differently.
        num_tensors: Weights of the last checkpoint that are not equal bit for bit.
        loss: Largest difference of a step's loss.
    """

    num_samples: int
    num_tensors: int
    loss: float


def compare(run: Path, unbroken: Path) -> Difference:
    """Hold a finished run against a finished unbroken run of the same recipe."""
    own, other = _lines(run), _lines(unbroken)
    wrong = {
        step
        for step in own.keys() | other.keys()
        if [line["sample_keys"] for line in own.get(step, [])] != [line["sample_keys"] for line in other.get(step, [])]
    }
    own_places, other_places = _places(run), _places(unbroken)
    wrong |= {step + 1 for step in own_places.keys() & other_places.keys() if own_places[step] != other_places[step]}
    num_samples = sum(len(trace_step(unbroken if step in other else run, step).samples) for step in wrong)
    both = own.keys() & other.keys()
    loss = max((abs(own[step][0]["loss"] - other[step][0]["loss"]) for step in both), default=float("inf"))
    return Difference(num_samples, _unequal(_last(run), _last(unbroken)), loss)


def _lines(run: Path) -> dict[int, list[dict]]:
    lines: dict[int, list[dict]] = {}
    for line in read_json_lines(run / "metrics.jsonl"):
        if "loss" in line:
            lines.setdefault(line["step"], []).append(line)
    return lines


def _places(run: Path) -> dict[int, dict]:
    lines = read_json_lines(run / POSITIONS)
    return {line["step"]: {name: value for name, value in line.items() if name != "scale"} for line in lines}


def _last(run: Path) -> Path:
    folder = committed(run / "checkpoints")[-1][1]
    verify(folder)
    return folder


def _unequal(own: Path, other: Path) -> int:
    found, expected = dict(consolidate(own)), dict(consolidate(other))
    assert found.keys() == expected.keys(), f"{own} holds another model than {other}"
    return sum(not torch.equal(found[name], expected[name]) for name in expected)
