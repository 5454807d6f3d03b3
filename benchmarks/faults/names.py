"""Members that should not be there, or are not called what they should be: keys, paths, links, long names, sizes."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.case import Case, Files
from benchmarks.faults.corpus import BLOCK, archive, beside, document, ending, entry, healthy, media_sample, pack, padded, picture, signed

TEXT = document("another text")


def keys(canary: Path) -> Iterator[Case]:
    """Keys that occur twice, members that occur twice or are not beside each other, and members that are missing."""
    samples = healthy()
    two_pictures = media_sample("0.jpg", picture(seed=1)), media_sample("0.jpg", picture(seed=2))
    first, second = ([(f"p{number}.{name}", body) for name, body in files.items()] for number, files in enumerate(two_pictures))
    both = {"p0": two_pictures[0], "p1": two_pictures[1]}
    start, end = [("t0.json", samples["t0"]["json"])], [("t1.json", samples["t1"]["json"])]
    yield _shard("members of two keys alternate", [*start, first[0], second[0], first[1], second[1], *end], beside(both))
    yield _shard("members of one key around another sample", [*start, first[0], *second, first[1], *end], beside(both))
    yield _shard("all documents first", [*start, first[0], second[0], *end, first[1], second[1]], beside(both))
    yield _shard("a key twice", [*start, ("x.json", TEXT), *end, ("x.json", TEXT)], beside({"x": {"json": TEXT}}))
    yield _shard("a key twice in a row", [*start, ("x.json", TEXT), ("x.json", document("twice")), *end], beside({"x": {"json": TEXT}}))
    yield _shard("a member twice", [*start, *first, first[1], *end], beside({"p0": two_pictures[0]}))
    yield _shard("a member twice in other letters", [*start, *first, ("p0.0.JPG", first[1][1]), *end], beside({"p0": two_pictures[0]}))
    cut = {"json": two_pictures[0]["json"]}
    yield Case("a picture is missing", pack(beside({"p0": cut})), beside({"p0": cut}), rotten=frozenset({"p0"}))
    cut = {"0.jpg": two_pictures[0]["0.jpg"]}
    yield Case("a document is missing", pack(beside({"p0": cut})), beside({"p0": cut}), rotten=frozenset({"p0"}))
    cut = {**two_pictures[0], "0.jpg": b""}
    yield Case("a picture is empty", pack(beside({"p0": cut})), beside({"p0": cut}), rotten=frozenset({"p0"}))
    cut = {**two_pictures[0], "json": b""}
    yield Case("a document is empty", pack(beside({"p0": cut})), beside({"p0": cut}), rotten=frozenset({"p0"}))
    yield Case("no sample at all", pack({}), {})
    yield Case("an empty file", b"", healthy())


def spellings(canary: Path) -> Iterator[Case]:
    """Names that WebDataset's readers split in their own way: a leading dot, no suffix, capital letters, reserved words."""
    for name in (".hidden.json", "folder/.hidden.json", "noending", "folder.x/noending", "x.", "x..json", "__x__.json", "__meta__/x.json"):
        key, suffix = ("x", ".json") if name == "x..json" else (name.rpartition(".")[0] or name, "json")
        yield _shard(f"{name}", _between([(name, TEXT)]), beside({key: {suffix: TEXT}}))
    image = picture(seed=3)
    capital = {"json": media_sample("0.JPG", image)["json"], "0.JPG": image}
    yield Case("x.0.JPG, named so", pack(beside({"x": capital})), beside({"x": capital}))
    yield Case("X.0.jpg", pack(beside({"X": media_sample("0.jpg", image)})), beside({"X": media_sample("0.jpg", image)}))
    other = {"json": media_sample("0.jpg", image)["json"], "0.JPG": image}
    yield Case("x.0.JPG, named x.0.jpg", pack(beside({"x": other})), beside({"x": other}), loose=frozenset({"x"}))
    yield _shard("x.JSON", _between([("x.JSON", TEXT)]), beside({"x": {"JSON": TEXT}}))
    for key in ("a.b/c", "a/b/c", "ключ", "a b", "{a,b}", "a::b", "~", "-x", "%2e%2e", "a" * 90):
        yield _shard(f"key {key[:20]}", _between([(f"{key}.json", TEXT)]), beside({key: {"json": TEXT}}))


def paths(canary: Path) -> Iterator[Case]:
    """Names that lead out of the sample: `..`, absolute, empty parts, backslashes, control characters, not UTF-8."""
    for name in ("../x", "a/../../x", "/etc/x", "//x", "./x", "a//x", "a/./x", "..\\x", "C:\\x", "a\nb", "a\x1b[31m", "a\x7fb", "a\u202eb"):
        yield _shard(repr(name), _between([(f"{name}.json", TEXT)]), beside({name: {"json": TEXT}}))
    raw = entry("a?b.json", TEXT).replace(b"a?b.json", b"a\xffb.json", 1)
    content = ending(b"".join([_member("t0"), signed(raw[:BLOCK]) + raw[BLOCK:], _member("t1")]))
    yield Case("a name that is not UTF-8", content, beside({"a\udcffb": {"json": TEXT}}))
    ended = entry("a?b.json", TEXT).replace(b"a?b.json", b"a\0b.json", 1)
    content = ending(b"".join([_member("t0"), signed(ended[:BLOCK]) + ended[BLOCK:], _member("t1")]))
    yield Case("a name with a zero byte", content, beside({"a": {"json": TEXT}}))


