"""Answers in text: greedy or sampled continuation of prompts with a KV cache, many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from megamm.core.errors import ConfigError
from megamm.core.types import Message, Part
from megamm.inference.load import Loaded, load_model
from megamm.inference.prompt import Prompt, left_padded, make_prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Bound on the answer, in tokens.
        temperature: 0 takes the likeliest token (greedy); above, logits are divided by it and a token is drawn.
        top_k: Draw among this many likeliest tokens; 0 for all.
        top_p: Draw among the likeliest tokens that together have this probability; 1 for all.
        seed: Of the draws; equal prompts in an equal batch give equal answers.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be sampled with; give {wanted}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said.

    Attributes:
        text: The text pieces of `token_ids`.
        token_ids: Everything generated, without the token that ended it.
        is_finished: True where the model ended the answer; False where `max_new_tokens` did.
        probabilities: Of each of `token_ids`, given those before; equal answers may differ here by rounding.
    """

    text: str
    token_ids: tuple[int, ...]
    is_finished: bool
    probabilities: tuple[float, ...] = field(compare=False)


# Not inference_mode: weights that ZeRO-3 gathers in here stay, and training goes on with them.
@torch.no_grad()
def generate(
    loaded: Loaded, prompts: Sequence[Prompt], sampling: Sampling | None = None, *, use_cache: bool = True, in_step: bool = False
) -> list[Answer]:
    """Answer every prompt; greedy answers do not depend on which prompts share the batch (to rounding).

    Args:
        loaded: The model.
        prompts: Run as one batch.
        sampling: None for greedy answers.
        use_cache: False computes every token from scratch, for comparison.
        in_step: The weights are split over ranks, which all answer prompts of their own at once: none leaves before all have done.

    Raises:
        ConfigError: A prompt with its answer would be longer than the decoder's positions.
    """
    sampling = Sampling() if sampling is None else sampling
    if not prompts:
        return []
    inputs = left_padded(prompts, loaded.config.pad_token_id, loaded.device)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    limit = loaded.config.text_config.max_position_embeddings
    if num_prompt_tokens + sampling.max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {num_prompt_tokens} tokens and max_new_tokens={sampling.max_new_tokens} exceed the decoder's {limit} positions; "
            "shorten the prompt or the answer"
        )
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        chosen = _Chosen()
        config = _generation_config(loaded, sampling, use_cache)
        output = loaded.model.generate(**inputs, generation_config=config, logits_processor=[chosen], synced_gpus=in_step)
    output = output[:, num_prompt_tokens:]
    return [_answer(loaded, *row) for row in zip(output.tolist(), chosen.probabilities(output).tolist(), strict=True)]


def ask(loaded: Loaded, text: str, *, images: Sequence[Path] = (), audios: Sequence[Path] = (), sampling: Sampling | None = None) -> Answer:
    """Ask one question about pictures and sounds in files, which stand before the text.

    Raises:
        ConfigError: Nothing is asked, or a file is missing.
        DataError: A file cannot be decoded, or the model has no tower for it.
    """
    parts, media = [], {}
    for type_name, paths in (("image", images), ("audio", audios)):
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"{path} does not exist; name a file for --{type_name}")
            media[str(path)] = path.read_bytes()
            parts.append(Part(type_name, member=str(path)))
    if text:
        parts.append(Part("text", text=text))
    if not parts:
        raise ConfigError("nothing is asked; give --text, --image or --audio")
    return generate(loaded, [make_prompt(loaded, [Message("user", tuple(parts))], media)], sampling)[0]


def answer(
    source: Path, *, text: str = "", images: Sequence[Path] = (), audios: Sequence[Path] = (), device: str | None = None, **sampling: Any
) -> str:
    """Load a run or an exported folder, ask it once, and return the answer's text (`megamm generate`).

    Args:
        source: Run folder or exported folder.
        text: The question.
        images: Picture files, shown before the text.
        audios: Sound files, played before the text.
        device: Where the model runs; None takes the GPU where there is one.
        sampling: Fields of `Sampling`.

    Raises:
        ConfigError: As `load_model`, `Sampling` and `ask`.
        CheckpointError: As `load_model`.
        DataError: As `ask`.
    """
    chosen = Sampling(**sampling)
    return ask(load_model(source, device=device), text, images=images, audios=audios, sampling=chosen).text


def stop_ids(loaded: Loaded) -> tuple[int, ...]:
    """Ids that end an answer: `<|end|>` and `<|eos|>`."""
    return tuple(loaded.tokenizer.vocabulary.control_id(name) for name in ("end", "eos"))


def _generation_config(loaded: Loaded, sampling: Sampling, use_cache: bool) -> GenerationConfig:
    common = {
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": list(stop_ids(loaded)),
        "pad_token_id": loaded.config.pad_token_id,
        "use_cache": use_cache,
    }
    if sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, **common)


class _Chosen(LogitsProcessor):
    """Keeps how likely each token was that was chosen; a step's choice is known when the next one begins.

    State: the last step's log-probabilities float32[B, V], and float32[B] of each token before.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._past: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Take a step's logits [B, V]; they stay as they are."""
        if self._last is not None:
            self._past.append(self._last.gather(1, input_ids[:, -1:]).squeeze(1))
        self._last = scores.float().log_softmax(-1)
        return scores

    def probabilities(self, new_ids: torch.Tensor) -> torch.Tensor:
        """float32[B, T] of the tokens int64[B, T] that were generated."""
        self._past.append(self._last.gather(1, new_ids[:, -1:]).squeeze(1))
        return torch.stack(self._past, dim=1).exp().cpu()


def _answer(loaded: Loaded, token_ids: list[int], probabilities: list[float]) -> Answer:
    stops = set(stop_ids(loaded))
    length = next((index for index, token_id in enumerate(token_ids) if token_id in stops), None)
    own = token_ids if length is None else token_ids[:length]
    return Answer(loaded.tokenizer.decode(own), tuple(own), length is not None, tuple(probabilities[: len(own)]))
