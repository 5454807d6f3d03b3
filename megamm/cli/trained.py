"""What is done with a trained model: `megamm evaluate`, `predict`, `generate`, `export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megamm.cli.command import Arguments, count, source_argument
from megamm.core.errors import ConfigError
from megamm.core.names import listed


def _beams_argument(parser: argparse.ArgumentParser) -> None:
    help = "find recommended items by a search with N beams instead of ranking all of them (for catalogues of millions)"
    parser.add_argument("--num-beams", type=count, default=None, metavar="N", help=help)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    source_argument(parser)
    help = "folder for report.json and report.md (default: SOURCE/evaluation; of a checkpoint RUN/evaluation_step_…)"
    parser.add_argument("--output", type=Path, default=None, help=help)
    parser.add_argument("--shards", action="append", default=[], metavar="NAME=GLOB", help="held-out shards instead of the recipe's")
    parser.add_argument("--tasks", default="", help="comma-separated tasks to keep (default: all)")
    parser.add_argument("--max-samples", type=int, default=0, help="samples of each dataset, spread evenly over it (default: all)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, help="bound on an answer (default: 512, or half of the decoder's positions)")
    _beams_argument(parser)
    parser.add_argument("--slices", default="", help="comma-separated metadata fields whose values get rows of their own")
    changes = parser.add_mutually_exclusive_group()
    changes.add_argument("--robustness", action="store_true", help="evaluate with changed pictures and sounds as well: all changes")
    changes.add_argument(
        "--changes", default="", help="comma-separated changes instead: noise, blur, jpeg, speed, gain (docs/evaluation.md)"
    )


def evaluate(arguments: Arguments) -> None:
    from megamm.evaluation import evaluate
    from megamm.evaluation.changes import CHANGES

    pairs = [pair.partition("=") for pair in arguments.shards]
    for name, equals, glob in pairs:
        if not (name and equals and glob):
            raise ConfigError(f"--shards {name}{equals}{glob} is not NAME=GLOB, such as --shards digits='data/digits/test-*.tar'")
    names = [name for name, _, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--shards names {twice[0]} twice; give each dataset a name of its own, or one glob for all of its shards")
    named = listed(arguments.changes)
    changes = tuple(change.name for change in CHANGES) if arguments.robustness else named
    report = evaluate(
        arguments.source,
        datasets={name: glob for name, _, glob in pairs} or None,
        tasks=listed(arguments.tasks),
        output=arguments.output or _evaluation_of(arguments.source),
        max_samples=arguments.max_samples or None,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        slices=listed(arguments.slices),
        changes=changes,
    )
    if report is not None:
        print(report.to_markdown())


def _evaluation_of(source: Path) -> Path:
    """Where the report on a source goes: that on a checkpoint into its run, because a checkpoint stays as it was committed."""
    from megamm.inference.load import is_checkpoint

    checkpoint = source.resolve()
    return checkpoint.parent.parent / f"evaluation_{checkpoint.name}" if is_checkpoint(source) else source / "evaluation"


def pseudo_label_arguments(parser: argparse.ArgumentParser) -> None:
    source_argument(parser)
    help = "shards to label, in our own form; answers in them are not shown to the model (may be repeated)"
    parser.add_argument("--data", action="append", required=True, metavar="GLOB", help=help)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the new shards")
    parser.add_argument("--threshold", type=float, default=0.9, help="least probability of an answer that is kept (default: 0.9)")
    parser.add_argument("--tasks", default="", help="comma-separated tasks to label (default: all)")
    parser.add_argument("--split", default="train", help="what the names of the shards begin with (default: train)")
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--max-new-tokens", type=count, default=32, help="bound on an answer in tokens (default: 32)")


def pseudo_label(arguments: Arguments) -> None:
    from megamm.labelling import pseudo_label

    report = pseudo_label(
        arguments.source,
        arguments.data,
        arguments.output,
        threshold=arguments.threshold,
        tasks=listed(arguments.tasks),
        split=arguments.split,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    if report is not None:
        print(report.to_markdown())


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    source_argument(parser)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="pictures and sounds, a prediction each")
    parser.add_argument("--together", action="store_true", help="one prediction about all FILEs, in their order")
    parser.add_argument("--task", required=True, help="what is asked for, such as detection")
    parser.add_argument("--text", default="", help="what to ask instead of the task's own prompt")
    items = "ids of items that a user met, the oldest first: commas inside a basket, semicolons between baskets"
    parser.add_argument("--items", default="", help=items)
    shown = "what a history says of items, as `prepare interactions --show` had it for training (default: text)"
    parser.add_argument("--show", choices=("text", "codes"), default="text", help=shown)
    parser.add_argument("--num-items", type=count, default=10, help="items of a recommendation (default: 10)")
    parser.add_argument("--exclude-known", action="store_true", help="recommend none of --items")
    _beams_argument(parser)
    drawn = "draw boxes and instances over pictures (of a head's those of a score of 0.5 or more), and write maps of instances, as PNG"
    parser.add_argument("--draw", type=Path, default=None, metavar="DIR", help=drawn)
    parser.add_argument("--batch-size", type=count, default=16)
    parser.add_argument("--max-new-tokens", type=count, default=512, help="bound on an answer (default: 512)")


def predict(arguments: Arguments) -> None:
    from megamm.inference import predict
    from megamm.inference.drawing import least_drawn
    from megamm.inference.load import load_model

    found = (listed(basket) for basket in arguments.items.split(";"))
    questions = predict.questions_of(arguments.files, tuple(filter(None, found)), arguments.text, together=arguments.together)
    ranking = predict.Ranking(arguments.num_items, arguments.num_beams, arguments.show == "text", arguments.exclude_known)
    sizes = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens, "ranking": ranking}
    loaded = load_model(arguments.source)
    drawing = {"limits": loaded.media.limits, "least_score": least_drawn(loaded.model.head and loaded.model.head.settings), "colours": {}}
    for number, prediction in enumerate(predict.predict(loaded, arguments.task, questions, **sizes)):
        print(predict.line(prediction), flush=True)
        if arguments.draw is not None and prediction.question.files:
            path = arguments.draw / f"{number:04}-{prediction.question.files[0].stem}.png"
            predict.draw(prediction, path, **drawing)


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    source_argument(parser)
    parser.add_argument("--text", default="", help="what to ask")
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture to show before the text")
    parser.add_argument("--audio", type=Path, action="append", default=[], help="sound to play before the text")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def generate(arguments: Arguments) -> None:
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


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder (its newest good checkpoint), or one of its checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="new Hugging Face folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--max-shard-size", default="4GB")
    parser.add_argument("--views", default="", help="comma-separated stock views to write as well: text, audio, image")
    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument("--merge", action="store_true", help="make an adapter's changes of low rank part of the weights")
    adapter.add_argument("--peft", action="store_true", help="write the adapter alone, as a folder of the peft library")


def export(arguments: Arguments) -> None:
    from megamm.export import export, export_peft

    views = listed(arguments.views)
    if arguments.peft:
        folder = export_peft(arguments.run, arguments.output)
    else:
        folder = export(
            arguments.run,
            arguments.output,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            views=views,
            merge=arguments.merge,
        )
    print(f"exported to {folder}")
