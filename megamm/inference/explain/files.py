"""An explanation as a folder: `explain.json`, and a heat map of each picture, of each sound and of the words."""

from __future__ import annotations

import re
from pathlib import Path

from megamm.core.errors import ConfigError
from megamm.core.files import atomic_file, write_json
from megamm.core.tables import aligned
from megamm.inference.explain.explain import METHODS
from megamm.inference.explain.explanation import Explanation
from megamm.inference.explain.pictures import check_matplotlib, draw_picture, draw_sound, draw_words
from megamm.inference.explain.question import Question
from megamm.inference.load import Loaded

_JSON = "explain.json"
_OURS = re.compile(r"explain\.json|image_\d+\.png|audio_\d+\.png|text\.png")
_NUM_LINES = 10
_WORTH_A_LINE = 0.05
"""Error of the sum of all scores, in nats."""


def check_output(folder: Path) -> None:
    """Refuse, before anything is computed, a folder that holds anything but an earlier explanation.

    Raises:
        ConfigError: It does, it is a file, or heat maps cannot be drawn.
    """
    check_matplotlib()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; name a folder")
    others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)) if folder.exists() else []
    if others:
        raise ConfigError(f"--output {folder} holds {others[0]}, which is no explanation; name a folder of its own")


def write(explanation: Explanation, question: Question, loaded: Loaded, folder: Path) -> list[Path]:
    """Write an explanation in place of an earlier one; `explain.json` comes last, when all else is there.

    Args:
        explanation: Of an answer.
        question: That was asked.
        loaded: The model that was asked.
        folder: Checked by `check_output`; made where it is missing.

    Returns:
        The files.
    """
    drawn = {f"image_{number}": draw_picture(explanation, number, picture) for number, picture in enumerate(question.pictures)}
    drawn |= {f"audio_{number}": draw_sound(explanation, number, loaded.media.audio) for number in range(len(question.seconds))}
    if explanation.words:
        drawn["text"] = draw_words(explanation)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()
    for name, content in drawn.items():
        with atomic_file(folder / f"{name}.png") as file:
            file.write(content)
    write_json(folder / _JSON, explanation.to_json())
    return [*(folder / f"{name}.png" for name in drawn), folder / _JSON]


def lines(explanation: Explanation) -> list[str]:
    """An explanation for a terminal: the answer, what each medium has of it, and what matters most."""
    answer, unit = explanation.answer, explanation.unit
    said = "given answer" if answer.is_given else "answer" if answer.is_finished else "answer, cut off at --max-new-tokens,"
    found = [
        f"{said} {answer.text!r}, log probability {sum(explanation.log_probabilities):.4g}, log odds {explanation.log_odds:.4g}",
        f"{METHODS[explanation.method].title}, in {unit}",
        "",
        *aligned(("in all", unit), list(explanation.totals().items())),
        "",
        *aligned(("what", "where", unit), explanation.largest(_NUM_LINES)),
    ]
    if "sum" in explanation.facts and abs(error := explanation.facts["sum"] - explanation.facts["difference"]) > _WORTH_A_LINE:
        found += ["", f"the scores sum to {abs(error):.2g} nats {'more' if error > 0 else 'less'} than they should: give more --steps"]
    return found
