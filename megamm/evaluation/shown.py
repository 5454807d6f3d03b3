"""A few answers to look at and listen to while a model trains: pictures with what was said of them, sounds, and tables in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from megamm.core.tables import markdown
from megamm.core.types import Sample
from megamm.data.media.features import MediaRules
from megamm.data.media.files import MediaError, decode_sound
from megamm.evaluation.figures import grouped
from megamm.evaluation.held_out import Place
from megamm.evaluation.pictures import contact_sheet, picture_of, words_of
from megamm.evaluation.records import Answered, Identity, Record, SkippedSample
from megamm.inference.drawing import least_drawn
from megamm.telemetry.metrics import Picture, Shown, Sound

_NUM_ANSWERS = 12
_NUM_SOUNDS = 2


def chosen_places(records: Sequence[Record], places: Sequence[Place]) -> list[Place]:
    """Places of the samples that `shown_answers` shows: of each dataset and task so many, spread evenly over it."""
    wanted = {one.identity for group in _chosen(records).values() for one in group}
    return [place for place in places if place.identity in wanted]


def shown_answers(
    records: Sequence[Record], samples: Iterable[tuple[Place, Sample | SkippedSample]], rules: MediaRules
) -> Iterator[tuple[str, Shown]]:
    """Names below `evaluation/` and what is to be shown there.

    Args:
        records: What was answered.
        samples: Those of `chosen_places`, with their media.
        rules: How pictures and sounds are decoded.
    """
    known = {place.identity: sample for place, sample in samples if isinstance(sample, Sample)}
    for name, group in _chosen(records).items():
        pictures = [(one, picture) for one in group if (picture := picture_of(known.get(one.identity), rules.limits)) is not None]
        if pictures:
            yield f"evaluation/{name}", Picture(np.asarray(contact_sheet(pictures, least_score=least_drawn(rules.head))))
        sounds = [(one.key, sound) for one in group if (sound := _sound(one, known, rules)) is not None]
        for key, sound in sounds[:_NUM_SOUNDS]:
            yield f"evaluation/{name}/{key}", sound
        rows = [(one.key, words_of(one, one.reference), words_of(one, one.answer)) for one in group]
        yield f"evaluation/{name}", "\n".join(markdown(("sample", "is", "said"), rows))


def _chosen(records: Sequence[Record]) -> dict[str, list[Answered]]:
    groups = {}
    for (dataset, task), group in grouped(records).items():
        answered = [one for one in group if isinstance(one, Answered)]
        count = min(_NUM_ANSWERS, len(answered))
        if answered:
            groups[f"{dataset}/{task}"] = [answered[index * len(answered) // count] for index in range(count)]
    return groups


def _sound(record: Answered, known: Mapping[Identity, Sample], rules: MediaRules) -> Sound | None:
    """The first sound of a sample, as the model hears it; None where it has none."""
    sample = known.get(record.identity)
    parts = [] if sample is None else [part for message in sample.messages for part in message.content]
    member = next((part.member for part in parts if part.type == "audio"), None)
    if sample is None or member is None or rules.audio is None:
        return None
    try:
        return Sound(*decode_sound(sample.media[member], rules.audio, rules.limits))
    except MediaError:
        return None
