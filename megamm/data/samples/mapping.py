"""What the members of a sample say, as a chat: our own `KEY.json`, or a recipe's mapping for shards in the wild.

Everything here is a pure function of the members' bytes. Sizes are compared with the limits before anything is read, and counts
before anything is built of them, so that a sample which is a bomb costs no more than its bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamm.config import Data, Dataset, Limits, SampleMapping
from megamm.core.errors import ConfigError, DataError
from megamm.core.files import canonical_json, digest_text
from megamm.core.types import Message, Part, Sample
from megamm.data.ledger import BadSample
from megamm.data.media.files import DEFAULT_LIMITS, media_type
from megamm.data.samples.texts import read_json_object, read_text, text_field
from megamm.data.shards.index import Member
from megamm.data.shards.reader import ShardReader
from megamm.tasks import TASKS, template

_PLACE = re.compile(r"([a-z0-9_-][a-z0-9_.-]*(?:\|[a-z0-9_-][a-z0-9_.-]*)*)(?::(.+))?")
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where something stands: the first of `suffixes` that a sample has, and there the JSON field that `fields` lead to."""

    suffixes: tuple[str, ...]
    fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> _Place | None:
        match = _PLACE.fullmatch(text)
        if match is None:
            return None
        fields = () if match.group(2) is None else tuple(match.group(2).split("."))
        return cls(tuple(match.group(1).split("|")), fields) if all(fields) else None

    def find(self, suffixes: Sequence[str]) -> str | None:
        """The member of a sample that is meant, as it is written there; suffixes are compared in small letters, as WebDataset does."""
        written = {suffix.lower(): suffix for suffix in suffixes}
        return next((written[suffix] for suffix in self.suffixes if suffix in written), None)

    def __str__(self) -> str:
        return "|".join(self.suffixes)


_DOCUMENT = _Place(("json",))


