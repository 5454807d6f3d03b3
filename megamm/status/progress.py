"""How far a run is and how fast: from the last lines of its metrics, whatever the file's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamm.core.json_lines import last_json_lines

_TAIL_BYTES = 1 << 18
_WATCHED_LINES = 50


@dataclass(frozen=True, slots=True)
class Progress:
    """What the metrics say last.

    Attributes:
        step: Optimizer steps that are done.
        num_tokens: Real tokens of the whole run so far.
        loss: Of that step; text where it is no finite number.
        held_out_loss: Of the last evaluation.
        tokens_per_second: Mean of the last steps, saves and evaluations left out.
        mfu: Mean of the last steps; None where the device's peak is not known.
        seconds_a_step: From step to step by the clock, saves and evaluations included.
        num_skipped: Skipped samples of the whole run by dataset.
        num_failed_saves: Saves that failed one after the other, up to now.
        written_at: When the last line was written, in epoch seconds.
    """

    step: int = 0
    num_tokens: int | None = None
    loss: float | str | None = None
    held_out_loss: float | str | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    seconds_a_step: float | None = None
    num_skipped: dict[str, int] = field(default_factory=dict)
    num_failed_saves: int = 0
    written_at: float | None = None


def read_progress(run: Path, *, began_at_step: int = 0) -> Progress:
    """Progress of a run that may be going on.

    Args:
        run: The run folder.
        began_at_step: Where its present owner went on; the time between two owners is no time that a step takes.

    Raises:
        OSError: The file is there and cannot be read.
    """
    lines = last_json_lines(run / "metrics.jsonl", _TAIL_BYTES)
    trained = [line for line in lines if "loss" in line and isinstance(line.get("step"), int)]
    if not trained:
        return Progress()
    last, watched = trained[-1], trained[-_WATCHED_LINES:]
    seconds = sum(_numbers(watched, "seconds"))
    mfu = _numbers(watched, "mfu")
    held_out = [line["held_out/loss"] for line in lines if "held_out/loss" in line]
    return Progress(
        step=last["step"],
        num_tokens=last.get("tokens_total"),
        loss=last["loss"],
        held_out_loss=held_out[-1] if held_out else None,
        tokens_per_second=sum(_numbers(watched, "tokens")) / seconds if seconds else None,
        mfu=sum(mfu) / len(mfu) if mfu else None,
        seconds_a_step=_seconds_a_step([line for line in watched if line["step"] > began_at_step] or watched[-1:]),
        num_skipped={name.removeprefix("skipped/"): number for name, number in last.items() if name.startswith("skipped/")},
        num_failed_saves=_num_failed_saves(lines),
        written_at=lines[-1].get("unix_seconds"),
    )


def _numbers(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if isinstance(line.get(name), int | float)]


def _seconds_a_step(lines: Sequence[dict[str, Any]]) -> float | None:
    first, last = lines[0], lines[-1]
    if last["step"] > first["step"] and "unix_seconds" in first and "unix_seconds" in last:
        return (last["unix_seconds"] - first["unix_seconds"]) / (last["step"] - first["step"])
    return last["seconds"] if isinstance(last.get("seconds"), int | float) else None


def _num_failed_saves(lines: Sequence[dict[str, Any]]) -> int:
    saves = [line for line in lines if "checkpoint/step" in line or "checkpoint/failures_in_a_row" in line]
    return int(saves[-1].get("checkpoint/failures_in_a_row", 0)) if saves else 0
