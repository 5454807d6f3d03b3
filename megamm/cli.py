"""The command line: one visible table of subcommands; each parses its words, then calls one function."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

from megamm import __version__
from megamm.core import env
from megamm.core.errors import ConfigError, MegaMMError
from megamm.core.names import did_you_mean

Arguments = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its words after `megamm`, one line of help, how it parses and what it calls."""

    words: tuple[str, ...]
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Arguments], None]
    takes_overrides: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 when it worked, 2 for words that do not parse, 1 for everything else. Errors are one line unless `--debug` is given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        env.apply_defaults()
        command, arguments = _parse(words)
        command.run(arguments)
    except MegaMMError as error:
        if debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.on_all_ranks:
            print(f"megamm: {error}" if rank == "0" else f"megamm (rank {rank}): {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megamm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (a pager, head) is gone; nothing more to say to it.
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"megamm: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the words in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"megamm: {message}; see `{self.prog} --help`\n")


def _parse(words: Sequence[str]) -> tuple[Command, Arguments]:
    parser = _Parser(prog="megamm", description="Train vision-audio-language models at scale.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"megamm {__version__}")
    groups = {(): parser.add_subparsers(metavar="COMMAND", required=True)}
    for command in COMMANDS:
        *group, name = command.words
        if tuple(group) not in groups:
            between = groups[()].add_parser(group[0], help=_GROUP_HELP[group[0]], allow_abbrev=False)
            groups[tuple(group)] = between.add_subparsers(metavar="COMMAND", required=True)
        more = " RECIPE keys can be overridden: --optim.lr 3e-4" if command.takes_overrides else ""
        one = groups[tuple(group)].add_parser(name, help=command.help, description=command.help + more, allow_abbrev=False)
        if tuple(words[: len(command.words)]) == command.words:
            # Of the command that is called alone: the others' arguments may need imports.
            command.arguments(one)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        one.set_defaults(command=command)
    arguments, rest = parser.parse_known_args(words)
    if rest and not arguments.command.takes_overrides:
        raise ConfigError(f"{rest[0]!r} is not an argument of `megamm {' '.join(arguments.command.words)}`; see its --help")
    _check_undotted(arguments, rest)
    arguments.overrides = rest
    return arguments.command, arguments


def _check_undotted(arguments: Arguments, overrides: Sequence[str]) -> None:
    """A word such as `--exlude` is an option that is misspelt rather than a key of a recipe."""
    undotted = [word[2:].partition("=")[0] for word in overrides if word.startswith("--") and "." not in word.partition("=")[0]]
    if not undotted:
        return
    from megamm.config import Recipe

    keys = {field.name for field in fields(Recipe)}
    options = [name.replace("_", "-") for name in vars(arguments)]
    for name in undotted:
        if name not in keys:
            called = f"megamm {' '.join(arguments.command.words)}"
            raise ConfigError(
                f"--{name} is no option of `{called}`{did_you_mean(name, options)}; keys of a recipe are written --optim.lr 3e-4"
            )


def _recipe_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a shipped recipe (see `megamm recipes`) or a TOML file")


def _recipe(arguments: Arguments):
    from megamm.config import load_recipe

    with _same_on_all_ranks():
        return load_recipe(arguments.recipe, arguments.overrides)


@contextlib.contextmanager
def _same_on_all_ranks():
    """Errors inside come from the command's words and shared files alone: every rank raises them, and one prints them."""
    try:
        yield
    except MegaMMError as error:
        error.on_all_ranks = True
        raise


# --- prepare ---------------------------------------------------------------------------------------------------------


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    from megamm.prepare.arguments import add_arguments

    add_arguments(parser)


def _prepare(arguments: Arguments) -> None:
    from megamm.prepare.arguments import run

    for line in run(arguments):
        print(line)


def _tokenizer(arguments: Arguments) -> None:
    from megamm.prepare.tokenizer import make_tokenizer

    print(make_tokenizer(_recipe(arguments)))


# --- data ------------------------------------------------------------------------------------------------------------


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def _shards_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="tar files or URLs; {00000..00099} names a range")
    _sidecars_argument(parser)
    parser.add_argument("--workers", type=_count, default=env.num_cores(), metavar="N", help="processes (default: all cores)")


def _sidecars_argument(parser: argparse.ArgumentParser) -> None:
    text = "folder for the indexes of URLs (default: data/sidecars)"
    parser.add_argument("--sidecars", type=Path, default=Path("data/sidecars"), metavar="DIR", help=text)


def _data_index(arguments: Arguments) -> None:
    _check_shards(arguments, write=True)


def _data_verify(arguments: Arguments) -> None:
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


def _data_plan_lengths(arguments: Arguments) -> None:
    from megamm.train.build import load_tokenizer
    from megamm.train.data import plan_all_lengths

    recipe = _recipe(arguments)
    for line in plan_all_lengths(recipe, load_tokenizer(recipe)):
        print(line)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="RECIPE|SHARD", help="a recipe, or shards that are indexed")
    parser.add_argument("--output", type=Path, default=None, metavar="DIR", help="write stats.json and histograms (PNG) into this folder")
    _sidecars_argument(parser)


