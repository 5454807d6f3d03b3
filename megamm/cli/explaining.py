"""Why a trained model answers what it answers: `megamm explain`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megamm.cli.command import Arguments, count, source_argument


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked, which answer is explained, and how."""
    from megamm.inference.explain import METHODS

    source_argument(parser)
    parser.add_argument("--text", default="", help="what to ask")
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture to show before the text")
    parser.add_argument("--audio", type=Path, action="append", default=[], help="sound to play before the text")
    parser.add_argument("--answer", default=None, help="answer to explain (default: the model's own)")
    parser.add_argument("--method", choices=tuple(METHODS), default="integrated", help="how (default: integrated gradients)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for explain.json and heat maps")
    parser.add_argument("--steps", type=count, default=None, help="most gradients of integrated (default: 256), or those of smooth (32)")
    parser.add_argument("--max-new-tokens", type=count, default=64, help="bound on the model's own answer (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of smooth")


def explain(arguments: Arguments) -> None:
    """Explain one answer, write it, and print what matters most."""
    import torch

    from megamm.inference.explain import explain, read_question
    from megamm.inference.explain.files import check_output, lines, write
    from megamm.inference.load import load_model

    check_output(arguments.output)
    # Gradients of lower precision are noise in part.
    loaded = load_model(arguments.source, dtype=torch.float32)
    question = read_question(loaded, arguments.text, images=arguments.image, audios=arguments.audio)
    found = explain(
        loaded,
        question,
        answer=arguments.answer,
        method=arguments.method,
        num_steps=arguments.steps,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    written = write(found, question, loaded, arguments.output)
    print("\n".join([*lines(found), "", f"written to {arguments.output}: {', '.join(path.name for path in written)}"]))
