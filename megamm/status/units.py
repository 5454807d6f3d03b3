"""Times, sizes and counts as people read them."""

from __future__ import annotations

_STEPS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """The two largest units of a time: `3 d 4 h`, `12 min 5 s`, `0 s`."""
    rest, words = round(max(0.0, seconds)), []
    for name, size in _STEPS:
        number, rest = divmod(rest, size)
        if number or words:
            words.append((number, name))
    return " ".join(f"{number} {name}" for number, name in words[:2] if number) or "0 s"


def num_bytes(number: float) -> str:
    """A size in the largest binary unit that it fills: `1.2 GiB`."""
    for name in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            return f"{number:.0f} {name}" if name == "B" or number >= 100 else f"{number:.1f} {name}"
        number /= 1024
    return f"{number:.1f} PiB"


def count(number: float) -> str:
    """A large count with three digits: `12.3 M`."""
    for name, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}"


def several(number: int, noun: str) -> str:
    """A number of things: `1 rank`, `16 ranks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
