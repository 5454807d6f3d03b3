"""From a question to an explanation of its answer, by one of several methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megamm.core.errors import ConfigError
from megamm.core.names import did_you_mean
from megamm.core.types import ImageInput
from megamm.inference.explain.answer import find_answer
from megamm.inference.explain.explanation import Explanation, PictureScores, SoundScores
from megamm.inference.explain.gradients import LEAST_STEPS, gradient_times_input, integrated_gradients, smooth_times_input, total
from megamm.inference.explain.log_odds import LogOdds, Values
from megamm.inference.explain.places import patches, spans, token_of_frame, words
from megamm.inference.explain.question import Question
from megamm.inference.explain.rollout import AttentionMethod, Shares, relevant, rolled_out, trace
from megamm.inference.load import Loaded


@dataclass(frozen=True, slots=True)
class Method:
    """A way to explain.

    Attributes:
        title: In words.
        how: From log odds, a number of gradients and a seed to contributions in nats; or how attention is followed.
        num_steps: Gradients that it takes, at most; 0 where their number is its own.
    """

    title: str
    how: Callable[[LogOdds, int, int], Values] | AttentionMethod
    num_steps: int = 0


METHODS = {
    "integrated": Method("integrated gradients", integrated_gradients, 256),
    "gradient": Method("gradient × input", gradient_times_input),
    "smooth": Method("SmoothGrad × input", smooth_times_input, 32),
    "rollout": Method("attention rollout", AttentionMethod(rolled_out, uses_gradient=False)),
    "relevance": Method("attention × gradient", AttentionMethod(relevant, uses_gradient=True)),
}


def explain(
    loaded: Loaded,
    question: Question,
    *,
    answer: str | None = None,
    method: str = "integrated",
    num_steps: int | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Explanation:
    """Attribute an answer to patches of pictures, stretches of sounds and words.

    Args:
        loaded: The model, best in float32: gradients of lower precision are noisy.
        question: From `read_question`.
        answer: What is explained; None for the model's own.
        method: A name in `METHODS`.
        num_steps: Gradients that `smooth` averages, and most of `integrated`; None for as many as the method is good with.
        max_new_tokens: Bound on the model's own answer.
        seed: Of the noise of `smooth`.

    Raises:
        ConfigError: No such method, too few steps for it, steps or a seed that it does not take, or an answer or a model that cannot be
            explained.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not known; the methods are {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    how = METHODS[method].how
    if how is integrated_gradients and num_steps is not None and num_steps < LEAST_STEPS:
        raise ConfigError(f"num_steps={num_steps} is too few for integrated gradients; give {LEAST_STEPS} or more (--steps)")
    if num_steps is not None and not METHODS[method].num_steps:
        raise ConfigError(f"num_steps={num_steps}: method {method!r} takes no steps; drop it (--steps)")
    if seed and how is not smooth_times_input:
        raise ConfigError(f"seed={seed}: method {method!r} draws nothing; drop it (--seed)")
    log_odds = LogOdds(loaded, question, find_answer(loaded, question, answer, max_new_tokens=max_new_tokens))
    if isinstance(how, AttentionMethod):
        return _by_attention(loaded, question, log_odds, method, trace(log_odds, how))
    values = how(log_odds, num_steps or METHODS[method].num_steps, seed)
    facts = {}
    if method == "integrated":
        # What the scores sum to, and what they would if they were exact.
        facts = {"sum": total(values), "difference": log_odds.at_input - log_odds.at_baseline, "baseline_log_odds": log_odds.at_baseline}
    return _by_gradient(loaded, question, log_odds, method, values, facts)


def _by_gradient(
    loaded: Loaded, question: Question, log_odds: LogOdds, method: str, values: Values, facts: dict[str, float]
) -> Explanation:
    arrays = {kind: value.double().cpu().numpy() for kind, value in values.items()}
    pictures = []
    for file, image, scores in zip(question.image_files, question.prompt.images, arrays.get("image", ()), strict=True):
        pixels = _pixels(scores, image)
        rows, columns = image.grid
        cells = pixels.reshape(rows, pixels.shape[0] // rows, columns, pixels.shape[1] // columns).sum((1, 3))
        pictures.append(PictureScores(file, image.grid, patches(cells, image), pixels))
    sounds = []
    features = loaded.media.audio
    for number, audio in enumerate(question.prompt.audios):
        num_frames = audio.mel.shape[1]
        cells = arrays["audio"][number, :, :num_frames]
        totals = np.bincount(token_of_frame(num_frames), weights=cells.sum(0), minlength=audio.num_tokens)
        own = spans(totals, num_frames, features)
        sounds.append(SoundScores(question.audio_files[number], question.seconds[number], own, audio.mel, cells))
    return _explanation(loaded, question, log_odds, method, arrays["text"].sum(-1), pictures, sounds, facts=facts)


def _by_attention(loaded: Loaded, question: Question, log_odds: LogOdds, method: str, shares: Shares) -> Explanation:
    pictures = [
        PictureScores(file, image.grid, patches(cells.numpy(), image))
        for file, image, cells in zip(question.image_files, question.prompt.images, shares.cells, strict=True)
    ]
    sounds = [
        SoundScores(file, seconds, spans(scores.numpy(), audio.mel.shape[1], loaded.media.audio), audio.mel)
        for file, seconds, audio, scores in zip(question.audio_files, question.seconds, question.prompt.audios, shares.sounds, strict=True)
    ]
    tokens, first, stop = shares.tokens.numpy(), log_odds.text_start, log_odds.text_start + log_odds.num_text_tokens
    others = {
        "layout": float(tokens[:first].sum() + tokens[stop : log_odds.num_prompt_tokens].sum()),
        "answer so far": float(tokens[log_odds.num_prompt_tokens :].sum()),
        "prefix": shares.prefix,
    }
    others = {name: share for name, share in others.items() if share}
    return _explanation(loaded, question, log_odds, method, tokens, pictures, sounds, others=others)


def _explanation(
    loaded: Loaded,
    question: Question,
    log_odds: LogOdds,
    method: str,
    tokens: np.ndarray,
    pictures: list[PictureScores],
    sounds: list[SoundScores],
    *,
    others: dict[str, float] | None = None,
    facts: dict[str, float] | None = None,
) -> Explanation:
    is_signed = not isinstance(METHODS[method].how, AttentionMethod)
    own = tokens[log_odds.text_start : log_odds.text_start + log_odds.num_text_tokens]
    return Explanation(
        source=loaded.source,
        method=method,
        unit="nats of log odds" if is_signed else "share",
        is_signed=is_signed,
        text=question.text,
        answer=log_odds.answer,
        log_probabilities=tuple(log_odds.log_probabilities()),
        log_odds=log_odds.at_input,
        pictures=tuple(pictures),
        sounds=tuple(sounds),
        words=words(question.text, loaded.tokenizer.spans(question.text), own),
        others=others or {},
        facts=facts or {},
    )


def _pixels(scores: np.ndarray, image: ImageInput) -> np.ndarray:
    """float64[h, w] of a picture's scores in the shape of its tower's input, channels summed."""
    if image.pixels.ndim == 3:
        return scores.sum(0)
    (rows, columns), side = image.grid, round((image.pixels.shape[1] / 3) ** 0.5)
    cells = scores[: rows * columns].reshape(rows, columns, side, side, 3).sum(-1)
    return cells.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
