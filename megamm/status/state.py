"""What state a run is in: one word, and one line that says why."""

from __future__ import annotations

import time
from collections.abc import Mapping

from megamm.status.facts import Facts
from megamm.status.liveness import Owning
from megamm.status.scheduler import Job
from megamm.status.units import duration

STATES = {
    "running": "its owner lives and trains",
    "starting": "its job or owner lives and has not begun to train",
    "stalled": "its owner lives, and nothing has moved for too long",
    "queued": "a job of it waits in the scheduler's queue",
    "interrupted": "it was asked to stop, and a checkpoint of its last step was committed",
    "failed": "it ended with an error, or without a word of how it ended",
    "dead": "its owner vanished: killed, or its machine is gone",
    "done": "it trained its last step",
    "idle": "it holds a run, and nobody ever owned it in this place",
    "unreadable": "its folder cannot be read",
}
"""What each state means."""
_LONG_SECONDS = 60.0

Jobs = Mapping[str, Job] | None


def state_of(facts: Facts, jobs: Jobs) -> tuple[str, str]:
    """State of a run, and why it is in it.

    Args:
        facts: What its folder says.
        jobs: What the scheduler says of its jobs; None where nobody could be asked.
    """
    if not facts.recipe and not facts.submissions and facts.owning is None:
        return "unreadable", "; ".join(facts.notes) or "nothing in it says what it is"
    if facts.done is not None:
        return "done", ""
    own = [jobs[number] for number in facts.job_ids if number in jobs] if jobs else []
    owning = facts.owning
    if owning and owning.is_fresh and not _has_ended(owning, jobs):
        return _of_living(facts, owning)
    for job in own:
        if job.is_waiting:
            return "queued", ", ".join(filter(None, [f"job {job.id} {job.state}", job.reason, _start(job), _how_it_ended(facts)[1]]))
    for job in own:
        # One that runs while the owner that it started is silent has not just begun.
        if job.is_live and not (owning and owning.owner.job_id == job.id and not owning.owner.is_released):
            return "starting", f"job {job.id} is {job.state}"
    return _ended(facts, jobs)


def silent_ranks(facts: Facts) -> list[str]:
    """Ranks whose heartbeat is far behind the newest one, each with where it was."""
    newest = max((beat.time for beat in facts.beats), default=0.0)
    return [
        f"rank {beat.rank} on {beat.host} is silent for {duration(newest - beat.time)} (step {beat.step}, {beat.phase})"
        for beat in facts.beats
        if newest - beat.time > _LONG_SECONDS
    ]


def _has_ended(owning: Owning, jobs: Jobs) -> bool:
    """Whether the scheduler knows that the owner's job is over, whatever its lease says."""
    job = jobs.get(owning.owner.job_id) if jobs else None
    return job is not None and not job.is_live


def _of_living(facts: Facts, owning: Owning) -> tuple[str, str]:
    failure = facts.failure
    if failure and failure["start"] == owning.number:
        # A rank has left already, and takes the others along; the lease may outlast them by a little.
        return ("stalled", failure["message"]) if failure["kind"] == "Stall" else _how_it_ended(facts)
    if any(beat.is_stalled for beat in facts.beats):
        return "stalled", _where(facts)
    if owning.has_begun:
        # A beat is some seconds old: what passes quickly has passed.
        return "running", _where(facts) if _seconds_at_it(facts) > _LONG_SECONDS else ""
    return "starting", _where(facts)


def _seconds_at_it(facts: Facts) -> float:
    """How long the rank that is longest in its phase has been there."""
    return max((beat.phase_seconds + max(0.0, time.time() - beat.time) for beat in facts.beats), default=0.0)


def _where(facts: Facts) -> str:
    """What the rank that is longest in its phase does."""
    if not facts.beats:
        return ""
    beat = max(facts.beats, key=lambda one: one.phase_seconds)
    return f"step {beat.step}, {beat.phase} for {duration(_seconds_at_it(facts))}"


def _ended(facts: Facts, jobs: Jobs) -> tuple[str, str]:
    state, why = _how_it_ended(facts)
    if state:
        return state, why
    own = [jobs[number] for number in facts.job_ids if number in jobs] if jobs else []
    over = [f"the scheduler says that job {job.id} is {job.state}" for job in own if not job.is_live]
    owning = facts.owning
    if owning is None and facts.submissions:
        job_id = facts.submissions[-1].job_id
        if jobs is None:
            return "queued", f"job {job_id} was submitted, and the scheduler cannot be asked from here"
        return "failed", "; ".join(over) or f"job {job_id} is not in the queue, and the run never began; see {facts.run}/logs"
    if owning is None:
        return "idle", ""
    if owning.owner.is_released:
        return "failed", f"its owner left without a marker: {owning.owner}"
    gone = "its process is gone" if owning.is_gone else f"silent for {duration(owning.silent_seconds)}"
    return "dead", f"{over[0] if over else gone}: {owning.owner}"


def _how_it_ended(facts: Facts) -> tuple[str, str]:
    """By its marker or its newest record of an error; two empty texts where there is neither."""
    started = facts.owning.owner.starts[-1][0] if facts.owning and facts.owning.owner.starts else 0
    failed_at = facts.failure["start"] if facts.failure else -1
    # A start that failed before it began to train leaves the marker of the one before it where it is.
    if facts.interrupted is not None and failed_at <= started:
        return "interrupted", f"after step {facts.interrupted.get('step', '?')}: {facts.interrupted.get('reason', 'no reason given')}"
    if facts.failure and failed_at >= started:
        return "failed", f"at step {facts.failure.get('step', '?')}"
    return "", ""


def _start(job: Job) -> str:
    return f"expected to start {job.starts_at}" if job.starts_at else ""
