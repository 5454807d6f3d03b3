"""The same case through webdataset with its strictest handler, decoding what it decodes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.faults.case import Case, Verdict
from benchmarks.faults.reading import faulty_stream
from benchmarks.faults.serving import serving


class PeerRun:
    """Runs cases in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, case: Case) -> tuple[Verdict, str]:
        """What became of a case; an error of any kind counts as noticed."""
        tar = self._folder / case.file_name
        tar.write_bytes(case.indexed if case.found is None else case.found)
        delivered: dict[str, list[dict[str, bytes]]] = {}
        refused = ""
        try:
            for key, files in self._samples(case, tar):
                delivered.setdefault(key, []).append(files)
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
        finally:
            tar.unlink(missing_ok=True)
        return _judge(case, delivered, refused)

    def _samples(self, case: Case, tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
        with nullcontext("") if case.server is None else serving(self._folder, case.server) as server:
            url = str(tar) if case.shards is None else case.shards
            if case.trouble is not None:
                url = faulty_stream(tar, case.trouble)
            yield from self._read(case, tar, f"{server}/{tar.name}" if server else url)

    def _read(self, case: Case, tar: Path, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        import webdataset as wds

        handler = wds.handlers.reraise_exception
        dataset = wds.WebDataset([url], shardshuffle=False, handler=handler)
        dataset = dataset.map(_with_raw, handler=handler).decode("pil", _decode_sound, handler=handler)
        for number, sample in enumerate(dataset):
            if number == 0 and case.during is not None:
                case.during(tar)
            yield sample["__key__"], sample["__raw__"]


def _with_raw(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "__raw__": {name: content for name, content in sample.items() if not name.startswith("__")}}


def _decode_sound(key: str, content: bytes) -> Any:
    """What a user of webdataset adds for sounds: its own decoder needs torchaudio."""
    import soundfile

    if key.rpartition(".")[2].lower() not in ("wav", "flac", "ogg", "mp3"):
        return None
    return soundfile.read(io.BytesIO(content), dtype="float32")


def _judge(case: Case, delivered: dict[str, list[dict[str, bytes]]], refused: str) -> tuple[Verdict, str]:
    # It takes suffixes in lower case, which is its rule and no fault.
    expected = {key: {name.lower(): body for name, body in files.items()} for key, files in case.truth.items()}
    for key, times in delivered.items():
        if key not in expected:
            return "lost silently", f"delivered {key!r}, which nobody wrote"
        if len(times) > 1:
            return "lost silently", f"delivered {key!r} {len(times)} times"
        if key in case.rotten:
            return "lost silently", f"delivered {key!r}, which no reader can use"
        if key not in case.loose and times[0] != expected[key]:
            return "lost silently", f"delivered {key!r} changed"
    if refused:
        return "refused", refused
    for key in expected.keys() - delivered.keys():
        return "lost silently", f"{key!r} is missing"
    return ("recovered" if case.passes else "unharmed"), ""
