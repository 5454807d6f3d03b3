"""Short texts about digits, their names, their pictures and their sounds, so that the language of the other sources is not all new."""

from __future__ import annotations

import random
from collections.abc import Iterator

from megamm.prepare.source import SEED, Draft, Listing, Record, Source
from megamm.prepare.sources.words import WORDS

_TEST_EVERY = 10

_SHAPES = (
    "one round loop",
    "a single upright stroke",
    "a curve at the top and a flat foot",
    "two bows that open to the left",
    "an open top and one upright stroke",
    "a flat roof and a round belly",
    "a tall stroke that curls into a loop at the foot",
    "a flat roof and one slanted stroke",
    "two loops, one above the other",
    "a loop at the top and a stroke below it",
)
_FIRST_SOUNDS = ("z", "w", "t", "th", "f", "f", "s", "s", "a long a", "n")
_LAST_SOUNDS = ("o", "n", "oo", "ee", "r", "v", "ks", "n", "t", "n")


def _records(*, seed: int) -> Listing:
    """Every sentence is a record; every tenth is held out, and the seed decides which."""
    facts = list(_facts())
    random.Random(seed).shuffle(facts)
    records = [
        Record(f"text-{index:05}", len(sentence), (topic, sentence), "train" if index % _TEST_EVERY else "test")
        for index, (topic, sentence) in enumerate(facts)
    ]
    return Listing(records, _make)


def _make(record: Record) -> Draft:
    topic, sentence = record.data
    message = {"role": "assistant", "content": [{"type": "text", "text": sentence}]}
    return Draft({"task": "text", "messages": [message], "topic": topic})


def _facts() -> Iterator[tuple[str, str]]:
    """All sentences with their topic, each once."""
    for digit, word in enumerate(WORDS):
        yield from (("name", sentence) for sentence in _names(digit, word))
        yield from (("picture", sentence) for sentence in _pictures(digit, word))
        yield from (("sound", sentence) for sentence in _sounds(digit, word))
    for first in range(10):
        for second in range(10):
            yield from (("order", sentence) for sentence in _comparisons(first, second))
            yield from (("sum", sentence) for sentence in _sums(first, second))
            yield from (("count", sentence) for sentence in _counts(first, second))


def _names(digit: int, word: str) -> Iterator[str]:
    letters = ", ".join(word)
    yield f"The word {word} names the digit {digit}."
    yield f"The digit {digit} is called {word}."
    yield f"We write {digit} and say {word}."
    yield f"{digit} reads {word}."
    yield f"{word} means {digit}."
    yield f"Which digit is {word}? It is {digit}."
    yield f"Which word is {digit}? It is {word}."
    yield f"The word {word} is spelled {letters}."
    yield f"The letters {letters} make the word {word}."
    yield f"The word {word} has {WORDS[len(word)]} letters."
    yield f"{digit} is {'even' if digit % 2 == 0 else 'odd'}."
    yield f"The number {word} is {'odd' if digit % 2 else 'even'}."


def _pictures(digit: int, word: str) -> Iterator[str]:
    shape = _SHAPES[digit]
    yield f"A picture of the digit {digit} shows {shape}."
    yield f"Which digit is this? It has {shape}: {digit}."
    yield f"Written by hand, {word} is {shape}."
    yield f"To draw {digit}, make {shape}."
    yield f"If the picture shows {shape}, the answer is {digit}."


def _sounds(digit: int, word: str) -> Iterator[str]:
    yield f"Spoken, {word} starts with the sound {_FIRST_SOUNDS[digit]}."
    yield f"Spoken, {word} ends with the sound {_LAST_SOUNDS[digit]}."
    yield f"When a voice says {word}, the answer is {word}."
    yield f"Which word is this? A voice says {word}: {word}."
    yield f"The sound of {word} goes from {_FIRST_SOUNDS[digit]} to {_LAST_SOUNDS[digit]}."
    yield f"A fast voice or a slow one, {word} stays {word}."


def _comparisons(first: int, second: int) -> Iterator[str]:
    if first == second:
        return
    less, more = sorted((first, second))
    yield f"{first} is {'less' if first < second else 'more'} than {second}."
    yield f"Of {WORDS[first]} and {WORDS[second]}, {WORDS[more]} is the greater."
    yield f"Of {first} and {second}, {less} is the smaller."
    if first < second:
        yield f"From {WORDS[first]} to {WORDS[second]} it is {WORDS[second - first]} more."


def _sums(first: int, second: int) -> Iterator[str]:
    total = first + second
    yield f"{first} + {second} = {total}."
    if total < 10:
        yield f"{WORDS[first]} plus {WORDS[second]} is {WORDS[total]}."
        yield f"What is {first} and {second}? It is {total}."
        yield f"{WORDS[total]} minus {WORDS[second]} is {WORDS[first]}."
        yield f"{total} - {first} = {second}."
    if first * second < 10:
        yield f"{WORDS[first]} times {WORDS[second]} is {WORDS[first * second]}."


def _counts(first: int, last: int) -> Iterator[str]:
    if last - first == 1:
        yield f"After {first} comes {last}."
        yield f"Before {WORDS[last]} comes {WORDS[first]}."
    if last - first >= 2:
        yield f"Count from {first} to {last}: {', '.join(WORDS[first : last + 1])}."
        yield f"Count down from {last}: {' '.join(str(digit) for digit in range(last, first - 1, -1))}."


SOURCE = Source(
    name="digit_text",
    help="short sentences about digits, their names, pictures and sounds",
    records=_records,
    options=(SEED,),
    samples_a_shard=512,
)
