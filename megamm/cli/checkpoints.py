"""`megamm checkpoint …`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from megamm.cli.command import Arguments, run_argument
from megamm.core.errors import CheckpointError, ConfigError


def argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a step_... folder of a run's checkpoints")


def list_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte, not only the manifests")
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def list_(arguments: Arguments) -> None:
    from megamm.checkpoint.operators import entries, listing

    found = entries(arguments.run / "checkpoints", verified=arguments.verify)
    print(
        json.dumps([asdict(entry) for entry in found], indent=2) if arguments.json else "\n".join(listing(found, verified=arguments.verify))
    )


def show(arguments: Arguments) -> None:
    from megamm.checkpoint.operators import describe

    print(json.dumps(describe(arguments.checkpoint), indent=2))


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", type=Path, help="step_... folders of a run's checkpoints")


def verify(arguments: Arguments) -> None:
    from megamm.checkpoint.manifest import verify
    from megamm.checkpoint.operators import ranks

    problems = []
    for folder in arguments.checkpoints:
        try:
            manifest = verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            print(f"{folder}: {len(manifest.files)} files hold, step {manifest.step}, written by {ranks(manifest.world_size)}")
    if problems:
        raise CheckpointError("\n".join(problems))


def prune_arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--keep-last", type=int, default=None, metavar="N", help="newest checkpoints that stay (default: the recipe's)")
    parser.add_argument("--keep-every", type=int, default=None, metavar="N", help="multiples that stay (default: the recipe's)")
    parser.add_argument("--set-aside", action="store_true", help="delete damaged and stale ones too")


def prune(arguments: Arguments) -> None:
    from megamm.checkpoint.operators import prune
    from megamm.config import load_resolved

    settings = load_resolved(arguments.run / "config.json").checkpoint
    asked = {name: getattr(arguments, name) for name in ("keep_last", "keep_every") if getattr(arguments, name) is not None}
    if asked.get("keep_last", 1) < 1 or asked.get("keep_every", 0) < 0:
        raise ConfigError(f"keep {asked}: at least the newest checkpoint stays; give --keep-last 1 or more, --keep-every 0 or more")
    for name in prune(arguments.run, replace(settings, **asked), set_aside=arguments.set_aside):
        print(f"deleted {name}")


def reshard_arguments(parser: argparse.ArgumentParser) -> None:
    argument(parser)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="number of ranks to write for")
    parser.add_argument("--output", type=Path, required=True, help="`checkpoints` folder to write it to")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="shards written at once; each holds one tensor in memory")


def reshard(arguments: Arguments) -> None:
    from megamm.checkpoint.reshard import reshard

    if arguments.ranks < 1 or arguments.threads < 1:
        raise ConfigError(f"--ranks {arguments.ranks} --threads {arguments.threads}: give 1 or more of each")
    print(reshard(arguments.checkpoint, arguments.output, arguments.ranks, num_threads=arguments.threads))
