"""The one layout of every sample: a chat document becomes messages, messages become ids with their supervised places.

A chat is `<|bos|>`, then for each message `<|role|>`, its parts, `<|end|>`. A picture is `<|image_start|>`, one `<|image|>` for each of its
tokens, `<|image_end|>`; a sound likewise. A plain document, which is one assistant message alone, is `<|bos|>`, its parts, `<|eos|>`.
The jinja template of `megamm.tokenizers.chat_template` says the same for transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from megamm.core.errors import DataError
from megamm.core.types import MEDIA_TYPES, ROLES, Message, Part, Sample
from megamm.tasks import TASKS
from megamm.tokenizers.text import TextTokenizer

_PART_FIELDS = {"text": "text", "label": "text", "image": "member", "audio": "member"}
"""The one field of each part type besides `type`."""

_MEMBER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample's ids: `input_ids` int32[T], `supervised` bool[T] (True where the token itself is a target)."""

    input_ids: np.ndarray
    supervised: np.ndarray


def parse_sample(key: str, document: Any, *, where: str) -> Sample:
    """Read the content of `KEY.json` strictly; media bytes are added by whoever reads the shard.

    Args:
        key: Sample key.
        document: The parsed JSON. Its fields besides `task` and `messages` become the sample's metadata.
        where: Shard and key, for the error.

    Raises:
        DataError: Something is missing, unknown or of another type; names `where`.
    """
    fields = _object(document, "sample", where)
    task = _string(fields, "task", "sample", where)
    if task not in TASKS:
        raise DataError(f"{where}: task {task!r} is not one of {', '.join(TASKS)}; name one of them or add it to megamm.tasks")
    messages = tuple(_message(value, f"message {index}", where) for index, value in enumerate(_list(fields, "messages", "sample", where)))
    _check_turns(task, messages, where)
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
        DataError: The number of pictures or sounds is not the number of their token counts.
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
        DataError: The chat does not end with an answer to something.
    """
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError("the chat does not end with an assistant's answer to a message; only such samples can be evaluated")
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


def _message(value: Any, what: str, where: str) -> Message:
    fields = _object(value, what, where)
    _only(fields, ("role", "content"), what, where)
    role = _string(fields, "role", what, where)
    if role not in ROLES:
        raise DataError(f"{where}: {what} has role {role!r}; roles are {', '.join(ROLES)}")
    if isinstance(fields.get("content"), str):
        parts = (Part("text", text=_string(fields, "content", what, where)),)
    else:
        values = _list(fields, "content", what, where)
        parts = tuple(_part(part, f"{what}, part {index}", where) for index, part in enumerate(values))
    return Message(role, parts)


def _part(value: Any, what: str, where: str) -> Part:
    fields = _object(value, what, where)
    type_name = _string(fields, "type", what, where)
    if type_name not in _PART_FIELDS:
        raise DataError(f"{where}: {what} has type {type_name!r}; part types are {', '.join(_PART_FIELDS)}")
    name = _PART_FIELDS[type_name]
    _only(fields, ("type", name), what, where)
    content = _string(fields, name, what, where)
    if name == "member" and not _MEMBER.fullmatch(content):
        raise DataError(f"{where}: {what} names member {content!r}; a member is the suffix after the key, such as 0.png")
    return Part(type_name, **{name: content})


def _object(value: Any, what: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {what} is {type(value).__name__}, not a JSON object")
    return value


def _only(fields: Mapping[str, Any], known: Sequence[str], what: str, where: str) -> None:
    if unknown := sorted(set(fields) - set(known)):
        raise DataError(f"{where}: {what} has unknown fields {', '.join(unknown)}; it takes {', '.join(known)}")


def _list(fields: Mapping[str, Any], name: str, what: str, where: str) -> list[Any]:
    if name not in fields:
        raise DataError(f"{where}: {what} has no {name}")
    if not isinstance(fields[name], list) or not fields[name]:
        raise DataError(f"{where}: {name} of {what} is {str(fields[name])[:80]!r}, not a list with something in it")
    return fields[name]


def _string(fields: Mapping[str, Any], name: str, what: str, where: str) -> str:
    if name not in fields:
        raise DataError(f"{where}: {what} has no {name}")
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {name} of {what} is {str(value)[:80]!r}, not a string with something in it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name} of {what} holds half of a surrogate pair; write it as UTF-8 or as a whole \\u pair") from None
    return value