@dataclass(frozen=True)
class SampleForm:
    """How the members of a dataset's samples become chats. Stateless.

    Attributes:
        mapping: None for our own form.
        prompt: What the user says in every sample of a mapping.
        classes: Names of classes, resolved.
        limits: What is refused.
    """

    mapping: SampleMapping | None = None
    prompt: str = ""
    classes: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS

    @classmethod
    def of(cls, name: str, dataset: Dataset, data: Data) -> SampleForm:
        """The form of a dataset.

        Args:
            name: Of the dataset, for errors.
            dataset: Its mapping.
            data: Limits, and the folder that a file of classes is relative to.

        Raises:
            ConfigError: The mapping contradicts itself, or its file of classes cannot be read.
        """
        mapping = dataset.mapping
        if mapping is None:
            return cls(limits=data.limits)
        where = f"dataset {name}: mapping"
        _check_mapping(mapping, where)
        if mapping.task != "text" and not (mapping.prompt or mapping.question or mapping.image or mapping.audio):
            raise ConfigError(f"{where} leaves nothing to answer; set its prompt, question, image or audio")
        prompt = mapping.prompt
        if not prompt and not mapping.question and mapping.task in TASKS and mapping.task != "text":
            prompt = TASKS[mapping.task].prompt
        return cls(mapping, prompt, _classes(mapping.classes, Path(data.root), where), data.limits)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that a sample's chat depends on besides its bytes."""
        mapping = None if self.mapping is None else dataclasses.asdict(self.mapping) | {"classes": list(self.classes)}
        return digest_text(canonical_json([mapping, self.prompt, dataclasses.asdict(self.limits)]))

    def check(self, members: Sequence[Member]) -> None:
        """Compare what the index says of a sample with the limits.

        Raises:
            BadSample: A limit is exceeded.
        """
        if len(members) > self.limits.members:
            raise BadSample(f"the sample has {len(members)} members, data.limits.members is {self.limits.members}")
        # The stretch of the shard that one read takes: what lies between members counts too.
        num_bytes = members[-1].offset + members[-1].size - members[0].offset
        if num_bytes > self.limits.sample_bytes:
            raise BadSample(f"the sample has {num_bytes} bytes, data.limits.sample_bytes is {self.limits.sample_bytes}")
        texts = {place.find([member.suffix for member in members]) for place in self._texts}
        for member in members:
            if member.suffix in texts and member.size > self.limits.text_bytes:
                raise BadSample(f"{member.suffix} has {member.size} bytes, data.limits.text_bytes is {self.limits.text_bytes}")

    def needed(self, suffixes: Sequence[str], *, media: bool = True) -> list[str] | None:
        """Which members of a sample must be read.

        Args:
            suffixes: All that it has.
            media: Pictures and sounds too, not texts alone.

        Returns:
            Suffixes; None for all of them.
        """
        if self.mapping is None and media:
            return None
        places = [*self._texts, *self._media.values()] if media else self._texts
        return [suffix for place in places if (suffix := place.find(suffixes)) is not None]

    def sample(self, key: str, files: Mapping[str, bytes], suffixes: Sequence[str], *, shard: str) -> Sample:
        """Read a sample.

        Args:
            key: Its key.
            files: Member suffix -> bytes, at least of those that are `needed`; media may be left out where they are not decoded.
            suffixes: Of all members that the sample has.
            shard: Name of the shard, for errors.

        Raises:
            BadSample: A member is missing or is not what the form says.
        """
        where = f"{shard} {key}"
        try:
            if self.mapping is None:
                return self._own(key, files, where)
            return self._mapped(self.mapping, key, files, suffixes, where)
        except BadSample:
            raise
        except DataError as error:
            raise BadSample(str(error)) from error

    @cached_property
    def _texts(self) -> tuple[_Place, ...]:
        if self.mapping is None:
            return (_DOCUMENT,)
        return tuple(place for text in (self.mapping.answer, self.mapping.question) if (place := _Place.of(text)))

    @cached_property
    def _media(self) -> dict[str, _Place]:
        if self.mapping is None:
            return {}
        return {type_: place for type_ in ("image", "audio") if (place := _Place.of(getattr(self.mapping, type_)))}

    @cached_property
    def _class_names(self) -> frozenset[str]:
        return frozenset(self.classes)

    def _own(self, key: str, files: Mapping[str, bytes], where: str) -> Sample:
        suffix = _DOCUMENT.find(list(files))
        if suffix is None:
            raise BadSample(f"{where}: there is no {key}.json; samples of another form need the dataset's `mapping`")
        document = read_json_object(files[suffix], self.limits, where)
        turns = document.get("messages")
        if isinstance(turns, list) and len(turns) > self.limits.messages:
            raise BadSample(f"{where}: {len(turns)} messages, data.limits.messages is {self.limits.messages}")
        contents = [turn.get("content") for turn in turns or () if isinstance(turn, dict)] if isinstance(turns, list) else []
        num_parts = sum(len(content) for content in contents if isinstance(content, list))
        if num_parts > self.limits.parts:
            raise BadSample(f"{where}: {num_parts} parts, data.limits.parts is {self.limits.parts}")
        sample = template.parse_sample(key, document, where=where)
        media = {name: content for name, content in files.items() if name != suffix}
        return Sample(sample.key, sample.task, sample.messages, media, sample.metadata)

    def _mapped(self, mapping: SampleMapping, key: str, files: Mapping[str, bytes], suffixes: Sequence[str], where: str) -> Sample:
        parts, media, metadata = [], {}, {}
        for type_, place in self._media.items():
            suffix = place.find(suffixes)
            if suffix is None:
                raise BadSample(f"{where}: there is no {key}.{place}, which mapping.{type_} names")
            parts.append(Part(type_, member=suffix))
            if suffix in files:
                media[suffix] = files[suffix]
        if self.prompt:
            parts.append(Part("text", text=self.prompt))
        if mapping.question:
            parts.append(Part("text", text=self._text("question", mapping.question, files, metadata, f"{where}: {key}")))
        answer = self._text("answer", mapping.answer, files, metadata, f"{where}: {key}")
        if mapping.task == "text":
            return Sample(key, mapping.task, (Message("assistant", (Part("text", text=answer),)),), metadata=metadata)
        reply = Part("label", text=self._class(answer, where)) if self.classes else Part("text", text=answer)
        return Sample(key, mapping.task, (Message("user", tuple(parts)), Message("assistant", (reply,))), media, metadata)

    def _text(self, name: str, source: str, files: Mapping[str, bytes], metadata: dict[str, Any], where: str) -> str:
        """The text at a place; of a JSON member all fields become metadata."""
        place = _Place.of(source)
        assert place is not None, "checked when the form was made"
        suffix = place.find(list(files))
        if suffix is None:
            raise BadSample(f"{where}.{place} is missing, which mapping.{name} names")
        if place.fields:
            document = read_json_object(files[suffix], self.limits, f"{where}.{suffix}")
            metadata.update(document)
            text = text_field(document, place.fields, f"{where}.{suffix}")
        else:
            text = read_text(files[suffix], f"{where}.{suffix}")
        # A file's last line ends with a break that is no part of an answer; of a document every character counts.
        if not (self.mapping is not None and self.mapping.task == "text"):
            text = text.strip()
        if not text:
            raise BadSample(f"{where}.{suffix} is empty, which mapping.{name} names")
        return text

    def _class(self, answer: str, where: str) -> str:
        if answer in self._class_names:
            return answer
        if _NUMBER.fullmatch(answer) and int(answer) < len(self.classes):
            return self.classes[int(answer)]
        raise BadSample(f"{where}: class {answer[:80]!r} is not among the {len(self.classes)} of mapping.classes")


