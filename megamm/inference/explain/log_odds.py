"""How strongly a model is for an answer, as a function that can be differentiated by everything that it sees.

Log odds, log p / (1 - p), are what is explained: unlike a probability or its logarithm they go on growing, and have gradients, where a
model is sure of what it says.

Legend: B variants of one question, S tokens, E decoder width, N pictures or sounds, A tokens of an answer, L labels.

Source: M. Robnik-Sikonja, I. Kononenko, "Explaining classifications for individual instances", 2008 (weight of evidence).
"""

from __future__ import annotations

from typing import Any

import torch

from megamm.inference.explain.question import Answer, Question
from megamm.inference.load import Loaded
from megamm.inference.prompt import media_arrays

Values = dict[str, torch.Tensor]
"""What a model sees and can be varied: `text`, `image` and `audio`, those that there are."""

_MEDIA = {"image": "pixel_values", "audio": "input_features"}


def alone(values: Values) -> Values:
    """A batch of one variant."""
    return {kind: value[None] for kind, value in values.items()}


class LogOdds:
    """The log odds of one answer to one question. Stateless after it is made.

    The sum over the tokens of an answer, each given those before it, without the token that ends it; or those of a head's label.

    Attributes:
        answer: What is explained.
        model: That answers.
        prompt: What it is asked.
        values: What the model sees: `text` float[S, E], embeddings; `image` as its tower takes it, `audio` float[N, M, F], log-mel.
        baseline: The same with nothing in it: words are the mean of all embeddings of text, a picture is its own mean colour, a sound
            its quietest value (0 where bands are centred). Control tokens and an answer's own tokens stay: they are layout.
        input_ids: int64[S], the prompt and all but the last token of the answer.
        num_prompt_tokens: Of the prompt.
        at_input: The log odds of what is there.
        at_baseline: The log odds of nothing.
        text_start: Where the question's words begin.
        num_text_tokens: Tokens of the question's words.
    """

    def __init__(self, loaded: Loaded, question: Question, answer: Answer) -> None:
        self.model, self.prompt, self.answer = loaded.model, question.prompt, answer
        prompt, num_text = question.prompt, len(loaded.tokenizer.encode(question.text))
        self.num_prompt_tokens, self.num_text_tokens = len(prompt.input_ids), num_text
        # The prompt ends with the words, <|end|> and <|assistant|>.
        self.text_start = self.num_prompt_tokens - num_text - 2
        self.input_ids = torch.tensor([*prompt.input_ids, *answer.token_ids[:-1]], dtype=torch.long, device=loaded.device)
        arrays = media_arrays(prompt.images, prompt.audios)
        self._fixed = {name: torch.from_numpy(array).to(loaded.device) for name, array in arrays.items()}
        embeddings = loaded.model.get_input_embeddings().weight.detach()
        self.values: Values = {"text": embeddings[self.input_ids]}
        self.values |= {kind: self._fixed.pop(name) for kind, name in _MEDIA.items() if name in self._fixed}
        self.baseline = self._baseline(embeddings[: loaded.tokenizer.vocabulary.text].mean(0))
        with torch.no_grad():
            self.at_input, self.at_baseline = (float(self(alone(values))) for values in (self.values, self.baseline))

    def __call__(self, values: Values) -> torch.Tensor:
        """float32[B] of variants, each of `values` with B before its shape."""
        logits, wanted = self.logits(values)
        if self._is_sigmoid:
            return logits.gather(-1, wanted).squeeze(-1).sum(1)
        rest = logits.scatter(-1, wanted, -torch.inf).logsumexp(-1)
        return (logits.gather(-1, wanted).squeeze(-1) - rest).sum(1)

    def log_probabilities(self) -> list[float]:
        """Of each token of the answer, or of the one label."""
        with torch.no_grad():
            logits, wanted = self.logits(alone(self.values))
        normed = torch.nn.functional.logsigmoid(logits) if self._is_sigmoid else logits.log_softmax(-1)
        return normed.gather(-1, wanted).flatten().tolist()

    def logits(self, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        """float32[B, A, vocabulary] and the answer's ids int64[B, A, 1]; for a head float32[B, 1, L] and its label."""
        ids = self.input_ids.expand(len(values["text"]), -1)
        # All media of one variant, then all of the next, as their placeholders stand in rows.
        arguments: dict[str, Any] = {name: one.repeat(len(ids), *[1] * (one.dim() - 1)) for name, one in self._fixed.items()}
        arguments |= {name: values[kind].flatten(0, 1) for kind, name in _MEDIA.items() if kind in values}
        towers: dict[str, Any] = {}
        hidden = self.model.model(
            input_ids=ids, inputs_embeds=values["text"], use_cache=False, tower_states=towers, **arguments
        ).last_hidden_state
        if self.answer.label is None:
            wanted = torch.tensor(self.answer.token_ids, device=ids.device)
            logits = self.model.lm_head(hidden[:, self.num_prompt_tokens - 1 :])
        else:
            wanted = torch.tensor([self.answer.label], device=ids.device)
            lengths, grids = [[ids.shape[1]]] * len(ids), arguments.get("spatial_shapes")
            logits, _, _ = self.model.head(
                hidden=hidden, towers=towers, input_ids=ids, document_lengths=lengths, num_padding=None, grids=grids
            )
            logits = logits["labels"][:, None]
        return logits.float(), wanted.expand(len(ids), -1).unsqueeze(-1)

    def read_at(self) -> dict[str, torch.Tensor]:
        """Which states the answer is read from: of `decoder`, `vision` and `audio` float64[states]; all together sum to one.

        Towers that a head sees side by side count alike.
        """
        if self.answer.label is None:
            row = torch.zeros(len(self.input_ids), dtype=torch.float64)
            row[self.num_prompt_tokens - 1 :] = 1 / len(self.answer.token_ids)
            return {"decoder": row}
        settings = self.model.head.settings
        num_states = {
            "decoder": len(self.input_ids),
            "vision": sum(image.grid[0] * image.grid[1] for image in self.prompt.images),
            "audio": sum(audio.num_tokens for audio in self.prompt.audios),
        }
        names = ("vision", "audio") if settings.states == "towers" else (settings.states,)
        sizes = {name: num_states[name] for name in names if num_states[name]}
        rows = {name: torch.full((size,), 1 / size, dtype=torch.float64) for name, size in sizes.items()}
        if settings.pool == "last":
            rows = {name: torch.eye(size, dtype=torch.float64)[-1] for name, size in sizes.items()}
        return {name: row / len(rows) for name, row in rows.items()}

    @property
    def _is_sigmoid(self) -> bool:
        return self.answer.label is not None and self.model.head.kind.multi_label

    def _baseline(self, mean_embedding: torch.Tensor) -> Values:
        baseline = {kind: value.clone() for kind, value in self.values.items()}
        words = slice(self.text_start, self.text_start + self.num_text_tokens)
        baseline["text"][words] = mean_embedding
        masks = self._fixed.get("pixel_attention_mask")
        for number, picture in enumerate(baseline.get("image", ())):
            if masks is None:
                picture[:] = picture.mean((1, 2), keepdim=True)
            else:
                # Channels stand last in a patch.
                pixels = picture[masks[number].bool()].unflatten(1, (-1, 3))
                picture[masks[number].bool()] = pixels.mean((0, 1)).expand_as(pixels).flatten(1)
        for sound, mask in zip(baseline.get("audio", ()), self._fixed.get("input_features_mask", ()), strict=True):
            # Silence, or the sound's own mean where that has been taken away.
            is_centred = self.model.config.audio_features["normalize"] == "bands"
            sound[:, mask.bool()] = 0.0 if is_centred else sound[:, mask.bool()].min()
        return baseline
