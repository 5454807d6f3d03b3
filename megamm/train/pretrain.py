"""Pretraining from top to bottom: start, build, resume, loop."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from pathlib import Path

from megamm.checkpoint.commit import Progress, save
from megamm.checkpoint.retain import retain
from megamm.config import Recipe, to_dict
from megamm.core.env import RankInfo
from megamm.core.errors import DataError, MegaMMError
from megamm.core.logging import get_logger, setup
from megamm.data.ledger import Skipped, merge
from megamm.data.loader import StepData, StepLoader
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.telemetry.bar import Bar
from megamm.telemetry.metrics import MetricsLog
from megamm.train.build import Trainer, build_trainer, load_tokenizer
from megamm.train.data import TrainingData, sample_keys_digest
from megamm.train.interruption import StopRequest
from megamm.train.report import StepReport
from megamm.train.resume import Start, find_start
from megamm.train.run_folder import RunFolder
from megamm.train.step import count, held_out_loss, train_step

_log = get_logger("train")


def pretrain(recipe: Recipe, path: Path, *, resume: str, stop: StopRequest) -> None:
    """Train `recipe` in the run folder `path`, or go on where its newest good checkpoint stands.

    Ends with the marker DONE, or INTERRUPTED after a stop was asked for; a checkpoint of the last step is committed in
    both cases.

    Args:
        recipe: What to train.
        path: The run folder.
        resume: `auto`, `never`, or a checkpoint folder that must be used.
        stop: Remembers signals since the program started.

    Raises:
        MegaMMError: Something that the user can mend, on every rank.
    """
    world = distributed.start()
    run = RunFolder(path)
    try:
        with distributed.fail_together():
            run.check(recipe, resume=resume)
            # A folder that is refused must stay as it is, so a new run's files come later.
            setup(RankInfo(world.rank, world.local_rank, world.size), folder=run.logs if run.is_run() else None)
        if run.done.is_file():
            if world.is_main:
                print(f"{path} is done (it holds DONE); start a new run with another --run", file=sys.stderr)
        else:
            _train(recipe, run, world, resume=resume, stop=stop)
    except MegaMMError:
        raise
    except Exception:
        _leave_at_once(world)
    distributed.stop()


def _train(recipe: Recipe, run: RunFolder, world: World, *, resume: str, stop: StopRequest) -> None:
    with distributed.fail_together():
        tokenizer = load_tokenizer(recipe, run.tokenizer)
    data = TrainingData.open(recipe, tokenizer, world)
    trainer = build_trainer(recipe, tokenizer, world)
    fingerprints = {"tokenizer": tokenizer.fingerprint}
    start = find_start(run, trainer.engine, world, resume=resume, fingerprints=fingerprints)
    # Everything that can be refused is refused before the run folder changes.
    with distributed.fail_together():
        loader = data.loader(start.data_state, world)
    metrics = None
    with distributed.fail_together():
        if world.is_main:
            run.archive(recipe, trainer.ds_config)
            metrics = MetricsLog(run.path, recipe.telemetry, resumed_step=start.step, recipe=to_dict(recipe))
            run.begin()
    setup(RankInfo(world.rank, world.local_rank, world.size), folder=run.logs)
    _log.info("%s from step %d of %d on %d ranks", recipe.name, start.step, recipe.train.steps, world.size)
    _loop(run, world, data, trainer, start, stop, loader, metrics, fingerprints)


def _loop(
    run: RunFolder,
    world: World,
    data: TrainingData,
    trainer: Trainer,
    start: Start,
    stop: StopRequest,
    loader: StepLoader,
    metrics: MetricsLog | None,
    fingerprints: dict[str, str],
) -> None:
    recipe, step = data.recipe, start.step
    report = StepReport(recipe, trainer.config, world)
    bar = Bar(step, recipe.train.steps) if world.is_main else None
    ledger = list(start.ledger)
    num_skipped = distributed.all_reduce_sum([len(ledger)])[0]
    num_unapplied = 0
    stopping = False

    with loader:
        while step < recipe.train.steps and not stopping:
            report.begin()
            batch, failure = _next(loader)
            report.data_arrived()
            micro_batches = batch.micro_batches if batch else []
            counts = count(
                micro_batches,
                num_skipped=len(batch.skipped) if batch else 0,
                failed=failure is not None,
                stop_requested=stop.requested,
                flops=report.model_flops(micro_batches),
                num_tasks=len(data.tasks),
            )
            if batch is None or counts.num_failed:
                raise _first_failure(failure)
            result = train_step(trainer, micro_batches, counts, world=world, tasks=data.tasks)
            step += 1
            ledger += batch.skipped
            num_skipped += counts.num_skipped
            stopping = counts.stop_requested or step == recipe.train.stop_after
            num_unapplied = 0 if result.applied else num_unapplied + 1
            if num_unapplied > recipe.optim.max_unapplied_updates:
                raise _diverged(num_unapplied, step)

            if metrics and bar and due(step, recipe.telemetry.every):
                values = report.values(counts, result)
                metrics.write(step, {**values, "skipped_samples": int(num_skipped), "sample_keys": sample_keys_digest(batch)})
                bar.update(step, loss=result.loss, tokens_per_second=values["tokens_per_second"])
            if data.held_out and (due(step, recipe.evaluation.every) or step == recipe.train.steps):
                with distributed.fail_together():
                    held_out = list(data.held_out_batches(world))
                losses = held_out_loss(trainer, held_out, world=world, tasks=data.tasks)
                if metrics:
                    metrics.write(step, {f"held_out/{name}": value for name, value in losses.items()})
            if due(step, recipe.checkpoint.every) or stopping or step == recipe.train.steps:
                _commit(run, recipe, trainer, world, Progress(step, batch.state.to_json(), _all_entries(ledger), fingerprints=fingerprints))

    reasons = [reason for reason in distributed.gather_json(stop.reason if stop.requested else None) if reason]
    if metrics and bar:
        metrics.close()
        bar.close()
        if step == recipe.train.steps:
            run.mark(run.done, step=step)
        else:
            run.mark(run.interrupted, step=step, reason=reasons[0] if reasons else "stop_after")
    distributed.barrier()


def due(step: int, every: int) -> bool:
    """Whether what happens every `every` steps happens after this one; never for 0."""
    return every > 0 and step % every == 0


def _next(loader: StepLoader) -> tuple[StepData | None, MegaMMError | None]:
    """The next step, or why there is none: the ranks must hear of it before one of them leaves."""
    try:
        return next(loader), None
    except MegaMMError as error:
        return None, error


def _first_failure(own: MegaMMError | None) -> MegaMMError:
    """What failed on the first rank that failed, on every rank."""
    messages = distributed.gather_json(None if own is None else str(own))
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    error = DataError(message)
    error.on_all_ranks = True
    _log.info("rank %d could not load its data", rank)
    return error


def _diverged(num_unapplied: int, step: int) -> MegaMMError:
    error = MegaMMError(
        f"step {step}: {num_unapplied} updates in a row were skipped, because gradients were not finite; "
        "the last checkpoint is from before: resume it with a lower optim.lr in a new --run"
    )
    error.on_all_ranks = True
    return error


def _all_entries(ledger: list[Skipped]) -> list[dict]:
    """The ledger of all ranks as JSON, in the order of the plan's positions."""
    entries = distributed.gather_json([entry.to_json() for entry in ledger])
    return [entry.to_json() for entry in merge(Skipped.from_json(entry) for one_rank in entries for entry in one_rank)]


def _commit(run: RunFolder, recipe: Recipe, trainer: Trainer, world: World, progress: Progress) -> None:
    started = time.monotonic()
    folder = save(run.checkpoints, trainer.engine, world, progress)
    retain(run.checkpoints, recipe.checkpoint, world)
    _log.info("committed %s in %.1f s", folder.name, time.monotonic() - started)


def _leave_at_once(world: World) -> None:
    """End this rank without another collective: the others may wait in one, and taking the group down would join them."""
    text = traceback.format_exc()
    _log.error("rank %d failed", world.rank)
    print(f"rank {world.rank}:\n{text}", file=sys.stderr, flush=True)
    logging.shutdown()
    os._exit(1)
