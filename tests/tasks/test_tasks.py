import pytest

from megamm.tasks import TASKS
from megamm.tasks.reply import Reply


def test_the_table_is_keyed_by_name():
    assert list(TASKS) == ["classification", "speech_recognition", "text"]
    assert all(task.name == name and task.prompt for name, task in TASKS.items())


def test_classification():
    task = TASKS["classification"]
    predictions = [task.parse(Reply(answer)) for answer in (" 7", "7\n", "3")]
    references = ["7", "7", "7"]
    assert task.metrics(predictions, references) == {"accuracy": pytest.approx(2 / 3), "macro_recall": pytest.approx(2 / 3)}
    assert task.chance(["7", "3", "3", "1"]) == 0.5


def test_speech_recognition():
    task = TASKS["speech_recognition"]
    predictions = [task.parse(Reply(answer)) for answer in ("Seven ", "one  two")]
    assert predictions == ["seven", "one two"]
    metrics = task.metrics(predictions, ["seven", "one"])
    assert metrics["accuracy"] == 0.5
    assert metrics.get("word_error_rate", 0.5) == 0.5  # one word too many for two words
    assert task.chance(["one", "one", "two"]) == pytest.approx(2 / 3)


def test_text_is_measured_by_its_loss_alone():
    task = TASKS["text"]
    assert task.parse(Reply(" a ")) == " a "
    assert task.metrics(["a"], ["b"]) == {}
    assert task.chance(["b"]) is None
