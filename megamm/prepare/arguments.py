"""The words of `megamm prepare SOURCE …`: the flags that all sources share, and those that each source declares."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamm.core import env
from megamm.core.errors import DataError
from megamm.prepare import SOURCES
from megamm.prepare.source import SEED, Option, Source, count

_UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `megamm prepare` one subcommand a source."""
    sources = parser.add_subparsers(title="sources", metavar="SOURCE", required=True)
    for source in SOURCES.values():
        one = sources.add_parser(source.name, help=source.help, description=f"Write WebDataset shards: {source.help}.", allow_abbrev=False)
        one.set_defaults(source=source.name)
        _add_source(one, source)
        _add_shared(one, source)


def run(arguments: argparse.Namespace) -> list[str]:
    """Prepare what the words ask for.

    Returns:
        The report for people, in lines.

    Raises:
        MegaMMError: As `megamm.prepare.run.prepare`.
    """
    # Not at the top: every command parses its words through this file, and this brings the slow libraries along.
    from megamm.prepare.plan import Limits, Splitting, read_names
    from megamm.prepare.run import Job, prepare

    source = SOURCES[arguments.source]
    held_out = read_names(arguments.test_list) if arguments.test_list else frozenset[str]()
    job = Job(
        output=arguments.output,
        splitting=Splitting(arguments.split, arguments.test_share, held_out, arguments.seed),
        limits=Limits(arguments.max_samples_per_shard, arguments.max_bytes_per_shard),
        num_workers=arguments.workers,
        part=arguments.part,
        max_skipped=arguments.max_skipped,
    )
    given = {option.name: getattr(arguments, option.name) for option in source.options if option is not SEED}
    options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if source.input:
        options["input"] = arguments.input
    try:
        reports = prepare(source, job, **options)
    except KeyboardInterrupt:
        raise DataError("interrupted; finished shards are kept, run the same command again to go on") from None
    return [line for report in reports for line in report.lines()]


def _add_source(parser: argparse.ArgumentParser, source: Source) -> None:
    if source.input:
        parser.add_argument("input", metavar="INPUT", type=Path, help=source.input)
    for option in source.options:
        if option is not SEED:
            repeat = {"action": "append"} if option.is_repeated else {}
            default = list(option.default) if option.is_repeated else option.default
            _add(parser, option, default=default, **repeat)


def _add(parser: argparse._ActionsContainer, option: Option, **more: Any) -> None:
    text = option.help.replace("%", "%%")
    parser.add_argument(option.flag, dest=option.name, type=_typed(option.read), metavar=option.metavar or None, help=text, **more)


def _add_shared(parser: argparse.ArgumentParser, source: Source) -> None:
    where = parser.add_argument_group("shards")
    where.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the shards")
    _add(where, SEED, default=SEED.default)
    where.add_argument("--split", default="train", metavar="NAME", help="what the shards are called, NAME-00000.tar (default train)")
    where.add_argument(
        "--test-share", type=float, default=0.0, metavar="SHARE", help="hold this share of the samples (or groups) out in shards of `test`"
    )
    where.add_argument("--test-list", type=Path, metavar="FILE", help="hold the keys (or groups) of this list out, one a line")
    samples = source.samples_a_shard
    where.add_argument(
        "--max-samples-per-shard",
        type=_typed(count),
        default=samples,
        metavar="N",
        help=f"close a shard after N samples (default {samples})",
    )
    where.add_argument(
        "--max-bytes-per-shard",
        type=_typed(_num_bytes),
        default=1 << 30,
        metavar="BYTES",
        help="or after so many bytes of inputs, such as 500M (default 1 GiB)",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=_typed(count), default=env.num_cores(), metavar="N", help="processes (default: all cores)")
    work.add_argument(
        "--part",
        type=_typed(_part),
        default=(0, 1),
        metavar="I/N",
        help="do the I-th of N parts only, counted from 0, such as $SLURM_ARRAY_TASK_ID/16",
    )
    work.add_argument(
        "--max-skipped",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of samples that may be skipped before that is an error (default 0.05)",
    )


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader whose complaint argparse shows."""

    def typed(word: str) -> Any:
        try:
            return read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def _num_bytes(word: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]*)([kMG]?)B?", word)
    if match is None:
        raise ValueError(f"{word!r} is no size; write a number of bytes, or a number with k, M or G, such as 500M")
    return int(match[1]) * _UNITS[match[2]]


def _part(word: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+)/([1-9][0-9]*)", word)
    if match is None:
        raise ValueError(f"{word!r} is not I/N, such as 0/16")
    return int(match[1]), int(match[2])
