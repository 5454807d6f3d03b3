"""The loop, from top to bottom: wait for data, train, tell, evaluate, commit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from megamm.checkpoint.commit import Progress
from megamm.checkpoint.hold import Hold
from megamm.checkpoint.saver import Committed, Outcome, Saver
from megamm.core.errors import DataError, MegaMMError, UnreachableData
from megamm.core.logging import get_logger
from megamm.core.types import Batch
from megamm.data.ledger import BudgetSpent, Skipped, merge
from megamm.data.loading.loader import StepData, StepLoader
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.telemetry.failures import FailureLog
from megamm.telemetry.whereabouts import Whereabouts
from megamm.train.build import Trainer
from megamm.train.data import TrainingData
from megamm.train.interruption import STOP_AFTER, STOP_FILE, StopRequest, wants_restart
from megamm.train.journal import Journal
from megamm.train.positions import sample_keys_digest
from megamm.train.report import StepReport
from megamm.train.resume import RANKS, WATCH
from megamm.train.rewind import go_back
from megamm.train.run_folder import RunFolder
from megamm.train.spikes import SpikeWatch, Trouble
from megamm.train.step import GlobalCounts, StepResult, count, head_scales, held_out_loss, train_step
from megamm.train.task_evaluation import TaskEvaluation
from megamm.train.time_limit import TimeLimit
from megamm.train.unapplied import own_part, record

_log = get_logger("train")


@dataclass
class Run:
    """What the loop works with, and where it stands.

    State: `step`, `num_tokens`, `ledger`, `num_skipped`, `stop_reason` and which loader is in use; the rest keeps its own.

    Attributes:
        folder: The run folder.
        world: The ranks.
        data: What is trained on.
        trainer: The model under ZeRO.
        tasks: Held-out samples that it is asked about; None where the recipe asks for none.
        loader: Steps from the next one on.
        hold: This job's hold of the run.
        saver: Commits checkpoints behind training.
        journal: What the run says of itself.
        watch: Judges losses and updates.
        stop: Whether somebody asked for a stop.
        limit: When the scheduler ends the job, on the rank that minds it.
        where: What this rank is at, for those who watch it.
        failures: Records what ends this rank.
        fingerprints: Name -> digest, for manifests.
        step: Optimizer steps that are done.
        num_tokens: Real tokens trained on in these steps, over all ranks.
        ledger: Samples skipped so far that this rank answers for; rank 0 also answers for those before the resume.
        num_skipped: Samples skipped so far a dataset, over all ranks.
        stop_reason: What asked this rank to stop first.
    """

    folder: RunFolder
    world: World
    data: TrainingData
    trainer: Trainer
    tasks: TaskEvaluation | None
    loader: StepLoader
    hold: Hold
    saver: Saver
    journal: Journal
    watch: SpikeWatch
    stop: StopRequest
    limit: TimeLimit | None
    where: Whereabouts
    failures: FailureLog
    fingerprints: dict[str, str]
    step: int
    num_tokens: int
    ledger: list[Skipped]
    num_skipped: Counter[str]
    stop_reason: str | None = field(default=None, init=False)

    def close(self) -> None:
        """Stop the loader in use."""
        self.loader.close()


def train(run: Run) -> None:
    """Train until the recipe's last step or a stop; commits the last step in both cases. Every rank calls it.

    Raises:
        MegaMMError: On every rank: data that cannot be loaded, or a run that diverged.
    """
    recipe, journal = run.data.recipe, run.journal
    report = StepReport(recipe, run.trainer, run.world)
    stopping = _is_there(run)
    with closing(run), journal, run.saver, run.failures:
        while run.step < recipe.train.steps and not stopping:
            report.begin()
            batch, counts = _next_batch(run, report)
            result = _train_step(run, batch, counts)
            _advance(run, batch, counts, result)
            report.end(counts)
            journal.trained(batch.state)
            stopping = counts.stop_requested or run.stop.is_reached(run.step)
            if due(run.step, recipe.telemetry.every) and journal.wants_numbers:
                skipped = {f"skipped/{name}": num for name, num in run.num_skipped.items()}
                so_far = {"tokens_total": run.num_tokens, **run.watch.totals(), "skipped_samples": run.num_skipped.total(), **skipped}
                journal.numbers(run.step, {**report.values(counts, result), **so_far, "sample_keys": sample_keys_digest(batch.keys)})
            if run.data.held_out and (due(run.step, recipe.evaluation.every) or run.step == recipe.train.steps):
                _evaluate(run)
            if run.tasks is not None and (due(run.step, recipe.evaluation.tasks_every) or run.step == recipe.train.steps):
                run.tasks.run(run.trainer.engine, run.step, where=run.where, journal=journal)
            _tell(run, run.saver.poll())
            trouble = _judge(run, batch, result)
            if trouble is not None:
                _go_back(run, batch, trouble)
                stopping = counts.stop_requested
                continue
            if due(run.step, recipe.checkpoint.every) or stopping or run.step == recipe.train.steps:
                _save(run, batch)
        run.where.enter("save", run.step)
        _tell(run, run.saver.finish())
    _leave(run)


def _is_there(run: Run) -> bool:
    """Whether there is nothing to do for this command: an earlier start came as far as it asks, and was killed before it could say so."""
    is_there = run.step < run.data.recipe.train.steps and run.stop.is_reached(run.step)
    if is_there:
        _log.info("nothing to train: the run is at step %d, and --stop-after %d asks for no more", run.step, run.stop.stop_after)
    return is_there


def due(step: int, every: int) -> bool:
    """Whether what happens every `every` steps happens after this one; never for 0."""
    return every > 0 and step % every == 0


def _next_batch(run: Run, report: StepReport) -> tuple[StepData, GlobalCounts]:
    """This rank's part of the next step and the facts of the whole step, or the first rank's failure on every rank."""
    run.where.enter("data", run.step + 1, run.loader.awaited)
    batch, failure = _load(run)
    report.data_arrived()
    micro_batches = batch.micro_batches if batch else []
    counts = count(
        micro_batches,
        skipped=[entry.dataset for entry in batch.skipped] if batch else [],
        datasets=tuple(run.data.plan.datasets),
        tasks=run.data.tasks,
        waited_seconds=report.waited_seconds,
        flops=report.model_flops(micro_batches),
        failed=failure is not None,
        stop_requested=_wants_stop(run),
        world=run.world,
    )
    if batch is None or counts.num_failed:
        raise _first_failure(failure, run)
    return batch, counts


def _load(run: Run) -> tuple[StepData | None, DataError | None]:
    """The next step, or why there is none: whatever it is, the other ranks must hear of it before this one leaves."""
    try:
        return _next_noted(run), None
    except DataError as error:
        return None, error
    except MegaMMError as error:
        return None, DataError(str(error))
    except OSError as error:
        return None, UnreachableData(f"data cannot be read: {error}")
    except Exception as error:
        _log.exception("the loader failed")
        crash = DataError(f"the loader failed with {type(error).__name__}: {error}; the log of this rank has the traceback")
        crash.may_pass = True
        return None, crash


def _next_noted(run: Run) -> StepData:
    """The next step, once what it skipped is noted, before anything can go wrong with the rest; or the skips that end the run, noted."""
    try:
        batch = next(run.loader)
    except BudgetSpent as error:
        run.journal.skipped(run.step + 1, error.skipped)
        raise
    run.journal.skipped(batch.step, batch.skipped)
    return batch


def _first_failure(own: DataError | None, run: Run) -> DataError:
    """What failed on the first rank that failed, on every rank; where others' failures do not pass, one of those."""
    failures = distributed.gather_json(None if own is None else [own.may_pass, str(own)])
    failed = [(*failure, rank) for rank, failure in enumerate(failures) if failure is not None]
    passes, message, rank = min(failed, key=lambda failure: (failure[0], failure[2]))
    others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    where = f" (rank {rank}{others} of {run.world.size}, step {run.step + 1})" if run.world.size > 1 else f" (step {run.step + 1})"
    error = DataError(message + where)
    error.on_all_ranks, error.may_pass = True, passes
    return error