OWN_FORM = SampleForm()
"""`KEY.json` chats under the default limits."""


def read_sample(shard: ShardReader, number: int, form: SampleForm, *, media: bool = True) -> Sample:
    """Read a sample of a shard.

    Args:
        shard: Where it lies.
        number: Which one.
        form: What its members mean.
        media: Read pictures and sounds too.

    Raises:
        BadSample: It exceeds a limit, its bytes changed, or it is not of this form.
        DataError: The shard cannot be read.
    """
    members = shard.index.members(number)
    form.check(members)
    suffixes = [member.suffix for member in members]
    files = shard.sample(number, form.needed(suffixes, media=media))
    return form.sample(shard.index.key(number), files, suffixes, shard=shard.tar.name)


def _check_mapping(mapping: SampleMapping, where: str) -> None:
    for name in ("answer", "question", "image", "audio"):
        text = getattr(mapping, name)
        if (text or name == "answer") and _Place.of(text) is None:
            raise ConfigError(f"{where}.{name}={text!r} names no member; write a suffix such as txt, or a field such as json:caption")
    for type_ in ("image", "audio"):
        place = _Place.of(getattr(mapping, type_))
        if place and (place.fields or any(media_type(suffix) != type_ for suffix in place.suffixes)):
            raise ConfigError(f"{where}.{type_}={getattr(mapping, type_)!r} names no {type_}; write its suffix, such as jpg, png or flac")
    if not template.TASK_NAME.fullmatch(mapping.task):
        raise ConfigError(f"{where}.task={mapping.task!r} is not a name of small letters, digits and '_', such as classification")
    if mapping.task == "text" and (mapping.prompt or mapping.question or mapping.image or mapping.audio or mapping.classes):
        raise ConfigError(f"{where} of task text is a plain document: only `answer` says where it stands; choose another task for the rest")


def _classes(classes: tuple[str, ...] | str, root: Path, where: str) -> tuple[str, ...]:
    if isinstance(classes, str):
        path = root / classes
        try:
            classes = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}.classes: {path} cannot be read ({error}); write one name a line in UTF-8") from None
        if not classes:
            raise ConfigError(f"{where}.classes: {path} names no class; write one name a line")
    for number, name in enumerate(classes):
        if not name.strip():
            raise ConfigError(f"{where}.classes: class {number} has no name; name every class")
        if _NUMBER.fullmatch(name) and int(name) != number:
            raise ConfigError(
                f"{where}.classes: class {number} is named {name!r}, so that a number could mean two classes; name it in words"
            )
    return classes