def _data_stats(arguments: Arguments) -> None:
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


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--all", action="store_true", help="list every entry, not only the last 100")
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def _data_report(arguments: Arguments) -> None:
    from megamm.train.data_report import read_report

    report = read_report(arguments.run)
    print(json.dumps(report.to_json(), indent=2) if arguments.json else "\n".join(report.lines(max_entries=None if arguments.all else 100)))


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--step", type=int, required=True, help="number of the step, from 1, as metrics.jsonl counts")
    parser.add_argument("--world-size", type=int, default=None, help="deal the step to so many ranks (default: as many as the run had)")
    parser.add_argument("--rank", type=int, default=None, help="list rows and samples of this rank only")
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def _data_trace(arguments: Arguments) -> None:
    from megamm.train.trace import trace_step

    trace = trace_step(arguments.run, arguments.step, world_size=arguments.world_size)
    if arguments.rank is not None:
        trace = trace.of_rank(arguments.rank)
    print(json.dumps(trace.to_json(), indent=2) if arguments.json else "\n".join(trace.lines()))


# --- training --------------------------------------------------------------------------------------------------------


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_argument(parser)
    parser.add_argument("--run", type=Path, default=None, help="run folder (default: runs/RECIPE)")
    parser.add_argument("--resume", default="auto", help="`auto` (default), `never`, or a checkpoint folder that must be used")
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="keep these samples out from here on: one dataset/key a line")
    parser.add_argument("--accept-data-change", action="store_true", help="go on although the data changed since the checkpoint")


def _pretrain(arguments: Arguments) -> None:
    from megamm.config import resumed_recipe
    from megamm.train.interruption import StopRequest

    recipe = _recipe(arguments)
    folder = arguments.run or Path("runs") / recipe.name
    with _same_on_all_ranks():
        recipe = resumed_recipe(folder / "config.json", recipe, arguments.overrides)
    # Before the slow imports: a signal that comes meanwhile must not kill the rank.
    with StopRequest(folder / "STOP") as stop:
        from megamm.train.data import DataChanges
        from megamm.train.pretrain import pretrain

        changes = DataChanges(exclude=arguments.exclude, accept=arguments.accept_data_change)
        pretrain(recipe, folder, resume=arguments.resume, changes=changes, stop=stop)
    if "RANK" in os.environ:
        _leave_at_once()


