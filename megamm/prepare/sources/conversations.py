"""Conversations in the forms that instruction data comes in: ShareGPT, LLaVA and OpenAI.

- ShareGPT: `{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}`
- LLaVA: the same with `"image": "path"` (or `images`, `audio`, `audios`), and `<image>` (`<audio>`) in the text where it stands.
- OpenAI: `{"messages": [{"role": "user", "content": "…" or [{"type": "text", …}, {"type": "image_url", …}, {"type": "input_audio", …}]}]}`
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError, DataError
from megamm.prepare.inputs import below, existing_input, member, read_input, size_of
from megamm.prepare.names import plain_key
from megamm.prepare.rows import is_text, open_table, open_text
from megamm.prepare.source import ROOT, TASK, Draft, Listing, Record, Source

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
_TAG = re.compile(r"<(image|audio)>")
_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})


def _records(*, input: Path, task: str, root: Path | None) -> Listing:
    """Every conversation is a record.

    Raises:
        ConfigError: INPUT is neither .json nor .jsonl.
        DataError: INPUT is not JSON.
    """
    root = existing_input(root or input.parent, folder=True)
    found = list(_conversations(existing_input(input, folder=False)))
    names = [_name(document) for _, document, _ in found]
    counts = Counter(names)
    records = []
    for (number, document, problem), name in zip(found, names, strict=True):
        key = plain_key(name) if name and counts[name] == 1 else f"{plain_key(name) if name else 'row'}-{number:08}"
        paths = [path for type_ in ("image", "audio") for path in _listed(document, type_) if isinstance(path, str)]
        text = json.dumps(document, ensure_ascii=False)
        size = len(text) + sum(_size(root, path) for path in paths)
        group = paths[0] if paths and is_text(paths[0]) else ""
        records.append(Record(key, size, (text, problem), group=group))
    return Listing(records, partial(_make, root=root, task=task or "conversation"))


def _conversations(path: Path) -> Iterator[tuple[int, Mapping[str, Any], str]]:
    """Number, document, and why it cannot be used."""
    ending = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if ending == ".jsonl":
        for row in open_table(path).rows():
            yield row.number, row.values, row.problem
        return
    if ending != ".json":
        raise ConfigError(f"{path} ends in {ending or 'nothing'}; name a .json or .jsonl file (.gz may follow)")
    try:
        with open_text(path) as file:
            documents = json.load(file)
    except (ValueError, RecursionError, EOFError) as error:
        raise DataError(f"{path} is not JSON ({error}); correct it or fetch it again") from None
    if not isinstance(documents, list):
        raise DataError(f"{path} is {type(documents).__name__}, not a JSON list of conversations")
    for number, document in enumerate(documents):
        is_object = isinstance(document, dict)
        yield number, document if is_object else {}, "" if is_object else f"conversation {number} is no JSON object"


def _name(document: Mapping[str, Any]) -> str:
    name = document.get("id", document.get("conversation_id", ""))
    text = str(name) if isinstance(name, (str, int)) else ""
    return text if is_text(text) else ""


def _listed(document: Mapping[str, Any], type_: str) -> list[Any]:
    """The media of a type that a conversation names beside its turns."""
    value = document.get(type_) or document.get(f"{type_}s") or []
    return value if isinstance(value, list) else [value]


def _size(root: Path, name: str) -> int:
    try:
        return 0 if "://" in name or name.startswith("data:") else size_of(below(root, name))
    except DataError:
        return 0


def _make(record: Record, *, root: Path, task: str) -> Draft:
    text, problem = record.data
    if problem:
        raise DataError(problem)
    document = json.loads(text)
    chat = _Chat(root, {type_: _listed(document, type_) for type_ in ("image", "audio")})
    turns = [_turn(value, number) for number, value in enumerate(_turns(document))]
    notes = []
    while turns and turns[-1][0] != "assistant":
        turns.pop()
        notes.append("a last turn without an answer")
    first = sum(role == "system" for role, _ in turns[:1])
    while first < len(turns) and turns[first][0] == "assistant":
        turns.pop(first)
        notes.append("a first turn of the assistant")
    if len(turns) <= first:
        raise DataError("no answer to any turn of the user")
    if not any(_has_tags(content) for _, content in turns):
        turns[first] = (turns[first][0], chat.untagged(turns[first][1]))
    messages = [{"role": role, "content": chat.parts(content, number)} for number, (role, content) in enumerate(turns)]
    chat.check_all_placed()
    return Draft({"task": task, "messages": messages}, chat.members, notes)


def _turns(document: Mapping[str, Any]) -> list[Any]:
    for name in ("messages", "conversations", "conversation"):
        if isinstance(turns := document.get(name), list) and turns:
            return turns
    raise DataError(f"it has neither messages nor conversations; its fields are {', '.join(document) or 'none'}")


def _turn(value: Any, number: int) -> tuple[str, list[Any]]:
    """Role and content, as a list of texts and OpenAI parts."""
    if not isinstance(value, dict):
        raise DataError(f"turn {number} is {type(value).__name__}, not a JSON object")
    role = value.get("role", value.get("from"))
    if role not in _ROLES:
        raise DataError(f"turn {number} is by {role!r}; known are {', '.join(_ROLES)}")
    if value.get("tool_calls") or value.get("function_call"):
        raise DataError(f"turn {number} calls a tool, which samples cannot hold")
    content = value.get("content", value.get("value"))
    if isinstance(content, str):
        return _ROLES[role], [content]
    if isinstance(content, list):
        return _ROLES[role], content
    raise DataError(f"turn {number} holds {type(content).__name__}, neither a text nor a list of parts")


def _has_tags(content: Sequence[Any]) -> bool:
    return any(isinstance(piece, str) and _TAG.search(piece) for piece in content)


@dataclass
class _Chat:
    """A conversation while its turns become messages. State: the members so far, and how many listed media have their place.

    Attributes:
        root: Folder that paths are relative to.
        listed: The media beside the turns, by type.
        members: Member suffix to bytes.
    """

    root: Path
    listed: Mapping[str, list[Any]]
    members: dict[str, bytes] = field(default_factory=dict)
    _num_placed: Counter[str] = field(default_factory=Counter)

    def untagged(self, content: Sequence[Any]) -> list[Any]:
        """Content with all listed media in front, where no text says where they stand."""
        tags = [f"<{type_}>" for type_, values in self.listed.items() for _ in values]
        return [*tags, *content]

    def parts(self, content: Sequence[Any], number: int) -> list[dict[str, Any]]:
        """The parts of one turn."""
        parts: list[dict[str, Any]] = []
        for piece in content:
            parts += self._text(piece) if isinstance(piece, str) else [self._part(piece, number)]
        parts = [part for part in parts if part.get("text") != ""]
        if not parts:
            raise DataError(f"turn {number} is empty")
        return parts

    def check_all_placed(self) -> None:
        """Every listed medium must stand somewhere."""
        for type_, values in self.listed.items():
            if self._num_placed[type_] != len(values):
                raise DataError(f"{self._num_placed[type_]} <{type_}> tags for {len(values)} listed {type_} files")

    def _text(self, text: str) -> Iterator[dict[str, Any]]:
        pieces = _TAG.split(text)
        for index, piece in enumerate(pieces):
            if index % 2:
                yield self._listed_medium(piece)
                continue
            # The line break beside a tag belongs to the notation.
            piece = piece.removeprefix("\n") if index else piece
            yield {"type": "text", "text": piece.removesuffix("\n") if index < len(pieces) - 1 else piece}

    def _listed_medium(self, type_: str) -> dict[str, Any]:
        number = self._num_placed[type_]
        self._num_placed[type_] += 1
        if number >= len(self.listed[type_]):
            raise DataError(f"more <{type_}> tags than the {len(self.listed[type_])} listed {type_} files")
        return self._medium(type_, self.listed[type_][number])

    def _part(self, piece: Any, number: int) -> dict[str, Any]:
        kind = piece.get("type") if isinstance(piece, dict) else type(piece).__name__
        if kind in _TEXT_TYPES and isinstance(piece.get("text"), str):
            return {"type": "text", "text": piece["text"]}
        if kind in ("image_url", "image"):
            value = next((piece[name] for name in ("image_url", "image", "path", "url") if piece.get(name)), None)
            return self._medium("image", value.get("url") if isinstance(value, dict) else value)
        if kind == "input_audio" and isinstance(piece.get("input_audio"), dict):
            return self._medium("audio", "data:audio;base64," + str(piece["input_audio"].get("data", "")))
        if kind in ("audio", "audio_url"):
            value = next((piece[name] for name in ("audio_url", "audio", "path", "url") if piece.get(name)), None)
            return self._medium("audio", value.get("url") if isinstance(value, dict) else value)
        raise DataError(f"turn {number} has a part of type {kind!r}, which samples cannot hold")

    def _medium(self, type_: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, str) or not value:
            raise DataError(f"{str(value)[:80]!r} is not the path of {type_} data")
        if value.startswith("data:"):
            content, name = _inline(value), f"the {type_} in the text"
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
            raise DataError(f"{value[:200]} is remote; fetch it and name the file")
        else:
            content, name = read_input(below(self.root, value)), value
        suffix = member(len(self.members), type_, content, name)
        self.members[suffix] = content
        return {"type": type_, "member": suffix}


def _inline(url: str) -> bytes:
    header, comma, data = url.partition(",")
    try:
        if comma and header.endswith(";base64"):
            return base64.b64decode(data, validate=True)
    except binascii.Error:
        pass
    raise DataError(f"{url[:60]!r} is no base64 data URL")


SOURCE = Source(
    name="conversations",
    help="conversations in ShareGPT, LLaVA or OpenAI form, with pictures and sounds by path or inline",
    records=_records,
    input="a .json list or a .jsonl file of conversations, maybe gzipped",
    options=(TASK, ROOT),
)