def _wants_stop(run: Run) -> bool:
    """Whether something asks this rank to stop; what did first is kept, because it says whether the run is to be started again."""
    if run.stop_reason is None:
        run.stop_reason = run.stop.reason or (run.limit.reason(run.where) if run.limit else None)
        if run.stop_reason is not None:
            _log.info("step %d is the last one for now: %s", run.step + 1, run.stop_reason)
    return run.stop_reason is not None


def _train_step(run: Run, batch: StepData, counts: GlobalCounts) -> StepResult:
    run.where.enter("train", batch.step, batch.own_samples)
    return train_step(run.trainer, batch.micro_batches, counts, world=run.world, tasks=run.data.tasks)


def _advance(run: Run, batch: StepData, counts: GlobalCounts, result: StepResult) -> None:
    run.step += 1
    run.num_tokens += counts.num_tokens
    run.ledger += batch.skipped
    run.num_skipped.update(counts.num_skipped)


def _judge(run: Run, batch: StepData, result: StepResult) -> Trouble | None:
    """What the run must go back from, if anything; updates that were not applied are recorded with their samples.

    Raises:
        MegaMMError: Too many updates were not applied, and the run may not go back.
    """
    if result.not_applied not in ("", "overflow"):
        parts = distributed.gather_json(own_part(batch, result))
        with distributed.fail_together():
            if run.world.is_main:
                record(run.folder.path, batch, result, parts)
    trouble = run.watch.see(run.step, loss=result.loss, grad_norm=result.grad_norm, not_applied=result.not_applied)
    if trouble is None or run.data.recipe.spike.rewind:
        return trouble
    if trouble.is_spike:
        if run.world.is_main:
            _log.warning("%s; --rewind-on-spike would go back and leave these data out", trouble.reason)
        return None
    error = MegaMMError(
        f"{trouble.reason} (optim.max_unapplied_updates={run.data.recipe.optim.max_unapplied_updates}); the weights are those of step "
        f"{trouble.first_step - 1}: `megamm data report` names the samples, resume without them (--exclude), with --rewind-on-spike, or "
        "with a lower optim.lr in a new --run"
    )
    error.on_all_ranks = True
    raise error


