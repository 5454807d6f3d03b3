"""Pretraining and fine-tuning: start the ranks, build, resume, hand over to the loop."""

from __future__ import annotations

import faulthandler
import sys
import traceback
from collections import Counter
from pathlib import Path

from megamm.checkpoint.hold import Hold, hold_run
from megamm.checkpoint.lock import LostRun
from megamm.checkpoint.saver import Saver
from megamm.config import Recipe, to_dict
from megamm.core.env import RankInfo, leave_at_once
from megamm.core.errors import MegaMMError
from megamm.core.files import canonical_json, digest_text
from megamm.core.logging import get_logger, setup
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.telemetry.failures import FailureLog
from megamm.telemetry.heartbeat import Heartbeats
from megamm.telemetry.stall_watch import StallWatch
from megamm.telemetry.whereabouts import Whereabouts, Who
from megamm.train.build import build_trainer, load_tokenizer
from megamm.train.data import DataChanges, TrainingData
from megamm.train.interruption import StopRequest
from megamm.train.journal import Journal
from megamm.train.loop import Run, train
from megamm.train.origin import find_origin
from megamm.train.positions import Scale
from megamm.train.resume import find_start
from megamm.train.run_folder import RunFolder
from megamm.train.spikes import SpikeWatch
from megamm.train.task_evaluation import TaskEvaluation
from megamm.train.time_limit import TimeLimit

_log = get_logger("train")


def pretrain(recipe: Recipe, path: Path, *, resume: str, changes: DataChanges, stop: StopRequest, source: Path | None = None) -> None:
    """Train `recipe` in the run folder `path`, or go on where its newest good checkpoint stands.

    Ends with the marker DONE, or INTERRUPTED after a stop was asked for; a checkpoint of the last step is committed in
    both cases.

    Args:
        recipe: What to train.
        path: The run folder.
        resume: `auto`, `never`, or a checkpoint folder that must be used.
        changes: What somebody changes about the data from here on.
        stop: Remembers signals since the program started.
        source: A run, a checkpoint or an exported folder whose weights a new run starts from; None to start by itself.

    Raises:
        MegaMMError: Something that the user can mend, on every rank.
    """
    # What ends a rank in native code shows where.
    faulthandler.enable()
    world = distributed.start()
    run = RunFolder(path)
    failures: FailureLog | None = None
    try:
        with distributed.fail_together():
            run.check(recipe, resume=resume, data_may_change=changes.accept)
            # A folder that is refused must stay as it is, so a new run's files come later.
            setup(RankInfo(world.rank, world.local_rank, world.size), folder=run.logs if run.is_run() else None)
        if run.done.is_file():
            if world.is_main:
                print(f"{path} is done (it holds DONE); start a new run with another --run", file=sys.stderr)
        else:
            with hold_run(path, world, lease_seconds=recipe.checkpoint.lease_seconds) as hold:
                watch, failures = _watch(path, recipe, world, hold)
                with watch, failures:
                    _train(recipe, run, world, hold, resume=resume, changes=changes, stop=stop, source=source, failures=failures)
    except MegaMMError:
        raise
    except Exception as error:
        _give_up(world, None if failures is not None and failures.told is error else error)
    distributed.stop()


def _warn_of_random_weights(recipe: Recipe) -> None:
    """An adapter over weights that were drawn at random is legal, and hardly ever what was meant."""
    towers = {name: tower for name in ("text", "vision", "audio") if (tower := getattr(recipe.model, name)) is not None}
    drawn = [name for name, tower in towers.items() if not tower.pretrained] + (["projectors"] if len(towers) > 1 else [])
    if drawn:
        _log.warning(
            "adapter.method=%r freezes what was drawn at random (%s); start from a trained model with `megamm finetune`, or set "
            "adapter.train_base=true",
            recipe.adapter.method,
            ", ".join(drawn),
        )