def _leave_at_once() -> None:
    """End a rank whose work is done and committed, without taking the interpreter apart.

    Threads of gloo and torch that live on while it is taken apart now and then end it by `std::terminate`: a run that is DONE would be
    told as failed, and its launcher would end the other ranks.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _recipes(arguments: Arguments) -> None:
    from megamm.train.recipes import recipe_table

    print(recipe_table())


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a step_... folder of a run's checkpoints")


def _checkpoint_list_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte, not only the manifests")
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def _checkpoint_list(arguments: Arguments) -> None:
    from megamm.checkpoint.operators import entries, listing

    found = entries(arguments.run / "checkpoints", verified=arguments.verify)
    print(
        json.dumps([asdict(entry) for entry in found], indent=2) if arguments.json else "\n".join(listing(found, verified=arguments.verify))
    )


def _checkpoint_show(arguments: Arguments) -> None:
    from megamm.checkpoint.operators import describe

    print(json.dumps(describe(arguments.checkpoint), indent=2))


def _checkpoint_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", type=Path, help="step_... folders of a run's checkpoints")


def _checkpoint_verify(arguments: Arguments) -> None:
    from megamm.checkpoint.manifest import verify

    for folder in arguments.checkpoints:
        manifest = verify(folder)
        print(f"{folder}: {len(manifest.files)} files hold, step {manifest.step}, written by {manifest.world_size} ranks")


def _checkpoint_prune_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--keep-last", type=int, default=None, metavar="N", help="newest checkpoints that stay (default: the recipe's)")
    parser.add_argument("--keep-every", type=int, default=None, metavar="N", help="multiples that stay (default: the recipe's)")
    parser.add_argument("--set-aside", action="store_true", help="delete damaged and stale ones too")


def _checkpoint_prune(arguments: Arguments) -> None:
    from megamm.checkpoint.operators import prune
    from megamm.config import load_resolved

    settings = load_resolved(arguments.run / "config.json").checkpoint
    asked = {name: getattr(arguments, name) for name in ("keep_last", "keep_every") if getattr(arguments, name) is not None}
    if asked.get("keep_last", 1) < 1 or asked.get("keep_every", 0) < 0:
        raise ConfigError(f"keep {asked}: at least the newest checkpoint stays; give --keep-last 1 or more, --keep-every 0 or more")
    for name in prune(arguments.run, replace(settings, **asked), set_aside=arguments.set_aside):
        print(f"deleted {name}")


def _checkpoint_reshard_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_argument(parser)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="number of ranks to write for")
    parser.add_argument("--output", type=Path, required=True, help="`checkpoints` folder to write it to")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="shards written at once; each holds one tensor in memory")


def _checkpoint_reshard(arguments: Arguments) -> None:
    from megamm.checkpoint.reshard import reshard

    if arguments.ranks < 1 or arguments.threads < 1:
        raise ConfigError(f"--ranks {arguments.ranks} --threads {arguments.threads}: give 1 or more of each")
    print(reshard(arguments.checkpoint, arguments.output, arguments.ranks, num_threads=arguments.threads))


# --- after training --------------------------------------------------------------------------------------------------


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")


def _source_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run folder or exported folder")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _source_argument(parser)
    parser.add_argument("--output", type=Path, default=None, help="folder for report.json and report.md (default: SOURCE/evaluation)")
    parser.add_argument("--shards", action="append", default=[], metavar="NAME=GLOB", help="held-out shards instead of the recipe's")
    parser.add_argument("--tasks", default="", help="comma-separated tasks to keep (default: all)")
    parser.add_argument("--max-samples", type=int, default=0, help="samples of each dataset, spread evenly over it (default: all)")
    parser.add_argument("--batch-size", type=int, default=64)


def _evaluate(arguments: Arguments) -> None:
    from megamm.evaluation import evaluate

    pairs = [pair.partition("=") for pair in arguments.shards]
    for name, equals, glob in pairs:
        if not (name and equals and glob):
            raise ConfigError(f"--shards {name}{equals}{glob} is not NAME=GLOB, such as --shards digits='data/digits/test-*.tar'")
    report = evaluate(
        arguments.source,
        datasets={name: glob for name, _, glob in pairs} or None,
        tasks=tuple(filter(None, arguments.tasks.split(","))),
        output=arguments.output or arguments.source / "evaluation",
        max_samples=arguments.max_samples or None,
        batch_size=arguments.batch_size,
    )
    print(report.to_markdown())


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _source_argument(parser)
    parser.add_argument("--text", default="", help="what to ask")
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture to show before the text")
    parser.add_argument("--audio", type=Path, action="append", default=[], help="sound to play before the text")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _generate(arguments: Arguments) -> None:
    from megamm.inference import answer

    print(
        answer(
            arguments.source,
            text=arguments.text,
            images=arguments.image,
            audios=arguments.audio,
            max_new_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--output", type=Path, required=True, help="new Hugging Face folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--max-shard-size", default="4GB")
    parser.add_argument("--views", default="", help="comma-separated stock views to write as well: text, audio, image")


def _export(arguments: Arguments) -> None:
    from megamm.export import export

    views = tuple(filter(None, arguments.views.split(",")))
    folder = export(arguments.run, arguments.output, dtype=arguments.dtype, max_shard_size=arguments.max_shard_size, views=views)
    print(f"exported to {folder}")


def _nothing(parser: argparse.ArgumentParser) -> None:
    del parser


_GROUP_HELP = {
    "data": "Check and measure shards; ask what a run made of them.",
    "checkpoint": "List, verify, prune and re-shard checkpoints.",
}

COMMANDS = (
    Command(("recipes",), "List the shipped recipes with their parameter counts.", _nothing, _recipes),
    Command(("prepare",), "Write WebDataset shards from a raw source.", _prepare_arguments, _prepare),
    Command(
        ("tokenizer",), "Train the text tokenizer on the recipe's shards and lay out the vocabulary.", _recipe_argument, _tokenizer, True
    ),
    Command(("data", "index"), "Validate shards and write their sidecar indexes.", _shards_arguments, _data_index),
    Command(("data", "verify"), "Check shards against their indexes, byte for byte.", _shards_arguments, _data_verify),
    Command(("data", "plan-lengths"), "Plan the token length of every sample of a recipe.", _recipe_argument, _data_plan_lengths, True),
    Command(("data", "stats"), "Measure a recipe's data, or shards, from their sidecars.", _stats_arguments, _data_stats, True),
    Command(("data", "report"), "Say what a run skipped, and why.", _report_arguments, _data_report),
    Command(("data", "trace"), "List the samples of a run's step: rank, row, dataset and key.", _trace_arguments, _data_trace),
    Command(("pretrain",), "Train a recipe, or resume it.", _pretrain_arguments, _pretrain, True),
    Command(("checkpoint", "list"), "List a run's checkpoints.", _checkpoint_list_arguments, _checkpoint_list),
    Command(("checkpoint", "show"), "Say what a checkpoint holds.", _checkpoint_argument, _checkpoint_show),
    Command(("checkpoint", "verify"), "Read every byte of checkpoints.", _checkpoint_verify_arguments, _checkpoint_verify),
    Command(("checkpoint", "prune"), "Delete checkpoints that a good newer one replaces.", _checkpoint_prune_arguments, _checkpoint_prune),
    Command(
        ("checkpoint", "reshard"), "Rewrite a checkpoint for another number of ranks.", _checkpoint_reshard_arguments, _checkpoint_reshard
    ),
    Command(("evaluate",), "Run tasks over held-out samples.", _evaluate_arguments, _evaluate),
    Command(("generate",), "Ask a run or an exported folder.", _generate_arguments, _generate),
    Command(("export",), "Write a Hugging Face folder from a run, with proof that it matches.", _export_arguments, _export),
)

if __name__ == "__main__":
    sys.exit(main())
