"""The one layout of every sample: a chat document becomes messages, messages become ids with their supervised places.

A chat is `<|bos|>`, then for each message `<|role|>`, its parts, `<|end|>`. A picture is `<|image_start|>`, one `<|image|>` for each of its
tokens, `<|image_end|>`; a sound likewise. A plain document, which is one assistant message alone, is `<|bos|>`, its parts, `<|eos|>`.
The jinja template of `megamm.tokenizers.chat_template` says the same for transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from megamm.core.errors import DataError
from megamm.core.types import MEDIA_TYPES, ROLES, Message, Part, Sample
from megamm.tasks.parts import filled_list, json_object, only, parse_part, string
from megamm.tokenizers.text import TextTokenizer

TASK_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TEXT_TYPES = frozenset({"text", "label"})


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample's ids: `input_ids` int32[T], `supervised` bool[T] (True where the token itself is a target)."""

    input_ids: np.ndarray
    supervised: np.ndarray


def parse_sample(key: str, document: Any, *, where: str) -> Sample:
    """Read the content of `KEY.json` strictly; media bytes are added by whoever reads the shard.

    Any task name is taken, so that a model can learn tasks that `megamm.tasks.TASKS` cannot evaluate.

    Args:
        key: Sample key.
        document: The parsed JSON. Its fields besides `task` and `messages` become the sample's metadata.
        where: Shard and key, for the error.

    Raises:
        DataError: Something is missing, unknown or of another type; names `where`.
    """
    fields = json_object(document, "sample", where)
    task = string(fields, "task", "sample", where)
    if not TASK_NAME.fullmatch(task):
        raise DataError(f"{where}: task {task[:80]!r} is not a name of small letters, digits and '_', such as classification")
    turns = filled_list(fields, "messages", "sample", where)
    messages = tuple(_message(value, f"message {index}", where) for index, value in enumerate(turns))
    _check_turns(task, messages, where)
    _check_pictures(messages, where)
    metadata = {name: value for name, value in fields.items() if name not in ("task", "messages")}
    return Sample(key=key, task=task, messages=messages, metadata=metadata)


def encode(
    messages: Sequence[Message],
    tokenizer: TextTokenizer,
    *,
    image_tokens: Sequence[int] = (),
    audio_tokens: Sequence[int] = (),
    supervise_all: bool = False,
) -> Encoded:
    """Lay out a whole sample.

    Supervised are the parts of assistant messages and the token that ends them; never the placeholders of media, which no id can tell.

    Args:
        messages: The chat, or one assistant message for a plain document.
        tokenizer: Of the run.
        image_tokens: Tokens of each picture, in the order of the parts.
        audio_tokens: Tokens of each sound, in the order of the parts.
        supervise_all: Supervise every message like the assistant's.

    Raises:
        DataError: The number of pictures or sounds is not the number of their token counts, or a part has no layout in tokens.
    """
    layout = _Layout(tokenizer, image_tokens=image_tokens, audio_tokens=audio_tokens)
    layout.control("bos")
    if is_document(messages):
        layout.parts(messages[0].content, supervised=True)
        layout.control("eos", supervised=True)
    else:
        layout.chat(messages, supervise_all=supervise_all)
    return layout.finish()


def prompt(
    messages: Sequence[Message], tokenizer: TextTokenizer, *, image_tokens: Sequence[int] = (), audio_tokens: Sequence[int] = ()
) -> np.ndarray:
    """Lay out a chat up to where the assistant's answer begins: int32[T], ending with `<|assistant|>`.

    Raises:
        DataError: The chat already ends with an answer, or the number of pictures or sounds is not the number of their token counts.
    """
    if not messages or messages[-1].role == "assistant":
        raise DataError("a prompt needs messages that end before an answer; split the answer off with template.split_answer")
    layout = _Layout(tokenizer, image_tokens=image_tokens, audio_tokens=audio_tokens)
    layout.control("bos")
    layout.chat(messages)
    layout.control("assistant")
    return layout.finish().input_ids


def is_document(messages: Sequence[Message]) -> bool:
    """True for a plain document: one assistant message and nothing that it answers."""
    return len(messages) == 1 and messages[0].role == "assistant"


