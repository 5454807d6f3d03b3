"""Figures of changed media beside clean ones, sample by sample."""

from pathlib import Path

import pytest

from megamm.evaluation.changes import select_changes
from megamm.evaluation.records import Answered, SkippedSample
from megamm.evaluation.report import make_report
from megamm.evaluation.robustness import change_rows, shown_media
from megamm.tasks.reply import Reply

(BLUR,) = select_changes(["blur"])


def answered(number, answer, *, change="", reference="one", media=("image",)):
    names = {"dataset": "x", "task": "classification", "shard": "a.tar", "number": number, "key": f"k{number}", "media": media}
    return Answered(**names, change=change, reference=Reply(reference), answer=Reply(answer))


def results(clean, blurred):
    found = [answered(number, answer) for number, answer in enumerate(clean)]
    found += [answered(number, answer, change="image_blur=0.01") for number, answer in enumerate(blurred) if answer]
    return {one.identity: one for one in found}


def test_a_row_is_over_the_samples_that_were_answered_both_ways():
    found = results(["one", "one", "two", "one"], ["one", "two", "two", ""])
    lost = SkippedSample(dataset="x", shard="a.tar", number=3, key="k3", change="image_blur=0.01", reason="r")
    (row,) = change_rows(found | {lost.identity: lost}, [BLUR])
    assert (row.change, row.strength, row.samples, row.metric) == ("image_blur", 0.01, 3, "accuracy")
    assert (row.value, row.clean, row.difference) == (pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(-1 / 3))
    assert row.difference_low <= row.difference <= row.difference_high


def test_the_interval_of_the_difference_is_of_pairs():
    """Answers that never change have no difference, however uncertain both figures are by themselves."""
    answers = ["one", "two"] * 20
    (same,) = change_rows(results(answers, answers), [BLUR])
    assert (same.difference, same.difference_low, same.difference_high) == (0, 0, 0)
    assert same.low < same.value < same.high


def test_a_task_without_figures_has_no_rows():
    names = {"dataset": "x", "task": "detection", "shard": "a.tar", "number": 0, "key": "k"}
    found = [Answered(**names, change=change, reference=Reply(), answer=Reply()) for change in ("", "image_blur=0.01")]
    assert change_rows({one.identity: one for one in found}, [BLUR]) == []


def test_only_samples_with_the_medium_are_changed():
    found = [answered(0, "one"), answered(1, "one", media=("audio",)), answered(2, "one", media=())]
    found.append(answered(0, "one", change="image_blur=0.01"))
    assert list(shown_media(found, "image")) == [("x", "a.tar", 0, "")]


def test_the_report_shows_them(tmp_path: Path):
    found = results(["one", "one"], ["one", "two"])
    report = make_report(
        [one for one in found.values() if not one.change], [], source="here", step=1, settings={}, robustness=change_rows(found, [BLUR])
    )
    text = report.to_markdown()
    assert "| x | classification | image_blur | 0.01 | 2 | accuracy | 0.5 |" in text and "`image_blur`: standard deviation" in text
    report.write(tmp_path)
    assert '"change":"image_blur"' in (tmp_path / "report.json").read_text().replace(": ", ":").replace(" ", "")
