"""Updates that were not applied: a line each, with the samples of the step, so that somebody can look at them or keep them out.

`RUN/unapplied.jsonl`. A run that goes back keeps the lines of the data that it leaves out: they say why.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamm.core.files import write_text
from megamm.core.json_lines import JsonLines, read_json_lines
from megamm.data.loading.loader import StepData
from megamm.data.planning.state import LoaderState
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.train.step import StepResult

FILE = "unapplied.jsonl"


def record_unapplied(run: Path, batch: StepData, result: StepResult, world: World) -> None:
    """Note a step whose update was not applied; every rank calls it.

    Args:
        run: The run folder.
        batch: This rank's part of the step.
        result: What became of it.
        world: The ranks.
    """
    own = {"loss": result.own_loss, "suspects": list(result.suspects), "samples": [asdict(one) for one in batch.own_samples()]}
    parts = distributed.gather_json(_plain(own))
    if not world.is_main:
        return
    lines = JsonLines(run / FILE)
    lines.write(
        {
            "step": batch.step,
            "data_step": batch.state.plan.num_steps,
            "reason": result.not_applied,
            "loss": _plain(result.loss),
            "grad_norm": _plain(result.grad_norm),
            "losses": [part["loss"] for part in parts],
            "suspects": [key for part in parts for key in part["suspects"]],
            "samples": [{"rank": rank, **sample} for rank, part in enumerate(parts) for sample in part["samples"]],
        }
    )
    lines.close()


def read_unapplied(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, in the order in which they were written."""
    return read_json_lines(run / FILE)


def cut_back_unapplied(run: Path, state: LoaderState) -> None:
    """Drop what a run that goes on from `state` will meet again; one process calls it."""
    path = run / FILE
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line, facts in zip(lines, read_json_lines(path), strict=False) if _is_past(facts["data_step"], state)]
    write_text(path, "".join(kept))


def _is_past(data_step: int, state: LoaderState) -> bool:
    return data_step <= state.plan.num_steps or any(data_step in stretch for stretch in state.stretches)


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become words, as in `metrics.jsonl`."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