def split_answer(messages: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """Take the last answer off a chat.

    Returns:
        The messages before it, and its text.

    Raises:
        DataError: The chat does not end with an answer to something, or the answer is not all text.
    """
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError("the chat does not end with an assistant's answer to a message; only such samples can be evaluated")
    if others := sorted({part.type for part in messages[-1].content} - _TEXT_TYPES):
        raise DataError(f"the answer holds {', '.join(others)} parts; only answers of text and labels can be compared as text")
    return tuple(messages[:-1]), "".join(part.text for part in messages[-1].content)


class _Layout:
    """Ids and supervised places, appended from left to right."""

    def __init__(self, tokenizer: TextTokenizer, *, image_tokens: Sequence[int], audio_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._num_tokens: dict[str, Iterator[int]] = {"image": iter(image_tokens), "audio": iter(audio_tokens)}
        self._ids: list[int] = []
        self._supervised: list[bool] = []

    def chat(self, messages: Sequence[Message], *, supervise_all: bool = False) -> None:
        for message in messages:
            supervised = supervise_all or message.role == "assistant"
            self.control(message.role)
            self.parts(message.content, supervised=supervised)
            self.control("end", supervised=supervised)

    def parts(self, content: Sequence[Part], *, supervised: bool) -> None:
        # Neighbouring text is encoded as one string, as a tokenizer that sees the rendered chat would.
        for is_media, run in groupby(content, key=lambda part: part.type in MEDIA_TYPES):
            if is_media:
                for part in run:
                    self._media(part.type)
            else:
                run = list(run)
                if others := sorted({part.type for part in run} - _TEXT_TYPES):
                    raise DataError(f"{', '.join(others)} parts have no layout in tokens; leave their dataset out of the mixture")
                self._append(self._tokenizer.encode("".join(part.text for part in run)), supervised)

    def control(self, name: str, *, supervised: bool = False) -> None:
        self._append([self._tokenizer.vocabulary.control_id(name)], supervised)

    def finish(self) -> Encoded:
        for type_name, rest in self._num_tokens.items():
            if next(rest, None) is not None:
                raise DataError(f"more {type_name} token counts than {type_name} parts; give one for each part")
        return Encoded(np.array(self._ids, dtype=np.int32), np.array(self._supervised, dtype=bool))

    def _media(self, type_name: str) -> None:
        num_tokens = next(self._num_tokens[type_name], None)
        if num_tokens is None:
            raise DataError(f"fewer {type_name} token counts than {type_name} parts; give one for each part")
        if num_tokens < 1:
            raise DataError(f"an {type_name} part of {num_tokens} tokens cannot be seen by the model; it takes at least 1")
        self.control(f"{type_name}_start")
        self._append([self._tokenizer.vocabulary.control_id(type_name)] * num_tokens, False)
        self.control(f"{type_name}_end")

    def _append(self, ids: Sequence[int], supervised: bool) -> None:
        self._ids += ids
        self._supervised += [supervised] * len(ids)


def _check_turns(task: str, messages: Sequence[Message], where: str) -> None:
    """What the layout and the loss need of the order of messages."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{where}: no assistant message, so nothing to learn; the roles are {roles}")
    if "system" in roles[1:]:
        raise DataError(f"{where}: a system message after the first message; the roles are {roles}")
    if (task == "text") != is_document(messages):
        wanted = "is one assistant message" if task == "text" else "needs a message before the assistant's"
        raise DataError(f"{where}: task {task!r} {wanted}; the roles are {roles}")


def _check_pictures(messages: Sequence[Message], where: str) -> None:
    """Boxes and masks must lie in a picture that stands before them."""
    num_pictures = 0
    for part in (part for message in messages for part in message.content):
        num_pictures += part.type == "image"
        if (picture := part.data.get("image", -1)) >= num_pictures:
            raise DataError(f"{where}: a {part.type} part lies in picture {picture}, and {num_pictures} pictures stand before it")


def _message(value: Any, what: str, where: str) -> Message:
    fields = json_object(value, what, where)
    only(fields, ("role", "content"), what, where)
    role = string(fields, "role", what, where)
    if role not in ROLES:
        raise DataError(f"{where}: {what} has role {role!r}; roles are {', '.join(ROLES)}")
    if isinstance(fields.get("content"), str):
        parts = (Part("text", text=string(fields, "content", what, where)),)
    else:
        values = filled_list(fields, "content", what, where)
        parts = tuple(parse_part(part, f"{what}, part {index}", where) for index, part in enumerate(values))
    return Message(role, parts)
