"""An evaluation in pictures: its charts, and samples with what the model said of them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.config import Limits
from megamm.core.files import atomic_file
from megamm.core.logging import get_logger
from megamm.core.types import Sample
from megamm.data.media.files import DEFAULT_LIMITS, MediaError, decode_picture
from megamm.evaluation.charts import MAX_CLASSES, Curve, confusion_chart, precision_chart, robustness_chart
from megamm.evaluation.held_out import Place
from megamm.evaluation.records import Answered, SkippedSample
from megamm.evaluation.report import Report, is_picture
from megamm.inference.drawing import Colour, draw_reply
from megamm.metrics.coco import RECALLS, ClassPrecision
from megamm.metrics.label_precisions import label_precisions
from megamm.tasks import TASKS
from megamm.tasks.reply import Reply

_log = get_logger("evaluation")
_NUM_SAMPLES = 24
_NUM_COLUMNS = 6
_SIDE = 192
_CAPTION = 44
_NUM_ITEMS = 3
_BLACK, _GREEN, _RED = (0, 0, 0), (0, 110, 60), (190, 40, 0)


def write_pictures(
    report: Report,
    folder: Path,
    samples: Iterable[tuple[Place, Sample | SkippedSample]],
    *,
    limits: Limits = DEFAULT_LIMITS,
    least_score: float = 0.0,
) -> list[Path]:
    """Draw what there is to draw beside a report; a task without figures has no curves.

    Args:
        report: What was found.
        folder: Of the report.
        samples: The samples that `shown` names, with their media.
        limits: Of the recipe: what is too large to be drawn.
        least_score: Of the boxes and instances that are drawn.

    Returns:
        The files, each whole or not at all. Without matplotlib the contact sheets alone, and a warning.
    """
    for path in folder.iterdir():
        if is_picture(path.name):
            path.unlink()
    written = []
    for name, picture in _pictures(report, samples, limits, least_score):
        path = folder / f"{name.replace('/', '-')}.png"
        with atomic_file(path) as file:
            file.write(picture)
        written.append(path)
    return written


def shown(report: Report, places: Sequence[Place]) -> list[Place]:
    """Places of the samples of contact sheets: of each dataset and task so many, spread evenly over it."""
    wanted = set()
    for group in _groups(report).values():
        wanted |= {one.identity for one in _spread(group)}
    return [place for place in places if place.identity in wanted]


def _groups(report: Report) -> dict[str, list[Answered]]:
    groups: dict[str, list[Answered]] = {}
    for record in report.records:
        if isinstance(record, Answered):
            groups.setdefault(f"{record.dataset}/{record.task}", []).append(record)
    return groups


def _spread(group: Sequence[Answered]) -> list[Answered]:
    count = min(_NUM_SAMPLES, len(group))
    return [group[index * len(group) // count] for index in range(count)]


def _pictures(
    report: Report, samples: Iterable[tuple[Place, Sample | SkippedSample]], limits: Limits, least_score: float
) -> Iterator[tuple[str, bytes]]:
    known = {place.identity: picture for place, sample in samples if (picture := picture_of(sample, limits)) is not None}
    for name, group in _groups(report).items():
        if cells := [(one, known[one.identity]) for one in _spread(group) if one.identity in known]:
            file = io.BytesIO()
            contact_sheet(cells, least_score=least_score).save(file, "PNG")
            yield f"samples-{name}", file.getvalue()
    try:
        import matplotlib
    except ImportError:
        _log.warning("charts need matplotlib, which is not installed; pip install 'megamm[plots]'")
        return
    matplotlib.use("Agg")
    # A label may hold any characters, dollars too.
    with matplotlib.rc_context({"text.parse_math": False}):
        yield from _charts(report)


def _charts(report: Report) -> Iterator[tuple[str, bytes]]:
    for name, confusion in report.confusions.items():
        if len(confusion.classes) <= MAX_CLASSES:
            yield f"confusion-{name}", confusion_chart(confusion, name)
    for name, group in _groups(report).items():
        if name not in report.problems and (chart := _precisions(group, report.precisions.get(name, ()), name)):
            yield f"precision-{name}", chart
    for name in dict.fromkeys(f"{row.dataset}/{row.task}" for row in report.robustness):
        yield f"robustness-{name}", robustness_chart([row for row in report.robustness if f"{row.dataset}/{row.task}" == name], name)


def picture_of(sample: Sample | SkippedSample | None, limits: Limits) -> Any:
    """The first picture of a sample, a `PIL.Image` in RGB; None where it has none within the limits."""
    parts = [part for message in sample.messages for part in message.content] if isinstance(sample, Sample) else []
    member = next((part.member for part in parts if part.type == "image"), None)
    try:
        return None if member is None else decode_picture(sample.media[member], limits)
    except (MediaError, KeyError):
        return None


def contact_sheet(cells: Sequence[tuple[Answered, Any]], *, least_score: float = 0.0) -> Any:
    """A grid of answers and their pictures as `PIL.Image`, where there are places what was asked for beside what was answered.

    Args:
        cells: Records and pictures.
        least_score: Of the boxes and instances that are drawn and counted.
    """
    from PIL import Image, ImageDraw, ImageFont

    has_places = any(record.reference.boxes or record.reference.instances for record, _ in cells)
    width, rows = _SIDE * (2 if has_places else 1), -(-len(cells) // _NUM_COLUMNS)
    sheet = Image.new("RGB", (width * min(_NUM_COLUMNS, len(cells)), (_SIDE + _CAPTION) * rows), (255, 255, 255))
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    # One colour a label in all of the sheet.
    colours: dict[str, Colour] = {}
    for number, (record, picture) in enumerate(cells):
        left, top = number % _NUM_COLUMNS * width, number // _NUM_COLUMNS * (_SIDE + _CAPTION)
        answer = record.answer.surer_than(least_score)
        replies = [record.reference, answer] if has_places else [Reply()]
        for place, reply in enumerate(replies):
            drawn = draw_reply(picture, reply, longest_side=_SIDE - 8, colours=colours)
            sheet.paste(drawn, (left + place * _SIDE + 4, top + 4))
        wanted, given = (words_of(record, reply) for reply in (record.reference, answer))
        canvas.text((left + 4, top + _SIDE), _cut(f"is: {wanted}", width), fill=_BLACK, font=font)
        # As many places may be other places, so that counts are neither right nor wrong.
        colour = _BLACK if has_places else _GREEN if wanted == given else _RED
        canvas.text((left + 4, top + _SIDE + 18), _cut(f"said: {given}", width), fill=colour, font=font)
    return sheet


def words_of(record: Answered, reply: Reply) -> str:
    """What the reference or the answer of a record says, in a few words on one line."""
    if reply.boxes or reply.instances or record.reference.boxes or record.reference.instances:
        return f"{sum(not box.is_crowd for box in reply.boxes) + len(reply.instances)} found"
    if reply.items or record.reference.items:
        return ", ".join(item.id for item in reply.items[:_NUM_ITEMS]) or "–"
    said = TASKS[record.task].parse(reply) if reply.text else ""
    words = ", ".join(sorted(said)) if isinstance(said, frozenset) else str(said)
    return " ".join(words.split()) or "–"


def _cut(text: str, width: int) -> str:
    most = width // 7
    return text if len(text) <= most else text[: most - 1] + "…"


def _precisions(group: Sequence[Answered], classes: Sequence[ClassPrecision], name: str) -> bytes:
    """Curves of a task whose answers have scores: places, labels of a head, or classes named in tokens; nothing for others."""
    if not classes:
        return _label_precisions(group, name)
    curves = [
        Curve(f"{one.label}  (AP50 {one.ap50:.3f}, n = {one.num_references})", RECALLS[::-1], one.precisions[::-1]) for one in classes
    ]
    return precision_chart(curves, name, what=" at an IoU of 0.5")


def _label_precisions(group: Sequence[Answered], name: str) -> bytes:
    scores = [_label_scores(one) for one in group]
    if not any(scores):
        return b""
    wanted = [TASKS[one.task].parse(one.reference) for one in group]
    labels = [{one} if isinstance(one, str) else frozenset(one) for one in wanted]
    found = label_precisions(scores, labels)
    curves = [
        Curve(f"{one.label}  (AP {one.average_precision:.3f}, n = {one.num_references})", one.recalls, one.precisions) for one in found
    ]
    return precision_chart(curves, name, what="")


def _label_scores(record: Answered) -> dict[str, float]:
    """Label -> score: all labels of a head; of an answer in tokens the classes that it names, each as likely as the answer."""
    task, answer = TASKS[record.task], record.answer
    if answer.labels or answer.probability is None or task.classes is None:
        return {one.label: one.score for one in answer.labels}
    named = task.parse(answer)
    return dict.fromkeys([named] if isinstance(named, str) else named, answer.probability)
