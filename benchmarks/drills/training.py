"""One rank's engine and saver, for drills of what training notices of a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.drills.ranks import judged
from benchmarks.drills.saving import names_in
from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.commit import Progress
from megamm.checkpoint.io import LOCAL, Io
from megamm.checkpoint.manifest import read_manifest, step_folder
from megamm.checkpoint.saver import Committed, Failed, Saver
from megamm.config.schema import Checkpointing
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.engine.runtime import Engine
from tests.support.models import build_engine, train


class Trainer:
    """Trains one rank and saves behind it. State: the engine's, and how many steps it has run."""

    def __init__(self, engine: Engine, world: World):
        self._engine = engine
        self._world = world
        self.num_steps = 0

    @contextmanager
    def saver(self, folder: Path, io: Io = LOCAL, *, keep_last: int = 2, max_failures: int = 100) -> Iterator[Saver]:
        """A saver into `folder` that saves behind training."""
        settings = Checkpointing(keep_last=keep_last, max_failures=max_failures)
        with Saver(folder, self._engine, self._world, settings, io=io) as saver:
            yield saver

    def train(self) -> int:
        """One step; returns its number."""
        train(self._engine, 0, 1, self.num_steps, self.num_steps + 1)
        self.num_steps += 1
        return self.num_steps

    def save(self, saver: Saver) -> Committed | Failed:
        """Train a step, save it, and train on until it is known what became of it."""
        saver.save(Progress(self.train(), {"row": self.num_steps}))
        outcomes: list[Committed | Failed] = []
        while saver.is_pending:
            outcomes += saver.poll()
        (outcome,) = outcomes + saver.poll()
        return outcome

    def newest(self, folder: Path) -> int:
        """Step of the newest good checkpoint; 0 without one."""
        choice = newest_good(folder, self._world)
        return 0 if choice.folder is None else read_manifest(choice.folder).step


def judged_in_training(judge: Callable[[Trainer], list[str]]) -> list[str]:
    """What a judge finds that trains in a process of its own; DeepSpeed is imported here, once for all."""
    distributed.import_deepspeed()
    return judged(lambda world: _judge(judge))


def _judge(judge: Callable[[Trainer], list[str]]) -> list[str]:
    world = distributed.start()
    engine = build_engine(1)
    try:
        return judge(Trainer(engine, world))
    finally:
        engine.close()


def next_works(trainer: Trainer, saver: Saver, run: Path) -> str:
    """What is wrong with the save after a fault: it commits, counts from nought, and leaves what it replaces nowhere."""
    outcome = trainer.save(saver)
    if not isinstance(outcome, Committed) or trainer.newest(run / "checkpoints") != outcome.step:
        return f"the next save: {outcome}"
    left = [name for name in names_in(run) if name != step_folder(outcome.step) and ".damaged-" not in name]
    return f"left in the folder: {left}" if left else ""
