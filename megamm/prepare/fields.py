"""One row of a table to one sample: the fields that columns can fill, and how they become a chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megamm.core.errors import ConfigError, DataError
from megamm.prepare.columns import Columns, resolve
from megamm.prepare.inputs import member
from megamm.prepare.names import plain_key
from megamm.prepare.pictures import instance_png, numbered, plain_size, read_instances
from megamm.prepare.rows import is_text
from megamm.prepare.source import Draft, Record, default_prompt

FIELDS = {
    "image": "picture that is asked about",
    "audio": "sound that is asked about",
    "text": "text that is asked about",
    "prompt": "question, instead of --prompt",
    "system": "system message",
    "label": "answer that is a class, or several",
    "answer": "answer that is text",
    "answer_image": "answer that is a picture",
    "answer_audio": "answer that is a sound",
    "mask": "answer that is a PNG with the instance of each pixel, 0 for none",
    "mask_label": "what the instances are called",
    "document": "plain text to learn, alone",
    "key": "name of the sample",
    "split": "part of the data that the row belongs to, such as train or test",
    "group": "what must stay on one side of --test-share",
    "metadata": "kept beside the sample under the column's name",
}
"""Field -> what a column brings that fills it."""

REPEATED = ("image", "audio", "answer_image", "answer_audio", "metadata")
MEDIA = ("image", "audio", "answer_image", "answer_audio", "mask")
_QUESTION = ("image", "audio", "text", "prompt")
_ASKED_ABOUT = ("image", "audio", "text")
_ANSWER = ("label", "answer", "answer_image", "answer_audio", "mask")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

Load = Callable[[Any], tuple[bytes, str]]
"""Reads a medium's value: its bytes, and its name for errors."""


@dataclass(frozen=True)
class RowLayout:
    """How rows become samples; made by `row_layout`.

    Attributes:
        columns: The columns of each field.
        task: Of every sample.
        prompt: Question where no column brings one; `{COLUMN}` stands for a column's text.
        is_answered: Whether samples hold answers.
    """

    columns: Columns
    task: str
    prompt: str
    is_answered: bool = True

    def draft(self, values: Mapping[str, Any], load: Load) -> Draft:
        """The sample of a row.

        Args:
            values: By column.
            load: Reads its media.

        Raises:
            DataError: A value is missing or of another kind, or a medium is not there.
        """
        metadata = {column: values.get(column) for column in self.columns.get("metadata", ())}
        if "document" in self.columns:
            content = [{"type": "text", "text": self._text(values, "document")}]
            return Draft({**metadata, "task": self.task, "messages": [{"role": "assistant", "content": content}]})
        row = _RowParts(load)
        messages = []
        if system := self._text(values, "system", ""):
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": self._question(values, row)})
        if self.is_answered:
            messages.append({"role": "assistant", "content": self._answer(values, row)})
        return Draft({**metadata, "task": self.task, "messages": messages}, row.members)

    @property
    def used(self) -> list[str]:
        """The columns that a sample depends on."""
        return sorted({column for filling in self.columns.values() for column in filling} | set(_PLACEHOLDER.findall(self.prompt)))

    def record(self, values: Mapping[str, Any], number: int, num_bytes: int, data: Any) -> Record:
        """The record of a row: its key is its name where a column brings one, else its number.

        Raises:
            DataError: Its key, split or group is no text.
        """
        name, split, group = (self._text(values, field, "") for field in ("key", "split", "group"))
        if not is_text(name + split + group):
            raise DataError("its key, split or group is no whole Unicode")
        return Record(plain_key(name) if name else f"row-{number:08}", num_bytes, data, split, group)

    def media(self, values: Mapping[str, Any], field: str) -> list[Any]:
        """What the columns of a field of `MEDIA` hold; a column may hold nothing, one medium or a list."""
        found: list[Any] = []
        for column in self.columns.get(field, ()):
            value = values.get(column)
            found += value if isinstance(value, list) else [value]
        return [value for value in found if value not in (None, "")]

    def _question(self, values: Mapping[str, Any], row: _RowParts) -> list[dict[str, Any]]:
        parts = [row.medium(type_, value) for type_ in ("image", "audio") for value in self.media(values, type_)]
        text = self._text(values, "text", "")
        asked = [field for field in _ASKED_ABOUT if field in self.columns]
        # Of several a row may hold one; a row without any would be a question about nothing.
        if asked and not parts and not text:
            raise DataError(f"nothing is asked about: {self._named(asked)} is empty")
        prompt = self._text(values, "prompt", "") or _PLACEHOLDER.sub(lambda found: as_text(values.get(found[1])), self.prompt)
        if text:
            parts.append({"type": "text", "text": f"{text}\n" if prompt else text})
        if prompt:
            parts.append({"type": "text", "text": prompt})
        if not parts:
            raise DataError(f"no question: nothing in {self._named(_QUESTION)}")
        return parts

    def _answer(self, values: Mapping[str, Any], row: _RowParts) -> list[dict[str, Any]]:
        texts = [("label", self._text(values, "label", "")), ("text", self._text(values, "answer", ""))]
        parts: list[dict[str, Any]] = [{"type": type_, "text": text} for type_, text in texts if text]
        for type_ in ("image", "audio"):
            parts += [row.medium(type_, value) for value in self.media(values, f"answer_{type_}")]
        for value in self.media(values, "mask"):
            parts.append(row.mask(value, self._text(values, "mask_label", "object")))
        if not parts:
            raise DataError(f"no answer: nothing in {self._named(_ANSWER)}")
        return parts

    def _text(self, values: Mapping[str, Any], field: str, missing: str | None = None) -> str:
        column = self.columns[field][0] if field in self.columns else ""
        try:
            text = as_text(values.get(column)) if column else ""
        except DataError as error:
            raise DataError(f"column {column}: {error}") from None
        if not text and missing is None:
            raise DataError(f"column {column} is empty")
        return text or (missing or "")

    def _named(self, fields: Sequence[str]) -> str:
        return ", ".join(column for field in fields for column in self.columns.get(field, ())) or "all fields"


