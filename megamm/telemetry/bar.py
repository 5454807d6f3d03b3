"""The progress bar: step, loss, tokens a second and time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LINE_SECONDS = 10.0


class Bar:
    """Shows progress on standard error. Rank 0 holds one.

    Args:
        first_step: Steps done before this process started.
        last_step: Steps of the whole run.
    """

    def __init__(self, first_step: int, last_step: int):
        self._last_step = last_step
        self._first_step = first_step
        self._started = time.monotonic()
        self._printed = 0.0
        self._tqdm = None
        if sys.stderr.isatty():
            self._tqdm = tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done."""
        if self._tqdm is not None:
            self._tqdm.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._tqdm.update(step - self._tqdm.n)
            return
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS or step == self._last_step:
            self._printed = now
            left = (now - self._started) / max(1, step - self._first_step) * (self._last_step - step)
            line = f"step {step}/{self._last_step}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {_clock(left)} left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar on the screen as it stands."""
        if self._tqdm is not None:
            self._tqdm.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
