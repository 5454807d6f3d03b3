"""`megamm prepare`, `megamm tokenizer`, `megamm data …`: from raw files to shards, and what a run made of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megamm.cli.command import Arguments, count, load, run_argument, sidecars_argument
from megamm.core import env
from megamm.core.errors import ConfigError


def prepare_arguments(parser: argparse.ArgumentParser) -> None:
    from megamm.prepare.arguments import add_arguments

    add_arguments(parser)


def prepare(arguments: Arguments) -> None:
    from megamm.prepare.arguments import run

    for line in run(arguments):
        print(line)


def tokenizer(arguments: Arguments) -> None:
    from megamm.prepare.tokenizer import make_tokenizer

    print(make_tokenizer(load(arguments)))


def shards_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="tar files or URLs; {00000..00099} names a range")
    sidecars_argument(parser)
    parser.add_argument("--workers", type=count, default=env.num_cores(), metavar="N", help="processes (default: all cores)")


def index(arguments: Arguments) -> None:
    _check_shards(arguments, write=True)


def verify(arguments: Arguments) -> None:
    _check_shards(arguments, write=False)


def _check_shards(arguments: Arguments, *, write: bool) -> None:
    from tqdm import tqdm

    from megamm.prepare import verify

    shards, results = verify.find_all(arguments.shards, arguments.sidecars), []
    checked = verify.check_all(shards, arguments.sidecars, write=write, num_workers=arguments.workers)
    with tqdm(total=len(shards), unit="shard", disable=None) as bar:
        for one in checked:
            results.append(one)
            bar.update()
            if not one.refused:
                more = "" if write else f", digest {one.digest} holds, planned lengths: {one.num_lengths}"
                bar.write(f"{one.shard}: {one.num_samples} samples{more}", file=sys.stdout)
    for line in verify.summary(results, [] if write else verify.stray_files(shards)):
        print(line)
    verify.check_none_refused(results)


def plan_lengths(arguments: Arguments) -> None:
    from megamm.train.build import load_tokenizer
    from megamm.train.data import plan_all_lengths

    recipe = load(arguments)
    for line in plan_all_lengths(recipe, load_tokenizer(recipe)):
        print(line)


def stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="RECIPE|SHARD", help="a recipe, or shards that are indexed")
    parser.add_argument("--output", type=Path, default=None, metavar="DIR", help="write stats.json and histograms (PNG) into this folder")
    sidecars_argument(parser)


def stats(arguments: Arguments) -> None:
    from megamm.config import load_recipe, recipe_names
    from megamm.prepare.stats import recipe_stats, shard_stats

    name, *others = arguments.data
    if name in recipe_names() or name.endswith(".toml"):
        from megamm.train.build import load_tokenizer

        if others:
            raise ConfigError(f"{others[0]!r} after the recipe {name}: name one recipe, or shards alone")
        recipe = load_recipe(name, arguments.overrides)
        stats = recipe_stats(recipe, load_tokenizer(recipe))
    else:
        from megamm.prepare.verify import find_all

        if arguments.overrides:
            raise ConfigError(f"{arguments.overrides[0]!r} overrides a recipe, but shards are named")
        stats = shard_stats(find_all(arguments.data, arguments.sidecars))
    if arguments.output is not None:
        from megamm.core.files import write_json
        from megamm.prepare.plots import write_plots

        paths = write_plots(stats, arguments.output)
        write_json(arguments.output / "stats.json", stats.to_json())
        print(f"wrote {', '.join(path.name for path in paths)} and stats.json into {arguments.output}", file=sys.stderr)
    print(stats.to_markdown())


def report_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--all", action="store_true", help="list every entry, not only the last 100")
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def report(arguments: Arguments) -> None:
    from megamm.train.data_report import read_report

    report = read_report(arguments.run)
    print(json.dumps(report.to_json(), indent=2) if arguments.json else "\n".join(report.lines(max_entries=None if arguments.all else 100)))


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    steps = parser.add_mutually_exclusive_group(required=True)
    steps.add_argument("--step", type=int, help="number of the step, from 1, as metrics.jsonl counts")
    steps.add_argument("--data-step", type=int, metavar="STEP", help="the same counted over the whole plan, what was left out included")
    parser.add_argument("--world-size", type=int, default=None, help="deal the step to so many ranks (default: as many as the run had)")
    parser.add_argument("--rank", type=int, default=None, help="list rows and samples of this rank only")
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def trace(arguments: Arguments) -> None:
    from megamm.train.trace import trace_step

    of_data = arguments.step is None
    trace = trace_step(arguments.run, arguments.data_step if of_data else arguments.step, world_size=arguments.world_size, of_data=of_data)
    if arguments.rank is not None:
        trace = trace.of_rank(arguments.rank)
    print(json.dumps(trace.to_json(), indent=2) if arguments.json else "\n".join(trace.lines()))
