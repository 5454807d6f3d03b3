"""Speech recognition: the answer is what was said, in words."""

from __future__ import annotations

from collections.abc import Sequence

from megamm.metrics.bootstrap import mean_of, ratio_of
from megamm.metrics.classes import correct, majority_share
from megamm.metrics.speech import character_edits, word_edits
from megamm.tasks.reply import Reply
from megamm.tasks.task import Figure, Task


def _parse(reply: Reply) -> str:
    return " ".join(reply.text.lower().split())


def _figures(predictions: Sequence[str], references: Sequence[str]) -> list[Figure]:
    words, characters = word_edits(predictions, references), character_edits(predictions, references)
    return [
        Figure("accuracy", mean_of(correct(predictions, references)), majority_share(references)),
        Figure("word_error_rate", ratio_of(words.edits, words.lengths)),
        Figure("character_error_rate", ratio_of(characters.edits, characters.lengths)),
    ]


TASK = Task("speech_recognition", "Write down what is said.", _parse, _figures, media=("audio",))