def row_layout(
    pairs: Sequence[tuple[str, str]], existing: Sequence[str], *, task: str, prompt: str, answers: str, where: str
) -> tuple[RowLayout, list[str]]:
    """How the rows of a table become samples.

    Args:
        pairs: `--map`.
        existing: The table's columns.
        task: `--task`; empty to take what the fields say.
        prompt: `--prompt`; empty for the task's own.
        answers: `--answers`: `keep`, or `drop` for samples without.
        where: The table, for the error.

    Returns:
        The layout, and notes on columns that are not used.

    Raises:
        ConfigError: A column or field does not exist, or the fields make no sample.
    """
    columns = resolve(pairs, existing, FIELDS, repeated=REPEATED, where=where)
    if unknown := sorted(set(_PLACEHOLDER.findall(prompt)) - set(existing)):
        raise ConfigError(f"--prompt holds {{{unknown[0]}}}, and {where} has no such column; its columns are {', '.join(existing)}")
    if answers == "drop":
        if not task:
            raise ConfigError("samples without answers do not say their task; name it with --task")
        columns = {field: filling for field, filling in columns.items() if field not in (*_ANSWER, "mask_label")}
    if "document" in columns:
        if answers == "drop":
            raise ConfigError("a document is all answer, so --answers drop would leave nothing of it; leave that out, or map no document")
        if others := sorted(columns.keys() & {*_QUESTION, *_ANSWER, "system"}):
            raise ConfigError(f"a document stands alone, and {', '.join(others)} are filled as well; map their columns to metadata")
        task = task or "text"
    else:
        if answers == "keep" and not columns.keys() & set(_ANSWER):
            raise ConfigError(f"no column of {where} is an answer ({', '.join(_ANSWER)}) or a document; it has {', '.join(existing)}")
        task = task or ("classification" if "label" in columns else "segmentation" if "mask" in columns else "")
        if not task:
            raise ConfigError(f"the fields {', '.join(sorted(columns))} fit several tasks; name one with --task")
        # A task's own prompt asks about something: without that all samples would be one question with many answers.
        if not prompt and not columns.keys() & set(_QUESTION):
            raise ConfigError(f"no column of {where} is asked about ({', '.join(_QUESTION)}); map one, or ask with --prompt")
        prompt = prompt or ("" if "prompt" in columns else default_prompt(task))
        if "mask" in columns and len(columns.get("image", ())) != 1:
            raise ConfigError("a mask needs one picture that it lies over; map one column to image")
    if reserved := sorted({"task", "messages"} & set(columns.get("metadata", ()))):
        raise ConfigError(f"the column {reserved[0]} cannot be kept as metadata, samples have a field of that name; rename it")
    layout = RowLayout(columns, task, prompt, answers == "keep")
    used = layout.used
    return layout, [f"column {column} is not used" for column in existing if column not in used]


def as_text(value: Any) -> str:
    """The text of a value: numbers as they are written, lists joined by commas, nothing for nothing.

    Raises:
        DataError: It is no text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    raise DataError(f"{str(value)[:80]!r} is {type(value).__name__}, not text")


class _RowParts:
    """The media of one sample as they are met. State: the members so far."""

    def __init__(self, load: Load) -> None:
        self.members: dict[str, bytes] = {}
        self._load = load
        self._picture: tuple[bytes, str] | None = None

    def medium(self, type_: str, value: Any) -> dict[str, Any]:
        content, name = self._load(value)
        suffix = member(len(self.members), type_, content, name)
        self.members[suffix] = content
        if type_ == "image" and self._picture is None:
            self._picture = content, name
        return {"type": type_, "member": suffix}

    def mask(self, value: Any, label: str) -> dict[str, Any]:
        if self._picture is None:
            raise DataError("a mask without the picture that it lies over")
        content, name = self._load(value)
        instances, num_instances = numbered(read_instances(content, plain_size(*self._picture), name))
        suffix = f"{len(self.members)}.mask.png"
        self.members[suffix] = instance_png(instances)
        return {"type": "mask", "image": 0, "member": suffix, "labels": [label] * num_instances}
