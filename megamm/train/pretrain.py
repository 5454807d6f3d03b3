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
from megamm.config import Recipe
from megamm.core.errors import MegaMMError
from megamm.core.logging import get_logger, setup
from megamm.data.loader import LoaderState, StepData
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.telemetry.bar import Bar
from megamm.telemetry.metrics import MetricsLog
from megamm.telemetry.peak import peak_flops
from megamm.train.build import Trainer, build_trainer, load_tokenizer
from megamm.train.data import TrainingData
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
    setup(distributed_rank(world), folder=None, level=logging.INFO)
    try:
        with distributed.fail_together():
            run.check(recipe, resume=resume)
        if run.done.is_file():
            if world.is_main:
                print(f"{path} is done (marker DONE); start a new run with another --run", file=sys.stderr)
            return
        _run(recipe, run, world, resume=resume, stop=stop)
    except MegaMMError:
        raise
    except BaseException:
        _leave_at_once(run, world)
    distributed.stop()


def _run(recipe: Recipe, run: RunFolder, world: World, *, resume: str, stop: StopRequest) -> None:
    with distributed.fail_together():
        tokenizer = load_tokenizer(recipe, run.tokenizer)
    data = TrainingData.open(recipe, tokenizer, world)
    trainer = build_trainer(recipe, tokenizer, world)
    start = find_start(run, recipe, data, trainer, world, resume=resume)
    with distributed.fail_together():
        if world.is_main:
            run.archive(recipe, trainer.ds_config)
            run.clear_markers()
    setup(distributed_rank(world), folder=run.logs)
    _log.info("%s from step %d of %d on %d ranks", recipe.name, start.step, recipe.train.steps, world.size)
    _loop(recipe, run, world, data, trainer, start, stop)


def _loop(recipe: Recipe, run: RunFolder, world: World, data: TrainingData, trainer: Trainer, start: Start, stop: StopRequest) -> None:
    report = StepReport(recipe, trainer, world)
    step, last_step = start.step, recipe.train.steps
    metrics = MetricsLog(run.path, recipe.telemetry, resumed_step=step, recipe=run.archived()) if world.is_main else None
    bar = Bar(step, last_step) if world.is_main else None
    ledger = start.ledger
    stopping = False

    with data.loader(start.state) as loader:
        while step < last_step and not stopping:
            report.begin()
            batch: StepData = next(loader)
            report.data_arrived()
            counts = count(
                batch.micro_batches,
                num_skipped=len(batch.skipped),
                stop_requested=stop.requested,
                flops=report.model_flops(batch.micro_batches),
                num_tasks=len(data.tasks),
            )
            result = train_step(trainer, batch.micro_batches, counts, world=world, tasks=data.tasks)
            step += 1
            ledger.extend(batch.skipped)
            stopping = counts.stop_requested or step == recipe.train.stop_after

            if due(step, recipe.telemetry.every) and world.is_main:
                values = report.values(batch, counts, result, num_skipped=len(ledger))
                metrics.write(step, values)
                bar.update(step, loss=result.loss, tokens_per_second=values["tokens_per_second"])
            if due(step, recipe.evaluation.every) and data.held_out:
                losses = held_out_loss(trainer, data.held_out, world=world, tasks=data.tasks)
                if world.is_main:
                    metrics.write(step, {f"held_out/{name}": value for name, value in losses.items()})
            if due(step, recipe.checkpoint.every) or stopping or step == last_step:
                commit(run, recipe, trainer, world, data, step=step, state=batch.state, ledger=ledger)

    if world.is_main:
        metrics.close()
        bar.close()
        if step == last_step:
            run.mark(run.done, step=step)
        else:
            run.mark(run.interrupted, step=step, reason=stop.reason)
    distributed.barrier()


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this one; never for 0."""
    return every > 0 and step % every == 0


def commit(
    run: RunFolder, recipe: Recipe, trainer: Trainer, world: World, data: TrainingData, *, step: int, state: LoaderState, ledger: list
) -> None:
    """Commit a checkpoint of this step and delete what it replaces."""
    started = time.monotonic()
    entries = distributed.gather_json([entry.to_json() for entry in ledger])
    progress = Progress(
        step=step,
        data_state=state.to_json(),
        ledger=[entry for one_rank in entries for entry in one_rank],
        fingerprints={"data": data.plan.fingerprint, "tokenizer": data.tokenizer.fingerprint},
    )
    folder = save(run.checkpoints, trainer.engine, world, progress)
    retain(run.checkpoints, recipe.checkpoint, world)
    _log.info("committed %s in %.1f s", folder, time.monotonic() - started)


def _leave_at_once(run: RunFolder, world: World) -> None:
    """End this rank without another collective: the others may be waiting in one, and destroying the group would join them."""
    text = traceback.format_exc()
    _log.error("rank %d failed:\n%s", world.rank, text)
    print(text, file=sys.stderr, flush=True)
    logging.shutdown()
    os._exit(1)
