"""What came of labelling: how much was kept of which label, and how often it was right where that can be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megamm.core.files import write_json, write_text
from megamm.core.tables import markdown
from megamm.labelling.answers import Labelled

NAME = "pseudo-labels"


@dataclass(frozen=True, slots=True)
class LabelCount:
    """One label: how often the model said it, and how often surely enough."""

    label: str
    num_said: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class LabellingReport:
    """What came of labelling.

    Attributes:
        source: The model.
        step: Of its checkpoint; None for an exported folder.
        threshold: Least confidence of what was kept.
        num_samples: That were asked about, those without a label included.
        num_labelled: With a label.
        num_kept: Of which so many were sure enough.
        num_known: Samples with a label whose own answer was there, hidden from the model.
        accuracy: Share of these that it gave; None without any.
        accuracy_kept: Likewise of those that were kept.
        labels: By label, the commonest first.
        reasons: Why there is no label -> number of samples.
    """

    source: str
    step: int | None
    threshold: float
    num_samples: int
    num_labelled: int
    num_kept: int
    num_known: int
    accuracy: float | None
    accuracy_kept: float | None
    labels: tuple[LabelCount, ...]
    reasons: dict[str, int]

    @classmethod
    def of(cls, answers: Sequence[Labelled], threshold: float, *, source: str, step: int | None) -> LabellingReport:
        """Count answers."""
        labelled = [one for one in answers if one.label]
        kept = [one for one in labelled if one.confidence >= threshold]
        said, sure = _counts(one.label for one in labelled), _counts(one.label for one in kept)
        return cls(
            source=source,
            step=step,
            threshold=threshold,
            num_samples=len(answers),
            num_labelled=len(labelled),
            num_kept=len(kept),
            num_known=sum(one.is_right is not None for one in labelled),
            accuracy=_accuracy(labelled),
            accuracy_kept=_accuracy(kept),
            labels=tuple(LabelCount(label, num, sure.get(label, 0)) for label, num in said.items()),
            reasons=_counts(one.reason for one in answers if not one.label),
        )

    def write(self, folder: Path) -> None:
        """Write `pseudo-labels.json` and `pseudo-labels.md`."""
        write_json(folder / f"{NAME}.json", asdict(self))
        write_text(folder / f"{NAME}.md", self.to_markdown())

    def to_markdown(self) -> str:
        """For people."""
        where = self.source if self.step is None else f"{self.source} at step {self.step}"
        lines = [f"{self.num_kept:,} of {self.num_samples:,} samples have a label of confidence {self.threshold:g} or more, by {where}."]
        if self.accuracy is not None:
            right = f"{self.num_known:,} samples had an answer that the model did not see: {self.accuracy:.1%} of its labels agree"
            lines.append(right + (f", of those that were kept {self.accuracy_kept:.1%}." if self.accuracy_kept is not None else "."))
        lines += [f"{num:,} without a label: {reason}." for reason, num in self.reasons.items()]
        table = markdown(("label", "said", "kept"), [(one.label, one.num_said, one.num_kept) for one in self.labels])
        return "\n\n".join(["# pseudo-labels", *lines, "\n".join(table)]) + "\n"


def _accuracy(answers: Sequence[Labelled]) -> float | None:
    known = [one.is_right for one in answers if one.is_right is not None]
    return sum(known) / len(known) if known else None


def _counts(words: Iterable[str]) -> dict[str, int]:
    """Word -> how often, the commonest first, equal ones by name."""
    return dict(sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])))
