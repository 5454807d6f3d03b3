"""Explanations as pictures: heat maps over what was shown, heard and asked.

Colours are the same in all of them: red speaks for the answer, blue against it, and the scale is symmetric; shares, which have no sign, go
from nothing to red. One place in a hundred may lie beyond a scale, which then ends in an arrow.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from megamm.config import AudioFeatures
from megamm.core.errors import ConfigError
from megamm.inference.explain.explain import METHODS
from megamm.inference.explain.explanation import Explanation, SoundScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_DPI = 120
_PANEL_INCHES = 3.6
_MAX_WORDS, _MOST_LETTERS = 60, 32
_FOR, _AGAINST = "#b2182b", "#2166ac"
_LEAST_ALPHA, _MOST_ALPHA = 0.1, 0.7
_SHOWN_APART = 0.99


def check_matplotlib() -> None:
    """Say what is missing before anything is computed.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("heat maps need matplotlib; pip install 'megamm[plots]'")


def draw_picture(explanation: Explanation, number: int, picture: np.ndarray) -> bytes:
    """A PNG: the picture, its patches and, where a method has them, its pixels.

    Args:
        explanation: Of an answer.
        number: Of the picture.
        picture: uint8[H, W, 3], in source pixels.
    """
    scores = explanation.pictures[number]
    maps = [("patch by patch", np.array([one.score for one in scores.patches]).reshape(scores.grid))]
    if scores.pixels is not None:
        maps.append(("pixel by pixel of what the model sees", scores.pixels))
    height, width = picture.shape[:2]
    # Panels of very long pictures stay readable.
    ratio = min(max(height / width, 0.4), 2.5)
    figure = _figure(_PANEL_INCHES * (len(maps) + 1) + 0.8, 0.9 * _PANEL_INCHES * ratio + 0.6)
    panels = figure.subplots(1, len(maps) + 1, squeeze=False)[0]
    extent = (0, width, height, 0)
    panels[0].imshow(picture, extent=extent, interpolation="nearest")
    panels[0].set_title("picture", fontsize=9)
    grey = picture.astype(float) @ (0.299, 0.587, 0.114)
    for panel, (name, values) in zip(panels[1:], maps, strict=True):
        panel.imshow(grey, extent=extent, cmap="gray", vmin=-80, vmax=300, interpolation="nearest")
        scale = _heat(panel, values, explanation.is_signed, extent=extent)
        panel.set_title(name, fontsize=9)
        _colour_bar(figure, panel, scale, explanation.unit, extend=_beyond(values, scale))
    for panel in panels:
        panel.set(xlim=(0, width), ylim=(height, 0), aspect="auto" if ratio != height / width else "equal")
        panel.tick_params(labelsize=7)
    return _png(figure, explanation, scores.file.name)


def draw_sound(explanation: Explanation, number: int, features: AudioFeatures) -> bytes:
    """A PNG: the spectrogram, where a method has them its scores by frequency and time, and scores by time.

    Args:
        explanation: Of an answer.
        number: Of the sound.
        features: Bands and rate of its spectrogram.
    """
    scores = explanation.sounds[number]
    panels_wanted = 2 if scores.cells is None else 3
    figure = _figure(9.0, 1.2 + 1.9 * panels_wanted)
    panels = figure.subplots(panels_wanted, 1, sharex=True)
    end = scores.mel.shape[1] * features.hop_length / features.rate_hz
    extent = (0, end, 0, len(scores.mel))
    drawn = panels[0].imshow(scores.mel, extent=extent, origin="lower", aspect="auto", cmap="magma")
    _colour_bar(figure, panels[0], drawn, "log-mel")
    if scores.cells is not None:
        panels[1].imshow(scores.mel, extent=extent, origin="lower", aspect="auto", cmap="Greys", alpha=0.6)
        scale = _heat(panels[1], scores.cells, explanation.is_signed, extent=extent, origin="lower", aspect="auto")
        _colour_bar(figure, panels[1], scale, explanation.unit, extend=_beyond(scores.cells, scale))
    for panel in panels[:-1]:
        panel.set_ylabel("mel band")
    _bars(panels[-1], scores, end)
    panels[-1].set(xlabel="seconds", ylabel=explanation.unit, xlim=(0, end))
    for panel in panels:
        panel.tick_params(labelsize=8)
    # Its scale beside the others', so that all time axes are one.
    figure.colorbar(drawn, ax=panels[-1]).ax.set_visible(False)
    return _png(figure, explanation, scores.file.name)


