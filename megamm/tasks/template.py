"""The one layout of every sample: a chat document becomes messages, messages become ids with their supervised places.

A chat is `<|bos|>`, then for each message `<|role|>`, its parts, `<|end|>`. A picture is `<|image_start|>`, one `<|image|>` for each of its
tokens, `<|image_end|>`; a sound likewise. A plain document, which is one assistant message alone, is `<|bos|>`, its parts, `<|eos|>`.

A box is `<|box_start|>`, the locations of left, top, right and bottom, `<|box_end|>`, its label in text; an instance of a mask is
`<|mask_start|>`, the locations x and y of each corner of its outline, `<|mask_end|>`, its label. Both stand from top to bottom, then
from left to right, since their order in the data says nothing.

An item is the ids of its codes, one a level; but for an assistant's message, its description follows in text.

The jinja template of `megamm.tokenizers.chat_template` says the same of text and media for transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from megamm.core.errors import DataError
from megamm.core.geometry import Shape
from megamm.core.types import MEDIA_TYPES, ROLES, Message, Part, Sample
from megamm.tasks.parts import filled_list, json_object, only, parse_part, string
from megamm.tokenizers.text import TextTokenizer

TASK_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TEXT_TYPES = frozenset({"text", "label"})
_SHAPES = {"boxes": "box", "mask": "mask"}
"""Part type -> the name of the control tokens around one of its shapes."""


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
        document: The parsed JSON; a chat may lack its answer. Its fields besides `task` and `messages` become the sample's metadata.
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
    shapes: Sequence[Sequence[Shape]] = (),
    supervise_all: bool = False,
) -> Encoded:
    """Lay out a whole sample.

    Supervised are the parts of assistant messages and the token that ends them; never the placeholders of media, which no id can tell.
    Shapes that are not visible are left out and their tokens made up for by padding at the end, so that a length never depends on
    what a change of a picture leaves of it.

    Args:
        messages: The chat, or one assistant message for a plain document.
        tokenizer: Of the run.
        image_tokens: Tokens of each picture, in the order of the parts.
        audio_tokens: Tokens of each sound, in the order of the parts.
        shapes: Of each boxes and mask part, in the order of the parts, in shares of what the model sees of their picture.
        supervise_all: Supervise every message like the assistant's.

    Raises:
        DataError: Nothing is supervised, the number of pictures, sounds or lists of shapes is not that of their parts, or a part has no
            layout in tokens.
    """
    layout = _Layout(tokenizer, image_tokens=image_tokens, audio_tokens=audio_tokens, shapes=shapes)
    if not (supervise_all or any(message.role == "assistant" for message in messages)):
        raise DataError("no assistant message, so nothing to learn in tokens; label it, or train a masked head on it")
    layout.control("bos")
    if is_document(messages):
        layout.parts(messages[0].content, supervised=True)
        layout.control("eos", supervised=True)
    else:
        layout.chat(messages, supervise_all=supervise_all)
    return layout.finish()


def prompt(
    messages: Sequence[Message],
    tokenizer: TextTokenizer,
    *,
    image_tokens: Sequence[int] = (),
    audio_tokens: Sequence[int] = (),
    shapes: Sequence[Sequence[Shape]] = (),
) -> np.ndarray:
    """Lay out a chat up to where the assistant's answer begins: int32[T], ending with `<|assistant|>`.

    Raises:
        DataError: The chat already ends with an answer, or as `encode`.
    """
    if not messages or messages[-1].role == "assistant":
        raise DataError("a prompt needs messages that end before an answer; split the answer off with template.split_answer")
    layout = _Layout(tokenizer, image_tokens=image_tokens, audio_tokens=audio_tokens, shapes=shapes)
    layout.control("bos")
    layout.chat(messages)
    # Before the last token, from which the answer goes on.
    layout.make_up_for_hidden()
    layout.control("assistant")
    return layout.finish().input_ids


def is_document(messages: Sequence[Message]) -> bool:
    """True for a plain document: one assistant message and nothing that it answers."""
    return len(messages) == 1 and messages[0].role == "assistant"


def split_answer(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Part, ...]]:
    """Take the last answer off a chat: the messages before it, and its parts.

    Raises:
        DataError: The chat does not end with an answer to something.
    """
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError("the chat does not end with an assistant's answer to a message; only such samples can be evaluated")
    return tuple(messages[:-1]), messages[-1].content


class _Layout:
    """Ids and supervised places, appended from left to right."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        image_tokens: Sequence[int],
        audio_tokens: Sequence[int],
        shapes: Sequence[Sequence[Shape]],
    ) -> None:
        self._tokenizer = tokenizer
        self._num_tokens: dict[str, Iterator[int]] = {"image": iter(image_tokens), "audio": iter(audio_tokens)}
        self._shapes = iter(shapes)
        self._num_hidden = 0
        self._ids: list[int] = []
        self._supervised: list[bool] = []

    def chat(self, messages: Sequence[Message], *, supervise_all: bool = False) -> None:
        for message in messages:
            supervised = supervise_all or message.role == "assistant"
            self.control(message.role)
            self.parts(message.content, supervised=supervised, is_answer=message.role == "assistant")
            self.control("end", supervised=supervised)

    def parts(self, content: Sequence[Part], *, supervised: bool, is_answer: bool = True) -> None:
        # Neighbouring text is encoded as one string, as a tokenizer that sees the rendered chat would.
        for is_text, run in groupby(content, key=lambda part: part.type in _TEXT_TYPES):
            if is_text:
                self._append(self._tokenizer.encode("".join(part.text for part in run)), supervised)
                continue
            for part in run:
                if part.type in MEDIA_TYPES:
                    self._media(part.type)
                elif part.type in _SHAPES:
                    self._place(part.type, supervised)
                else:
                    self._append(self._item(part, is_answer), supervised)

    def control(self, name: str, *, supervised: bool = False) -> None:
        self._append([self._tokenizer.vocabulary.control_id(name)], supervised)

    def make_up_for_hidden(self) -> None:
        self._append([self._tokenizer.vocabulary.control_id("pad")] * self._num_hidden, False)
        self._num_hidden = 0

    def finish(self) -> Encoded:
        for type_name, rest in self._num_tokens.items():
            if next(rest, None) is not None:
                raise DataError(f"more {type_name} token counts than {type_name} parts; give one for each part")
        if next(self._shapes, None) is not None:
            raise DataError("more lists of shapes than boxes and mask parts; give one for each part")
        self.make_up_for_hidden()
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

    def _place(self, type_name: str, supervised: bool) -> None:
        shapes = next(self._shapes, None)
        if shapes is None:
            raise DataError("fewer lists of shapes than boxes and mask parts; give one for each part")
        for shape in sorted(shapes, key=lambda shape: (shape.bounds[1], shape.bounds[0], shape.bounds, shape.label)):
            ids = self._shape(_SHAPES[type_name], shape)
            if shape.is_visible:
                self._append(ids, supervised)
            else:
                self._num_hidden += len(ids)

    def _shape(self, name: str, shape: Shape) -> list[int]:
        vocabulary = self._tokenizer.vocabulary
        last = vocabulary.location - 1
        if last < 1:
            raise DataError(f"boxes and masks need locations, tokenizer.location_bins is {vocabulary.location}; set it to 1000")
        places = [vocabulary.location_id(round(share * last)) for point in shape.points for share in point]
        return [vocabulary.control_id(f"{name}_start"), *places, vocabulary.control_id(f"{name}_end"), *self._tokenizer.encode(shape.label)]

    def _item(self, part: Part, is_answer: bool) -> list[int]:
        if self._tokenizer.items is None:
            raise DataError(
                f"item {part.data['id']!r} has no codes: the tokenizer knows no items; set tokenizer.item_levels and item_codes"
            )
        codes = self._tokenizer.items.token_ids(part.data["id"], self._tokenizer.vocabulary)
        return codes if is_answer else codes + self._tokenizer.encode(part.text)

    def _append(self, ids: Iterable[int], supervised: bool) -> None:
        before = len(self._ids)
        self._ids += ids
        self._supervised += [supervised] * (len(self._ids) - before)


def _check_turns(task: str, messages: Sequence[Message], where: str) -> None:
    """What the layout needs of the order of messages. A chat without an answer is unlabelled, and no token of it can be learned."""
    roles = [message.role for message in messages]
    if not {"user", "assistant"} & set(roles):
        raise DataError(f"{where}: neither a user's nor an assistant's message; the roles are {roles}")
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
