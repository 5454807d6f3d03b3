"""The status of runs for a terminal: a page for one run, a line each for several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from megamm.core.tables import aligned
from megamm.status.run_status import RunStatus
from megamm.status.units import count, duration, num_bytes, several

_HEADER = ("run", "state", "step", "tokens", "tokens/s", "loss", "left", "restarts", "checkpoint", "skipped", "job", "why")
_MAX_WHY = 70


def page(status: RunStatus) -> list[str]:
    """Lines about one run."""
    rows = [(name, text) for name, text in _rows(status) if text]
    width = max(len(name) for name, _ in rows)
    return [str(status.facts.run), *(f"  {name:<{width}}  {text}" for name, text in rows)]


def table(statuses: Sequence[RunStatus]) -> list[str]:
    """A line a run; what a cell cannot hold is on the run's own page."""
    return aligned(_HEADER, [_cells(one) for one in statuses])


def _rows(status: RunStatus) -> Iterator[tuple[str, str]]:
    facts, progress = status.facts, status.facts.progress
    yield "state", f"{status.state} ({status.why})" if status.why else status.state
    yield "step", _step(status)
    yield "tokens", "" if progress.num_tokens is None else f"{progress.num_tokens:,}"
    yield "speed", _speed(status)
    yield "loss", _loss(status)
    if status.seconds_left is not None:
        yield "time left", f"{duration(status.seconds_left)}, at {progress.seconds_a_step:.3g} s a step with saves and evaluations"
    yield "ranks", _ranks(status)
    for job in status.jobs:
        limit = f", until {job.ends_at}" if job.is_live and job.ends_at else ""
        yield "job", ", ".join(filter(None, [f"{job.id} {job.state}", job.nodes])) + limit
    if facts.owning:
        yield "restarts", str(facts.owning.num_restarts)
    yield "checkpoint", _checkpoint(status)
    if progress.step:
        parts = ", ".join(f"{name} {number:,}" for name, number in sorted(progress.num_skipped.items()))
        yield "skipped", several(status.num_skipped, "sample") + (f" ({parts})" if parts else "")
    if error := facts.failure:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error["time"]))
        where = "".join(f", {name} {error[name]}" for name in ("start", "rank", "step") if name in error)
        yield "last error", f"{at}{where}: {error['kind']}: {error['message']}"
    for note in status.notes:
        yield "note", note


def _step(status: RunStatus) -> str:
    step, num_steps = status.facts.progress.step, status.num_steps
    if num_steps is None:
        return ""
    at = status.facts.progress.written_at
    age = f", written {duration(time.time() - at)} ago" if at and status.state in ("running", "stalled") else ""
    return f"{step:,} of {num_steps:,} ({100 * step / num_steps:.1f} %){age}"


def _speed(status: RunStatus) -> str:
    progress = status.facts.progress
    if progress.tokens_per_second is None:
        return ""
    mfu = f", MFU {100 * progress.mfu:.1f} %" if progress.mfu is not None else ""
    return f"{progress.tokens_per_second:,.0f} tokens/s{mfu}"


def _loss(status: RunStatus) -> str:
    progress = status.facts.progress
    if progress.loss is None:
        return ""
    return _number(progress.loss) + (f", held out {_number(progress.held_out_loss)}" if progress.held_out_loss is not None else "")


def _ranks(status: RunStatus) -> str:
    facts = status.facts
    if not facts.num_ranks:
        return ""
    hosts = sorted({beat.host for beat in facts.beats}) or ([facts.owning.owner.host] if facts.owning else [])
    # Of very many hosts the first ones tell which cluster it is; the job's list of nodes is complete.
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return f"{facts.num_ranks} on {shown}" if shown else str(facts.num_ranks)


def _checkpoint(status: RunStatus) -> str:
    saved = status.facts.saved
    if saved is None:
        return "none yet" if status.facts.recipe else ""
    ranks = several(saved.num_ranks, "rank")
    return f"step {saved.step:,}, {duration(saved.age_seconds)} old, {num_bytes(saved.num_bytes)}, written by {ranks}"


def _cells(status: RunStatus) -> tuple[str, ...]:
    facts, progress = status.facts, status.facts.progress
    job = status.jobs[0].id if status.jobs else next(iter(facts.job_ids), "-")
    why = status.why if status.state not in ("failed", "dead") or not facts.failure else facts.failure["message"]
    return (
        facts.run.name or str(facts.run),
        status.state,
        f"{progress.step}/{status.num_steps or '?'}",
        count(progress.num_tokens) if progress.num_tokens is not None else "-",
        count(progress.tokens_per_second) if progress.tokens_per_second is not None else "-",
        _number(progress.loss) if progress.loss is not None else "-",
        duration(status.seconds_left) if status.seconds_left is not None else "-",
        str(facts.owning.num_restarts if facts.owning else 0),
        f"{facts.saved.step}, {duration(facts.saved.age_seconds)}" if facts.saved else "-",
        f"{status.num_skipped:,}",
        job,
        why if len(why) <= _MAX_WHY else f"{why[: _MAX_WHY - 1]}…",
    )


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