def draw_words(explanation: Explanation) -> bytes:
    """A PNG: a bar a word, in the order of the text; of long texts the words that matter most."""
    order = sorted(range(len(explanation.words)), key=lambda number: -abs(explanation.words[number].score))
    shown = [explanation.words[number] for number in sorted(order[:_MAX_WORDS])]
    figure = _figure(7.0, 1.4 + 0.26 * len(shown))
    axes = figure.subplots()
    values = [one.score for one in shown]
    axes.barh(range(len(shown)), values, color=[_FOR if value >= 0 else _AGAINST for value in values], height=0.72)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(
        range(len(shown)), [textwrap.shorten(one.text, 32, placeholder="…") or "…" for one in shown], fontsize=9, parse_math=False
    )
    axes.invert_yaxis()
    axes.set_xlabel(explanation.unit)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    left_out = len(explanation.words) - len(shown)
    return _png(figure, explanation, f"the {len(shown)} words that matter most of {len(explanation.words)}" if left_out else "words")


def _bars(axes: Axes, scores: SoundScores, end: float) -> None:
    starts, values = np.array([one.start for one in scores.spans]), np.array([one.score for one in scores.spans])
    widths = np.array([one.stop for one in scores.spans]) - starts
    axes.bar(starts, values, widths, align="edge", color=np.where(values >= 0, _FOR, _AGAINST), edgecolor="white", linewidth=0.3)
    axes.axhline(0, color="#444444", linewidth=0.8)
    if scores.seconds < end:
        axes.axvspan(scores.seconds, end, color="#999999", alpha=0.3)
    axes.grid(axis="y", alpha=0.3)


def _heat(axes: Axes, values: np.ndarray, is_signed: bool, **arguments: Any) -> ScalarMappable:
    """Lay scores over what is there; the smaller they are, the more of it shows through."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    sizes = np.abs(values)
    # A few places often have much more than all others, such as those where attention that is not needed goes.
    most = float(np.quantile(sizes, _SHOWN_APART, method="higher")) or float(sizes.max()) or 1.0
    scale = ScalarMappable(Normalize(-most if is_signed else 0.0, most), "RdBu_r" if is_signed else "Reds")
    alpha = _LEAST_ALPHA + (_MOST_ALPHA - _LEAST_ALPHA) * np.minimum(sizes / most, 1.0)
    axes.imshow(values, norm=scale.norm, cmap=scale.cmap, alpha=alpha, interpolation="nearest", **arguments)
    return scale


def _colour_bar(figure: Figure, axes: Axes, scale: Any, label: str, *, extend: str = "neither") -> None:
    bar = figure.colorbar(scale, ax=axes, shrink=0.85, extend=extend)
    bar.formatter.set_useMathText(True)
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _beyond(values: np.ndarray, scale: ScalarMappable) -> str:
    """On which ends of a colour bar there are values beyond it, in matplotlib's words."""
    low, high = scale.get_clim()
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    return ends[bool(values.min() < low), bool(values.max() > high)]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Figure, explanation: Explanation, what: str) -> bytes:
    answer = textwrap.shorten(explanation.answer.text, 60, placeholder=" …")
    chance = float(np.exp(sum(explanation.log_probabilities)))
    title = f"Why “{answer}” (probability {chance:.3g})? {METHODS[explanation.method].title}: {what}"
    # Names and answers may hold dollars, which would begin a formula.
    figure.suptitle("\n".join(textwrap.wrap(title, 84)), fontsize=10, fontweight="bold", parse_math=False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the words stand in explain.json.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.1)
    return file.getvalue()
