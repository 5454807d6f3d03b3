"""What a model says of files, typed and in source coordinates (`megamm predict`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError
from megamm.core.types import Message, Part, Sample
from megamm.data.media.files import decode_picture, media_type
from megamm.inference import heads, replies
from megamm.inference.drawing import draw_reply
from megamm.inference.item_trie import ItemTrie
from megamm.inference.load import Loaded
from megamm.inference.prompt import make_prompt
from megamm.tasks import TASKS, recommendation
from megamm.tasks.reply import Reply


@dataclass(frozen=True, slots=True)
class Question:
    """One thing that is asked about.

    Attributes:
        files: A picture, a sound, or one of each; shown before the text.
        items: What a user met, the oldest first.
        text: What is asked; empty for the task's own prompt.
    """

    files: tuple[Path, ...] = ()
    items: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of a question."""

    question: Question
    reply: Reply

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        asked = {"files": [str(path) for path in self.question.files]} if self.question.files else {"text": self.question.text}
        return asked | ({"history": list(self.question.items)} if self.question.items else {}) | self.reply.to_json()


def predict(
    loaded: Loaded, task: str, questions: Sequence[Question], *, batch_size: int = 16, max_new_tokens: int = 512, num_items: int = 10
) -> Iterator[Prediction]:
    """Answer questions of one task, in their order: in tokens, by a ranking of items, or by the model's head where it has one.

    Args:
        loaded: The model.
        task: Its name.
        questions: What is asked about.
        batch_size: Questions that run at once.
        max_new_tokens: Bound on an answer, in tokens.
        num_items: Items of a recommendation, best first.

    Raises:
        ConfigError: The task is unknown, or a question holds nothing to ask about.
        DataError: A file cannot be used, or an item is unknown.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is not known; the tasks are {', '.join(TASKS)}")
    if task == "text":
        raise ConfigError("task 'text' continues documents and answers nothing; use `megamm generate`")
    has_head = loaded.model.head is not None
    trie = ItemTrie.of(loaded) if task == recommendation.TASK.name and not has_head else None
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        chats = [_messages(question, task) for question in batch]
        if has_head:
            said = heads.predict(loaded, [Sample("", task, messages, media) for messages, media in chats], batch_size=batch_size)
        else:
            prompts = [make_prompt(loaded, *chat) for chat in chats]
            if trie is not None:
                said = replies.rankings(loaded, trie, prompts, num_items=num_items)
            else:
                views = [prompt.images[0].view if prompt.images else None for prompt in prompts]
                said = replies.answers(loaded, prompts, views, max_new_tokens=max_new_tokens)
        yield from (Prediction(question, reply) for question, reply in zip(batch, said, strict=True))


def questions_of(files: Sequence[Path], items: Sequence[str], text: str) -> list[Question]:
    """A question for each file, or one without a file.

    Raises:
        ConfigError: A file is missing or is no picture and no sound, or nothing is asked about.
    """
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; name pictures and sounds")
        if media_type(path.name) is None:
            raise ConfigError(f"{path} is no picture and no sound that can be read; name a jpg, png, webp, wav, flac, ogg or mp3 file")
    if not files and not items and not text:
        raise ConfigError("nothing is asked about; name files, or give --text or --items")
    return [Question((path,), tuple(items), text) for path in files] or [Question((), tuple(items), text)]


def draw(prediction: Prediction, path: Path) -> bool:
    """Write a question's picture with the answer drawn over it; False where it is about no picture.

    Args:
        prediction: Of a question.
        path: A PNG; its folder is made where it is missing.
    """
    pictures = [path for path in prediction.question.files if media_type(path.name) == "image"]
    if not pictures:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_reply(decode_picture(pictures[0].read_bytes()), prediction.reply).save(path)
    return True


def line(prediction: Prediction) -> str:
    """A prediction as one line of JSON."""
    return json.dumps(prediction.to_json(), ensure_ascii=False)


def _messages(question: Question, task: str) -> tuple[tuple[Message, ...], dict[str, bytes]]:
    parts, media = [], {}
    for number, path in enumerate(question.files):
        member = f"{number}{path.suffix.lower()}"
        media[member] = path.read_bytes()
        parts.append(Part(media_type(path.name) or "", member=member))
    parts += [Part("item", data={"id": item}) for item in question.items]
    parts.append(Part("text", text=question.text or TASKS[task].prompt))
    return (Message("user", tuple(parts)),), media
