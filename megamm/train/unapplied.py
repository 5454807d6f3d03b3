"""Updates that were not applied: a line each, with the samples of the step, so that somebody can look at them or keep them out.

`RUN/unapplied.jsonl`, which is never cut back: a run that resumes or goes back may not meet these samples again, and a line says why.
Reading it needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamm.core.json_lines import JsonLines, read_json_lines

if TYPE_CHECKING:
    from megamm.data.loading.loader import StepData
    from megamm.train.step import StepResult

FILE = "unapplied.jsonl"


def own_part(batch: StepData, result: StepResult) -> dict[str, Any]:
    """What one rank knows of a step whose update was not applied, as plain JSON values."""
    samples = [asdict(one) for one in batch.own_samples()]
    return {"loss": _plain(result.own_loss), "suspects": list(result.suspects), "samples": samples}


def record(run: Path, batch: StepData, result: StepResult, parts: list[dict[str, Any]]) -> None:
    """Note a step whose update was not applied; one process calls it.

    Args:
        run: The run folder.
        batch: The step.
        result: What became of it.
        parts: `own_part` of each rank.
    """
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
    """The lines of a run by step of data; where a run met some data twice, what it wrote last."""
    return [line for _, line in sorted({line["data_step"]: line for line in read_json_lines(run / FILE)}.items())]


def told(line: dict[str, Any]) -> str:
    """A line for people: what was not finite, on which ranks, and which samples are to blame."""
    ranks = [str(rank) for rank, loss in enumerate(line["losses"]) if isinstance(loss, str)]
    where = f" on rank {', '.join(ranks)}" if ranks else ""
    keys = line["suspects"]
    blame = f"samples: {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}" if keys else f"one of its {len(line['samples'])} samples"
    return f"update of step {line['step']} not applied (data of step {line['data_step']}): {line['reason']} not finite{where}; {blame}"


def _plain(value: float) -> float | str:
    """JSON knows no NaN and no infinity: they become words, as in `metrics.jsonl`."""
    return value if math.isfinite(value) else str(value)