def kinds(canary: Path) -> Iterator[Case]:
    """Members that are no regular files. A link stands for the sample that it leads to."""
    linked = beside({"x": healthy()["t0"]})
    for kind, name in ((tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link")):
        yield _odd_kind(f"{name} to a sample", kind, "t0.json", linked)
        yield _odd_kind(f"{name} to /etc/passwd", kind, "/etc/passwd", beside({}))
        yield _odd_kind(f"{name} to ../..", kind, "../../secret.json", beside({}))
        yield _odd_kind(f"{name} to itself", kind, "x.json", beside({}))
    whole = beside({"x": {"json": TEXT}})
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        yield _odd_kind(f"type {kind!r}", kind, "", beside({}))
    for kind in (tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"D", b"M", b"N", b"V", b"A", b"Z", b"\xff"):
        member = entry("x.json", TEXT)
        header = signed(member[:156] + kind + member[157:BLOCK])
        yield Case(f"type {kind!r}", ending(_member("t0") + header + member[BLOCK:] + _member("t1")), whole)


def long_names(canary: Path) -> Iterator[Case]:
    """Long names of GNU and PAX, which must be read, and broken ones, which must be noticed."""
    for format, label in ((tarfile.GNU_FORMAT, "GNU"), (tarfile.PAX_FORMAT, "PAX")):
        for length in (99, 100, 101, 155, 156, 255, 256, 257, 512, 1000, 4000):
            name = "k" * length + ".json"
            member = entry(name, TEXT, format=format)
            truth = beside({"k" * length: {"json": TEXT}})
            yield Case(f"{label}, {length} characters", ending(_member("t0") + member + _member("t1")), truth)
            if len(member) > 2 * BLOCK:
                body = member[BLOCK:]
                yield Case(f"{label}, {length} characters, header left out", ending(_member("t0") + body + _member("t1")), truth)
                yield Case(f"{label}, {length} characters, name left out", ending(_member("t0") + member[:BLOCK] + _member("t1")), truth)
                lost = member[:BLOCK] + bytes(BLOCK) + member[2 * BLOCK :]
                yield Case(f"{label}, {length} characters, first block zero", ending(_member("t0") + lost + _member("t1")), truth)
    for record in (
        "GNU.sparse.realsize=1",
        "hdrcharset=BINARY",
        "size=-1",
        "size=1e3",
        "size=99999999999999999999",
        "path=",
        "linkpath=t0.json",
    ):
        truth = beside({"x": {"json": TEXT}})
        for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            body = f"{len(record) + 5 + (len(record) > 94)} {record}\n".encode()
            extended = entry("PaxHeader", body, kind=kind)
            yield Case(f"record {record} of {kind!r}", ending(_member("t0") + extended + entry("x.json", TEXT) + _member("t1")), truth)


def sizes(canary: Path) -> Iterator[Case]:
    """Sizes that a header must not state: beyond the file, negative, more than any disk; headers signed as if they were right."""
    truth = beside({"x": {"json": TEXT}})
    fields = {
        "one block too few": b"%011o\0" % 0,
        "one byte too many": b"%011o\0" % (len(TEXT) + 1),
        "a block too many": b"%011o\0" % (len(TEXT) + BLOCK),
        "8 GiB": b"77777777777\0",
        "2^63": b"\x80" + (1 << 63).to_bytes(11, "big"),
        "2^87": b"\x80" + (1 << 87).to_bytes(11, "big"),
        "-1": b"\xff" * 12,
        "-512": b"\xff" * 10 + b"\xfe\x00",
        "spaces": b" " * 12,
        "letters": b"0000000000x\0",
        "an octal number with a sign": b"-0000000145\0",
    }
    member = entry("x.json", TEXT)
    for name, field in fields.items():
        header = signed(member[:124] + field + member[136:BLOCK])
        content = ending(_member("t0") + header + padded(TEXT) + _member("t1"))
        # A size that is one byte too large takes a byte of padding along, and nothing tells: the document shows it.
        yield Case(name, content, truth, rotten=frozenset({"x"}) if name == "one byte too many" else frozenset())
    for kind, label in ((b"L", "name"), (tarfile.XHDTYPE, "record")):
        member = entry("././@LongLink", b"x" * 600, kind=kind)
        for name in ("8 GiB", "2^63", "-1"):
            header = signed(member[:124] + fields[name] + member[136:BLOCK])
            yield Case(
                f"a {label} of {name}", ending(_member("t0") + header + member[BLOCK:] + entry("x.json", TEXT) + _member("t1")), truth
            )


def _member(key: str) -> bytes:
    return entry(f"{key}.json", healthy()[key]["json"])


def _between(entries: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [("t0.json", healthy()["t0"]["json"]), *entries, ("t1.json", healthy()["t1"]["json"])]


def _shard(name: str, entries: list[tuple[str, bytes]], truth: dict[str, Files]) -> Case:
    return Case(name, archive(entries, format=tarfile.GNU_FORMAT), truth)


def _odd_kind(name: str, kind: bytes, target: str, truth: dict[str, Files]) -> Case:
    return Case(name, ending(_member("t0") + entry("x.json", b"", kind=kind, link=target) + _member("t1")), truth)
