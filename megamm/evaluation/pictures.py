"""An evaluation in pictures: confusion matrices, precision-recall curves, and samples with what the model said of them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamm.core.types import Sample
from megamm.data.media.files import MediaError, decode_picture
from megamm.evaluation.held_out import Place
from megamm.evaluation.records import Answered, SkippedSample
from megamm.evaluation.report import Report, is_picture
from megamm.inference.drawing import draw_reply
from megamm.metrics.boxes import match_boxes
from megamm.metrics.classes import Confusion
from megamm.metrics.coco import RECALLS, ClassPrecision
from megamm.metrics.masks import match_instances
from megamm.tasks import TASKS
from megamm.tasks.reply import Reply

_MAX_CLASSES = 40
_NUM_SAMPLES = 24
_NUM_COLUMNS = 6
_SIDE = 192
_CAPTION = 44


def write_pictures(report: Report, folder: Path, samples: Iterable[tuple[Place, Sample | SkippedSample]]) -> list[Path]:
    """Draw what there is to draw beside a report; a task without figures has no curves.

    Args:
        report: What was found.
        folder: Of the report.
        samples: The samples that `shown` names, with their media.

    Returns:
        The files. Without matplotlib the contact sheets alone.
    """
    for path in folder.iterdir():
        if is_picture(path.name):
            path.unlink()
    written = []
    for name, picture in _pictures(report, samples):
        path = folder / f"{name.replace('/', '-')}.png"
        path.write_bytes(picture)
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


def _pictures(report: Report, samples: Iterable[tuple[Place, Sample | SkippedSample]]) -> Iterator[tuple[str, bytes]]:
    known = {place.identity: picture for place, sample in samples if (picture := _picture(sample)) is not None}
    for name, group in _groups(report).items():
        if sheet := _contact_sheet([(one, known[one.identity]) for one in _spread(group) if one.identity in known]):
            yield f"samples-{name}", sheet
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    for name, confusion in report.confusions.items():
        if len(confusion.classes) <= _MAX_CLASSES:
            yield f"confusion-{name}", _confusion(confusion, name)
    for name, group in _groups(report).items():
        if name not in report.problems and (curves := _precisions(group)):
            yield f"precision-{name}", _curves(curves, name)


def _picture(sample: Sample | SkippedSample) -> Any:
    """The first picture of a sample, decoded; None where it has none."""
    parts = [] if isinstance(sample, SkippedSample) else [part for message in sample.messages for part in message.content]
    member = next((part.member for part in parts if part.type == "image"), None)
    try:
        return None if member is None else decode_picture(sample.media[member])
    except (MediaError, KeyError):
        return None


def _contact_sheet(cells: Sequence[tuple[Answered, Any]]) -> bytes:
    """A grid of samples, where there are places what was asked for beside what was answered; nothing without a picture."""
    from PIL import Image, ImageDraw, ImageFont

    if not cells:
        return b""
    has_places = any(record.reference.boxes or record.reference.instances for record, _ in cells)
    width, rows = _SIDE * (2 if has_places else 1), -(-len(cells) // _NUM_COLUMNS)
    sheet = Image.new("RGB", (width * _NUM_COLUMNS, (_SIDE + _CAPTION) * rows), (255, 255, 255))
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (record, picture) in enumerate(cells):
        left, top = number % _NUM_COLUMNS * width, number // _NUM_COLUMNS * (_SIDE + _CAPTION)
        replies = [record.reference, record.answer] if has_places else [Reply()]
        for place, reply in enumerate(replies):
            sheet.paste(draw_reply(picture, reply, longest_side=_SIDE - 8), (left + place * _SIDE + 4, top + 4))
        wanted, given = (_words(record, reply) for reply in (record.reference, record.answer))
        canvas.text((left + 4, top + _SIDE), _cut(f"is: {wanted}", width), fill=(0, 0, 0), font=font)
        colour = (0, 110, 60) if wanted == given else (190, 40, 0)
        canvas.text((left + 4, top + _SIDE + 18), _cut(f"said: {given}", width), fill=colour, font=font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _words(record: Answered, reply: Any) -> str:
    if reply.boxes or reply.instances or record.reference.boxes or record.reference.instances:
        return f"{len(reply.boxes) + len(reply.instances)} found"
    return str(TASKS[record.task].parse(reply)) if reply.text else "–"


def _cut(text: str, width: int) -> str:
    most = width // 7
    return text if len(text) <= most else text[: most - 1] + "…"


def _precisions(group: Sequence[Answered]) -> tuple[ClassPrecision, ...]:
    predictions, references = [one.answer for one in group], [one.reference for one in group]
    if any(one.boxes for one in references):
        return match_boxes([one.boxes for one in predictions], [one.boxes for one in references]).scores().classes
    if any(one.instances for one in references):
        return match_instances([one.instances for one in predictions], [one.instances for one in references]).scores().classes
    return ()


def _curves(classes: Sequence[ClassPrecision], name: str) -> bytes:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), dpi=120, layout="constrained")
    for one in classes[:_MAX_CLASSES]:
        axes.plot(RECALLS, one.precisions, label=f"{one.label}  (AP50 {one.ap50:.3f}, n = {one.num_references})", linewidth=1.6)
    axes.set(xlabel="recall at an IoU of 0.5", ylabel="precision", title=name, xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    return _png(figure)


def _confusion(confusion: Confusion, name: str) -> bytes:
    from matplotlib import pyplot

    counts, known = np.array(confusion.counts, dtype=float), len(confusion.classes)
    # All answers that are no class share one column.
    counts = np.concatenate([counts[:, :known], counts[:, known:].sum(axis=1, keepdims=True)], axis=1)
    columns = [*confusion.classes, "(other)"]
    shares = counts / counts.sum(axis=1, keepdims=True)
    side = 2.5 + 0.42 * known
    figure, axes = pyplot.subplots(figsize=(side + 0.8, side), dpi=120, layout="constrained")
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(known + 1), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(known), confusion.classes, fontsize=8)
    axes.set(xlabel="answer", ylabel="reference", title=name)
    figure.colorbar(drawn, ax=axes, label="share of the class", shrink=0.8)
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="png")
    pyplot.close(figure)
    return file.getvalue()
