"""GoEmotions in four groups: 28 emotions as positive, negative, ambiguous or neutral, several to a comment.

Source: Demszky et al., GoEmotions (2020), figure 2 and table 6.
"""

from __future__ import annotations

from collections.abc import Iterable

GROUPS = {
    "positive": "admiration amusement approval caring desire excitement gratitude joy love optimism pride relief",
    "negative": "anger annoyance disappointment disapproval disgust embarrassment fear grief nervousness remorse sadness",
    "ambiguous": "confusion curiosity realization surprise",
    "neutral": "neutral",
}
_GROUP_OF = {emotion: group for group, emotions in GROUPS.items() for emotion in emotions.split()}


def grouped(answer: str) -> frozenset[str]:
    """The groups of an answer of emotions with commas between them; words that are none have none."""
    return frozenset(_GROUP_OF[word.strip()] for word in answer.split(",") if word.strip() in _GROUP_OF)


def grouped_macro_f1(answers: Iterable[str], references: Iterable[str]) -> float:
    """Macro F1 over the four groups.

    Raises:
        DataError: Not one answer for each reference, or there are none.
        MegaMMError: scikit-learn is not installed.
    """
    from megamm.metrics.label_sets import label_set_scores

    return label_set_scores([grouped(one) for one in answers], [grouped(one) for one in references]).macro_f1
