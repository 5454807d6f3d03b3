"""Folders of pictures or sounds, one folder a class."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError
from megamm.data.media.files import AUDIO_ENDINGS, IMAGE_ENDINGS
from megamm.prepare.inputs import existing_input, member, read_input, size_of, walk
from megamm.prepare.names import plain_key, stems
from megamm.prepare.rows import is_text
from megamm.prepare.source import PROMPT, TASK, Draft, Listing, Record, Source, default_prompt

_ENDINGS = {"image": IMAGE_ENDINGS, "audio": AUDIO_ENDINGS}


def _records(type_: str, *, input: Path, task: str, prompt: str) -> Listing:
    """Every file with a known ending below INPUT/CLASS is a record; its first folder is its class.

    Raises:
        ConfigError: INPUT is no folder, or holds no such file in any folder.
    """
    task = task or "classification"
    names, others = [], Counter[str]()
    for path in walk(existing_input(input, folder=True)):
        name = path.relative_to(input).as_posix()
        if not is_text(name):
            others["with a name that is not UTF-8"] += 1
        elif path.suffix.lower().lstrip(".") not in _ENDINGS[type_]:
            others[f"no {type_}: ending {path.suffix or 'missing'!r}"] += 1
        elif "/" not in name:
            others["in no folder that names its class"] += 1
        else:
            names.append(name)
    if not names:
        found = ", ".join(f"{count} files {why}" for why, count in others.items()) or "no file at all"
        raise ConfigError(f"{input} holds no {type_} as CLASS/FILE ({found}); name the folder whose folders are the classes")
    records = [Record(plain_key(stem), size_of(input / name), name, group=name) for stem, name in zip(stems(names), names, strict=True)]
    settings = {"task": task, "prompt": prompt or default_prompt(task)}
    return Listing(
        records, partial(_make, type_=type_, root=input, **settings), [f"{count} files {why}" for why, count in sorted(others.items())]
    )


def _make(record: Record, *, type_: str, root: Path, task: str, prompt: str) -> Draft:
    content = read_input(root / record.data)
    suffix = member(0, type_, content, record.data)
    label = record.data.partition("/")[0]
    question: list[dict[str, Any]] = [{"type": type_, "member": suffix}]
    if prompt:
        question.append({"type": "text", "text": prompt})
    answer = [{"type": "label", "text": label}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Draft({"task": task, "messages": messages, "label": label, "file": record.data}, {suffix: content})


def _source(type_: str, what: str) -> Source:
    return Source(
        name=f"{type_}_folder",
        help=f"{what}, one folder a class",
        records=partial(_records, type_),
        input="folder whose folders are the classes; files may lie deeper",
        options=(TASK, PROMPT),
    )


IMAGES = _source("image", "pictures (JPEG, PNG, WebP)")
AUDIOS = _source("audio", "sounds (WAV, FLAC, OGG, MP3)")
