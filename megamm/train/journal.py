"""What a run says of itself while it goes on: numbers, progress, skipped samples, places in the data."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from megamm.config import Recipe, to_dict
from megamm.data.ledger import Skipped
from megamm.data.planning.state import LoaderState
from megamm.engine import distributed
from megamm.engine.distributed import World
from megamm.telemetry.bar import Bar
from megamm.telemetry.metrics import MetricsLog, Shown, Value
from megamm.train.positions import PositionLog, Scale
from megamm.train.run_folder import RunFolder
from megamm.train.skipped import SkippedLog, cut_back_skipped


class Journal:
    """Writes metrics, the progress bar and the table of positions on rank 0, and on each rank what it skipped.

    State: the open files. Opening it cuts them back to where the run resumes; a context manager.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, world: World, *, start: LoaderState, scale: Scale):
        """Open the files; every rank calls it.

        Args:
            run: The run folder.
            recipe: Which sinks to open, how long the run is.
            world: The ranks.
            start: Where the run begins or resumes.
            scale: How rows are dealt.

        Raises:
            ConfigError: A sink is asked for and not installed.
        """
        self._run, self._recipe, self._world, self._scale = run, recipe, world, scale
        self._open(start)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def go_back(self, start: LoaderState, values: dict[str, Value]) -> None:
        """Forget what was written past `start`, because the run goes on from there, and say so; every rank calls it."""
        self._close()
        self._open(start)
        self.numbers(start.step, values)

    def _open(self, start: LoaderState) -> None:
        self._skipped = SkippedLog(self._run.logs, self._world.rank)
        self._main: tuple[MetricsLog, Bar, PositionLog] | None = None
        with distributed.fail_together():
            if self._world.is_main:
                cut_back_skipped(self._run.logs, start.step)
                recipe = self._recipe
                metrics = MetricsLog(self._run.path, recipe.telemetry, resumed_step=start.step, recipe=to_dict(recipe))
                self._main = metrics, Bar(start.step, recipe.train.steps), PositionLog(self._run.path, start, self._scale)

    def _close(self) -> None:
        self._skipped.close()
        for sink in self._main or ():
            sink.close()

    @property
    def wants_numbers(self) -> bool:
        """Whether this rank writes numbers; the others need not work them out."""
        return self._main is not None

    def skipped(self, step: int, entries: Iterable[Skipped]) -> None:
        """Note what a step skipped: at once, because a run that fails is asked most of all."""
        self._skipped.write(step, entries)

    def trained(self, state: LoaderState) -> None:
        """A step was trained and left the data at `state`."""
        if self._main is not None:
            self._main[2].write(state)

    def numbers(self, step: int, values: dict[str, Value]) -> None:
        """Log numbers of a step; those of a training step also move the bar."""
        if self._main is None:
            return
        metrics, bar, _ = self._main
        metrics.write(step, values)
        if "loss" in values:
            bar.update(step, loss=float(values["loss"]), tokens_per_second=float(values["tokens_per_second"]))

    @property
    def shows(self) -> bool:
        """Whether this rank shows more than numbers; the others need not make it."""
        return self._main is not None and self._main[0].shows

    def show(self, step: int, name: str, content: Shown) -> None:
        """Show a picture, a sound or words of a step."""
        if self._main is not None:
            self._main[0].show(step, name, content)