def _go_back(run: Run, batch: StepData, trouble: Trouble) -> None:
    """Go on from a checkpoint before the trouble, without the data since then."""
    run.where.enter("rewind", run.step)
    _tell(run, run.saver.finish())
    run.loader.close()
    start = go_back(
        run.folder,
        batch.state,
        trouble,
        plan=run.data.plan,
        engine=run.trainer.engine,
        world=run.world,
        hold=run.hold,
        max_rewinds=run.data.recipe.spike.max_rewinds,
    )
    assert start.data_state is not None, "a checkpoint says where its data stand"
    left_out = start.data_state.stretches[-1]
    values = {"rewind/from_step": run.step, "rewind/left_out_steps": left_out.last - left_out.first + 1}
    run.journal.go_back(start.data_state, {**values, "rewind/reason": trouble.reason})
    run.step, run.num_tokens = start.step, start.num_tokens
    run.ledger = list(start.ledger) if run.world.is_main else []
    run.num_skipped = Counter(entry.dataset for entry in start.ledger)
    run.watch.restore(start.watch)
    if run.trainer.ranks is not None:
        run.trainer.ranks.restore(start.ranks)
    with distributed.fail_together():
        run.loader = run.data.loader(start.data_state, run.world, start.ledger)


def _evaluate(run: Run) -> None:
    run.where.enter("evaluate", run.step)
    with distributed.fail_together():
        held_out = list(run.data.held_out_batches(run.world))
    batches = _one_by_one(run, held_out)
    losses = held_out_loss(run.trainer, batches, world=run.world, tasks=run.data.tasks, scales=head_scales(held_out))
    run.journal.numbers(run.step, {f"held_out/{name}": value for name, value in losses.items()})


def _one_by_one(run: Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        run.where.enter("evaluate", run.step)
        yield batch


def _save(run: Run, batch: StepData) -> None:
    run.where.enter("save", run.step)
    state = {**batch.state.to_json(), WATCH: run.watch.to_json()}
    if run.trainer.ranks is not None:
        state[RANKS] = run.trainer.ranks.to_json()
    run.saver.save(Progress(run.step, state, _all_entries(run.ledger), run.fingerprints, run.num_tokens))


def _tell(run: Run, outcomes: list[Outcome]) -> None:
    """Log what became of saves: at the step that heard of it, because the one that was saved may be long past."""
    for outcome in outcomes:
        if isinstance(outcome, Committed):
            seconds = {"stall_seconds": outcome.stall_seconds, "commit_seconds": outcome.commit_seconds}
            values = {"step": outcome.step, "num_bytes": outcome.num_bytes, "snapshot_bytes": run.saver.snapshot_bytes, **seconds}
            if run.limit is not None:
                run.limit.saved(outcome)
        else:
            values = {"failed_step": outcome.step, "failures_in_a_row": outcome.num_in_a_row}
        run.journal.numbers(run.step, {f"checkpoint/{name}": value for name, value in values.items()})


def _all_entries(ledger: list[Skipped]) -> list[dict]:
    """The ledger of all ranks as JSON, in the order of the plan's positions."""
    entries = distributed.gather_json([entry.to_json() for entry in ledger])
    return [entry.to_json() for entry in merge(Skipped.from_json(entry) for one_rank in entries for entry in one_rank)]


def _leave(run: Run) -> None:
    """Mark the folder as done or interrupted, once every rank is through."""
    run.where.enter("leave", run.step)
    reasons = [reason for reason in distributed.gather_json(run.stop_reason) if reason]
    if run.world.is_main:
        if run.step == run.data.recipe.train.steps:
            run.folder.mark(run.folder.done, step=run.step)
        else:
            # Who wants the run to rest is heard before a scheduler that ended it at the same time.
            rests = [STOP_AFTER] * run.stop.is_reached(run.step) + [STOP_FILE] * run.folder.stop.exists()
            reason = [*rests, *reasons][0]
            run.folder.mark(run.folder.interrupted, step=run.step, reason=reason, requeue=wants_restart(reason))
    distributed.barrier()
