"""Metrics to `metrics.jsonl`, TensorBoard and, when asked, Weights & Biases."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm.config import Telemetry
from megamm.core.errors import ConfigError
from megamm.core.files import write_text
from megamm.core.json_lines import JsonLines, cut_back
from megamm.core.logging import get_logger

_log = get_logger("telemetry")
Value = float | int | str


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to show: `pixels` uint8[H, W, 3]."""

    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound to play: `wave` float32[n] between -1 and 1."""

    wave: np.ndarray
    rate_hz: int


Shown = Picture | Sound | str
"""What TensorBoard shows besides numbers; a string is Markdown."""


class MetricsLog:
    """Writes one line a step. State: the open files; resuming drops what a crash wrote past the resumed step.

    Only rank 0 holds one.

    Args:
        folder: The run folder.
        config: Which sinks to open.
        resumed_step: Steps already in the checkpoint; later lines are dropped, since they will be written again.
        recipe: The resolved recipe, shown by Weights & Biases.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, config: Telemetry, *, resumed_step: int, recipe: Mapping[str, Any]):
        path = folder / "metrics.jsonl"
        cut_back(path, resumed_step)
        self._lines = JsonLines(path)
        self._tensorboard = _tensorboard(folder, resumed_step) if config.tensorboard else None
        self._wandb = _wandb(folder, config, recipe) if config.wandb else None

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Log `values` of one step, in the file with `unix_seconds`; numbers also go to TensorBoard and Weights & Biases."""
        self._lines.write({"step": step, "unix_seconds": round(time.time(), 3), **{name: _plain(value) for name, value in values.items()}})
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            try:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
            except OSError as error:
                # Its thread has ended with the error, and takes no more.
                self._lose_tensorboard(error)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    @property
    def shows(self) -> bool:
        """Whether there is anywhere to show more than numbers."""
        return self._tensorboard is not None

    def show(self, step: int, name: str, content: Shown) -> None:
        """Put a picture, a sound or words of one step where they can be looked at, in TensorBoard; nowhere where there is none."""
        if self._tensorboard is None:
            return
        try:
            if isinstance(content, Picture):
                self._tensorboard.add_image(name, content.pixels, step, dataformats="HWC")
            elif isinstance(content, Sound):
                self._tensorboard.add_audio(name, content.wave.clip(-1, 1)[None], step, sample_rate=content.rate_hz)
            else:
                self._tensorboard.add_text(name, content, step)
        except OSError as error:
            self._lose_tensorboard(error)

    def close(self) -> None:
        """Flush and close every sink."""
        self._lines.close()
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except OSError as error:
                self._lose_tensorboard(error)
        if self._wandb is not None:
            self._wandb.finish()

    def _lose_tensorboard(self, error: OSError) -> None:
        _log.warning("TensorBoard gets no more numbers of this start, metrics.jsonl has them: %s", error)
        self._tensorboard = None


def _plain(value: Value) -> Value:
    # JSON knows no NaN; a diverged loss must still be readable.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # At step 0 too: a run that crashed before its first checkpoint left points that are written again.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)


def _wandb(folder: Path, config: Telemetry, recipe: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("telemetry.wandb=true, but wandb is not installed; pip install 'megamm[wandb]'") from error
    name, identity = folder.resolve().name, _wandb_id(folder)
    return wandb.init(project=config.wandb_project, name=name, dir=str(folder), config=dict(recipe), resume="allow", id=identity)


def _wandb_id(folder: Path) -> str:
    """Made once a run and kept in its folder: folders of one name must not share a run, and a resumed run goes on in its own."""
    path = folder / "wandb_id.txt"
    if not path.is_file():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()
