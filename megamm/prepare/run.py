"""From a source to its shards: list, plan, skip what is done, write the rest, report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megamm.core.errors import ConfigError, DataError
from megamm.core.files import atomic_file, canonical_json, digest_text
from megamm.prepare.inputs import failure
from megamm.prepare.journal import Journal
from megamm.prepare.plan import Limits, SplitPlan, Splitting, check_split, make_plan
from megamm.prepare.pool import run_tasks
from megamm.prepare.report import SplitReport
from megamm.prepare.shard import Finished, Task
from megamm.prepare.source import SEED, Listing, Source
from megamm.prepare.writer import remove_temporaries

FORMAT = 1
"""Counts up when equal inputs are written as other samples, so that no data set mixes both."""

_LINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """How the records of a source are written.

    Attributes:
        output: Folder of the shards; made if it is not there.
        splitting: Who is held out, and the seed.
        limits: When a shard is closed.
        num_workers: Processes.
        part: This part, counted from 0, and the number of parts; each part writes its own shards of the one plan.
        max_skipped: Share of this part's records that may be skipped before that is an error.
    """

    output: Path
    splitting: Splitting = field(default_factory=Splitting)
    limits: Limits = field(default_factory=Limits)
    num_workers: int = 1
    part: tuple[int, int] = (0, 1)
    max_skipped: float = 0.05


def prepare(source: Source, job: Job, **options: Any) -> list[SplitReport]:
    """Write the shards of a source, or what is left of them.

    The shards are the same bytes for every number of workers and parts, and however often the command was killed and repeated.

    Args:
        source: One of `megamm.prepare.SOURCES`.
        job: Where to and how.
        options: The source's own settings; `input` where it takes one.

    Returns:
        A report a split.

    Raises:
        ConfigError: An option that the source does not take or that is wrong, or something that is not installed.
        DataError: Inputs cannot be read, the output was begun from something else, the disk is full, or too many records were skipped.
    """
    try:
        own, reports = _prepare(source, job, options)
    except OSError as error:
        what = f"{job.output}: {failure(error, job.output)}"
        raise DataError(f"{what}; put that right and run the same command again, finished shards are kept") from error
    _check_skipped(own, job.max_skipped, reports)
    return reports


def check_output(source: Source, job: Job, **options: Any) -> None:
    """Find whether a job could write its default split where no record of the source is known yet, before much is spent on finding them.

    Raises:
        ConfigError: No file can have the name of the split, or an option that the source does not take or that is wrong.
        DataError: The output holds shards that were begun from something else, or by something else.
    """
    check_split(job.splitting.default)
    settings = _settings(source, _list(source, options), job, options=options)
    Journal(job.output, job.splitting.default, job.part).is_begun(settings)


def _prepare(source: Source, job: Job, options: Mapping[str, Any]) -> tuple[list[Finished], list[SplitReport]]:
    """What became of this part's shards, and the reports of all splits."""
    part, num_parts = job.part
    if not 0 <= part < num_parts:
        raise ConfigError(f"--part {part}/{num_parts} does not exist; parts are counted from 0, so the last is {num_parts - 1}/{num_parts}")
    if sys.stderr.isatty():
        print("listing the input …", end="\r", file=sys.stderr, flush=True)
    listing = _list(source, {**options, **({"seed": job.splitting.seed} if SEED in source.options else {})})
    plans = make_plan(listing.records, job.splitting, job.limits)
    journals = [Journal(job.output, plan.split, job.part) for plan in plans]
    facts = [_facts(source, listing, job, plan, options=options) for plan in plans]
    with ExitStack() as held:
        for journal, what in zip(journals, facts, strict=True):
            held.enter_context(journal.alone())
            journal.claim(what)
        _write_files(listing, job)
        own = _write(listing, plans, journals, job)
    reports = []
    for plan, journal, what in zip(plans, journals, facts, strict=True):
        finished = journal.finished()
        names = [plan.shard_name(number) for number in range(plan.num_shards)]
        notes = listing.notes if plan is _home_of_notes(plans, job.splitting.default) else ()
        report = SplitReport(job.output, plan.split, [finished[name] for name in names if name in finished], plan.num_shards, notes)
        report.write(what)
        reports.append(report)
    return own, reports


def _list(source: Source, options: Mapping[str, Any]) -> Listing:
    known = {option.name: option.default for option in source.options}
    if source.input:
        if "input" not in options:
            raise ConfigError(f"the source {source.name} needs an INPUT: {source.input}")
        known["input"] = None
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"the source {source.name} takes no {', '.join(unknown)}; it takes {', '.join(known) or 'nothing'}")
    try:
        return source.records(**{**known, **options})
    except OSError as error:
        raise DataError(
            f"the input of {source.name} cannot be read: {failure(error)}; put that right and run the same command again"
        ) from error