def _train(
    recipe: Recipe,
    folder: RunFolder,
    world: World,
    hold: Hold,
    *,
    resume: str,
    changes: DataChanges,
    stop: StopRequest,
    source: Path | None,
    failures: FailureLog,
) -> None:
    with distributed.fail_together():
        tokenizer = load_tokenizer(recipe, folder.tokenizer)
    origin = find_origin(source, folder, recipe, tokenizer, world)
    base = origin.base if origin is not None and recipe.adapter.freezes_base else None
    if recipe.adapter.freezes_base and origin is None:
        _warn_of_random_weights(recipe)
    data = TrainingData.open(recipe, tokenizer, world)
    tasks = TaskEvaluation.open(recipe, folder, tokenizer, world)
    trainer = build_trainer(recipe, tokenizer, world, origin)
    with trainer.engine.on_drive():
        fingerprints = {"tokenizer": tokenizer.fingerprint}
        start = find_start(folder, trainer.engine, world, hold, resume=resume, fingerprints=fingerprints, base=base)
        # Everything that can be refused is refused before the run folder changes.
        state = data.begin(start.data_state, changes, world)
        with distributed.fail_together():
            loader = data.loader(state, world, start.ledger)
        with distributed.fail_together():
            if world.is_main:
                folder.archive(recipe, trainer.ds_config, None if origin is None else origin.to_json())
        scale = Scale(world.size, recipe.batch.micro_rows, trainer.num_micro_steps)
        watch = SpikeWatch(recipe.spike, recipe.optim.max_unapplied_updates)
        watch.restore(start.watch)
        if trainer.ranks is not None:
            trainer.ranks.restore(start.ranks)
        journal = Journal(folder, recipe, world, start=state, scale=scale)
        with distributed.fail_together():
            if world.is_main:
                hold.started_at(start.step)
                folder.begin()
        setup(RankInfo(world.rank, world.local_rank, world.size), folder=folder.logs)
        _log.info(
            "%s from step %d of %d on %d %s",
            recipe.name,
            start.step,
            recipe.train.steps,
            world.size,
            "rank" if world.size == 1 else "ranks",
        )
        saver = Saver(folder.checkpoints, trainer.engine, world, recipe.checkpoint, hold=hold, base=base)
        limit = TimeLimit.of_environment(recipe.train.stop_margin_seconds, saver.snapshot_bytes) if world.is_main else None
        train(
            Run(
                folder=folder,
                world=world,
                data=data,
                trainer=trainer,
                tasks=tasks,
                loader=loader,
                hold=hold,
                saver=saver,
                journal=journal,
                watch=watch,
                stop=stop,
                limit=limit,
                where=failures.where,
                failures=failures,
                # The recipe's is for people: a resume may change some of it.
                fingerprints={**fingerprints, "config": digest_text(canonical_json(to_dict(recipe)))},
                step=start.step,
                num_tokens=start.num_tokens,
                # Each entry once when the ranks' ledgers are gathered.
                ledger=list(start.ledger) if world.is_main else [],
                num_skipped=Counter(entry.dataset for entry in start.ledger),
            )
        )


def _watch(path: Path, recipe: Recipe, world: World, hold: Hold) -> tuple[StallWatch, FailureLog]:
    """What watches this rank; signs of life of earlier starts are gone then."""
    with distributed.fail_together():
        if world.is_main:
            Heartbeats(path).clear_before(hold.fence.number)
    who = Who(hold.fence.number, world.rank, world.size, hold.fence.job_id, hold.fence.restart_count)
    where = Whereabouts()
    stall_seconds = recipe.telemetry.stall_seconds
    watch = StallWatch(path, who, where, stall_seconds=stall_seconds, num_collectives=distributed.num_collectives)
    return watch, FailureLog(path, who, where, ignored=(LostRun,))


def _give_up(world: World, untold: Exception | None) -> None:
    """End this rank without another collective: the others may wait in one, and taking the group down would join them."""
    if untold is not None:
        print(f"rank {world.rank}:\n{''.join(traceback.format_exception(untold))}", file=sys.stderr, flush=True)
    leave_at_once(1)
