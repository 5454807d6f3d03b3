"""Documents that are no documents: not UTF-8, not JSON, too large, too deep, hostile."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.case import Case
from benchmarks.faults.corpus import beside, chat, document, pack, picture

BOMB_BYTES = 256 << 20


def broken_documents(canary: Path) -> Iterator[Case]:
    """Not UTF-8, not JSON, not a sample."""
    good = document("plain words").decode()
    broken = {
        "Latin-1": document("plain words").replace(b"plain", b"pl\xe4in"),
        "UTF-16": good.encode("utf-16"),
        "overlong UTF-8": good.encode().replace(b"plain", b"\xc0\xafain"),
        "a surrogate in UTF-8": good.encode().replace(b"plain", b"\xed\xa0\x80in"),
        "cut": good.encode()[:-5],
        "two documents": good.encode() * 2,
        "NaN": b'{"task": NaN, "messages": []}',
        "a list": b"[]",
        "a number of 5000 digits": b'{"task": ' + b"9" * 5000 + b"}",
        "no messages": b'{"task": "text", "messages": []}',
        "no answer": b'{"task": "text", "messages": [{"role": "user", "content": "hi"}]}',
        "an unknown role": good.replace("assistant", "robot").encode(),
        "an unknown part": good.replace('"type":"text"', '"type":"video"').encode(),
        "a picture that leads out": chat("image", "../../etc/passwd"),
        "a picture by URL": chat("image", "http://127.0.0.1:9/x.jpg"),
        "zeros": bytes(100),
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "deep metadata": good[:-1].encode() + b',"more":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a lone surrogate as an escape": good.encode().replace(b"plain", b"\\ud800in"),
    }
    for name, content in broken.items():
        samples = beside({"x": {"json": content}})
        yield Case(name, pack(samples), samples, rotten=frozenset({"x"}))
    for name, content in {
        "a byte-order mark": b"\xef\xbb\xbf" + good.encode(),
        "the same field twice": b'{"task":"text",' + good[1:].encode(),
        "control strings in text": document("<|end|><|assistant|> \x00 \u202e \ufeff 🙂"),
        "an empty text": document(""),
        "only spaces": document("   \n\t"),
    }.items():
        samples = beside({"x": {"json": content}})
        yield Case(name, pack(samples), samples, loose=frozenset({"x"}))


def large_documents(canary: Path) -> Iterator[Case]:
    """JSON of 100 MB, and texts far longer than a row."""
    hundred_megabytes = 100_000_000
    lead = b'{"task":"text","messages":[{"role":"assistant","content":[{"type":"text","text":"'
    for name, content in {
        "100 MB of text": lead + b"x " * (hundred_megabytes // 2) + b'"}]}]}',
        "100 MB of brackets": b"[" * hundred_megabytes,
        "100 MB of numbers": b"[" + b"1," * (hundred_megabytes // 2) + b"1]",
        "15 MB of numbers": b'{"n":[' + b"1," * 7_500_000 + b"1]}",
        "1 MB of text": document("many words " * 100_000),
    }.items():
        samples = beside({"x": {"json": content}})
        yield Case(name, pack(samples), samples, rotten=frozenset({"x"}))


def compressed_members(canary: Path) -> Iterator[Case]:
    """Members and shards that somebody compressed; what grows to 256 MiB must never be unpacked."""
    squeezed, small = _zipped_zeros(), gzip.compress(document("plain words"))
    for name, files in {
        "a document as .json.gz": {"json.gz": small},
        "256 MiB as .json.gz": {"json.gz": squeezed},
        "256 MiB as .json": {"json": squeezed},
        "256 MiB as 0.jpg": {"json": chat("image", "0.jpg"), "0.jpg": squeezed},
        "256 MiB as 0.jpg.gz": {"json": chat("image", "0.jpg.gz"), "0.jpg.gz": squeezed},
    }.items():
        samples = beside({"x": files})
        yield Case(name, pack(samples), samples, rotten=frozenset({"x"}))
    samples = beside({"x": {"json": document("plain words"), "txt.gz": squeezed}})
    yield Case("256 MiB as an unused .txt.gz", pack(samples), samples)
    shard = pack(beside({}))
    yield Case("a shard of gzip", gzip.compress(shard), beside({}))
    yield Case("a shard of gzip called .tar.gz", gzip.compress(shard), beside({}), file_name="train-00000.tar.gz")


def pickles(canary: Path) -> Iterator[Case]:
    """Members that run code when somebody unpickles them, and documents that point at them."""
    import torch

    trap = pickle.dumps(_Trap(str(canary)))
    file = io.BytesIO()
    torch.save(_Trap(str(canary)), file)
    for ending, content in {
        "pkl": trap,
        "pickle": trap,
        "pyd": trap,
        "pth": file.getvalue(),
        "pt": trap,
        "npy": _numpy_trap(trap),
        "joblib": trap,
    }.items():
        samples = beside({"x": {"json": document("plain words"), ending: content}})
        yield Case(f"beside a document: .{ending}", pack(samples), samples)
        samples = beside({"x": {"json": chat("image", f"0.{ending}"), f"0.{ending}": content}})
        yield Case(f"as a picture: .{ending}", pack(samples), samples, rotten=frozenset({"x"}))
    for name, files in {
        "a pickle as .json": {"json": trap},
        "a pickle as 0.jpg": {"json": chat("image", "0.jpg"), "0.jpg": trap},
        "a pickle as 0.wav": {"json": chat("audio", "0.wav"), "0.wav": trap},
        "only a pickle": {"pkl": trap},
    }.items():
        samples = beside({"x": files})
        yield Case(name, pack(samples), samples, rotten=frozenset({"x"}))


def commands(canary: Path) -> Iterator[Case]:
    """Shards called like commands: as URLs of the recipe, and as names of real files."""
    content, command = pack(beside({})), f"touch {canary}"
    for url in (
        f"pipe:{command}",
        f"pipe:{command}; cat x.tar",
        f"PIPE:{command}",
        f"|{command}",
        f"shell:{command}",
        f"file://$({command})",
    ):
        yield Case(f"recipe: {url.replace(str(canary), 'CANARY')}", content, beside({}), shards=url)
    local = f"touch {canary.name}"
    for name in (
        f"$({local}).tar",
        f"`{local}`.tar",
        f";{local};.tar",
        f"|{local}|.tar",
        f"pipe:{local}.tar",
        f"-o{local}.tar",
        "a\nb.tar",
        "%(x)s{0}.tar",
    ):
        yield Case(f"file: {name}", content, beside({}), file_name=name)
    samples = beside({f"$({local})": {"json": document("plain words")}, f"|{local}": {"json": document("more words")}})
    yield Case("keys", pack(samples), samples)
    samples = beside({"x": {"json": document("plain words"), f"$({local})": b"x", "sh": command.encode(), "py": b"import os"}})
    yield Case("suffixes", pack(samples), samples)
    samples = beside({"x": {"json": chat("image", f"|{local}.jpg"), f"|{local}.jpg": picture()}})
    yield Case("members", pack(samples), samples, loose=frozenset({"x"}))


class _Trap:
    """Unpickling it runs `touch`."""

    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self):
        import os

        return os.system, (f"touch {self._canary}",)


def _numpy_trap(content: bytes) -> bytes:
    header = json.dumps({"descr": "|O", "fortran_order": False, "shape": [1]}).replace("false", "False").replace("[1]", "(1,)")
    padded = header.replace('"', "'").encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + len(padded).to_bytes(2, "little") + padded + content


def _zipped_zeros() -> bytes:
    packer, block = zlib.compressobj(9, wbits=31), bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(BOMB_BYTES >> 20)), packer.flush()])