def _facts(source: Source, listing: Listing, job: Job, plan: SplitPlan, *, options: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the bytes of a split: where the inputs lie does not."""
    facts = {**_settings(source, listing, job, options=options), "records": len(plan.order), "inputs": plan.digest}
    return json.loads(canonical_json(facts))  # tuples become lists, as they do on disk


def _settings(source: Source, listing: Listing, job: Job, *, options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of it that is known before the records are."""
    defaults = {option.name: option.default for option in source.options if option.read is not Path and option is not SEED}
    settings = {
        "format": FORMAT,
        "source": source.name,
        "seed": job.splitting.seed,
        "test_share": job.splitting.test_share,
        "options": {name: options.get(name, default) for name, default in defaults.items()},
        "limits": [job.limits.num_samples, job.limits.num_bytes],
        "settings": _settings_digest(listing),
        **({"files": _files_digest(listing)} if listing.files else {}),
    }
    return json.loads(canonical_json(settings))


def _settings_digest(listing: Listing) -> str:
    """Digest of what `make` was given besides the records, such as the names of classes."""
    given = getattr(listing.make, "keywords", {})
    return digest_text(repr(sorted((name, value) for name, value in given.items() if not isinstance(value, Path))))


def _files_digest(listing: Listing) -> str:
    return digest_text(canonical_json({name: xxhash.xxh3_128_hexdigest(content) for name, content in listing.files.items()}))


def _write_files(listing: Listing, job: Job) -> None:
    """Write what lies beside the shards, where it is not there yet."""
    for name, content in listing.files.items():
        path = job.output / name
        # One part alone, because two on different nodes could take the same temporary name.
        if not path.exists() and job.part[0] == 0:
            with atomic_file(path) as file:
                file.write(content)
        elif path.exists() and path.read_bytes() != content:
            raise DataError(f"{job.output} already holds another {name}; name another --output, or remove that file if nothing needs it")


def _write(listing: Listing, plans: Sequence[SplitPlan], journals: Sequence[Journal], job: Job) -> list[Finished]:
    """Do this part's shards; returns what became of them."""
    part, num_parts = job.part
    shards = [(which, number) for which, plan in enumerate(plans) for number in range(plan.num_shards)][part::num_parts]
    known = [journal.finished() for journal in journals]
    splits = {plan.split: which for which, plan in enumerate(plans)}

    def task(which: int, number: int) -> Task:
        name = plans[which].shard_name(number)
        records = tuple(listing.records[index] for index in plans[which].records(number).tolist())
        return Task(job.output / f"{name}.tar", records, known[which].get(name))

    own: list[Finished] = []
    total = sum(len(plans[which].records(number)) for which, number in shards)
    with _swept(job.output, {plans[which].shard_name(number) for which, number in shards}), _Progress(total) as progress:
        tasks = (task(which, number) for which, number in shards)
        workers = max(1, min(job.num_workers, len(shards)))
        with closing(run_tasks(tasks, listing.make, num_workers=workers, advance=progress.advance)) as results:
            for finished in results:
                which = splits[finished.name.rpartition("-")[0]]
                if known[which].get(finished.name) != finished:
                    journals[which].append(finished)
                own.append(finished)
    return own


@contextmanager
def _swept(folder: Path, names: Collection[str]) -> Iterator[None]:
    """Remove what killed processes left of some shards, and what an interruption at an unlucky moment leaves."""
    remove_temporaries(folder, names)
    try:
        yield
    finally:
        remove_temporaries(folder, names)


def _home_of_notes(plans: Sequence[SplitPlan], default: str) -> SplitPlan:
    """The split whose report carries what belongs to no record."""
    return next((plan for plan in plans if plan.split == default), plans[0])


def _check_skipped(own: Sequence[Finished], max_skipped: float, reports: Sequence[SplitReport]) -> None:
    num_records, num_skipped = sum(one.num_records for one in own), sum(one.num_skipped for one in own)
    if num_skipped > max_skipped * num_records:
        reason = next(omission.reason for one in own for omission in one.omissions if omission.is_sample)
        files = ", ".join(str(report.skipped_path) for report in reports if report.num_skipped)
        raise DataError(
            f"{num_skipped} of {num_records} samples were skipped, more than --max-skipped {max_skipped:g} of them; "
            f"the first: {reason}; all are in {files}"
        )


class _Progress:
    """A bar on standard error; lines now and then where that is no terminal. State: records done."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="sample", unit_scale=True, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Show that `count` more records are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS:
            self._printed = now
            rate = self._done / (now - self._started)
            print(f"{self._done:,} of {self._total:,} samples, {rate:,.0f} samples/s", file=sys.stderr, flush=True)
