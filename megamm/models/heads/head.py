"""A head on the composed model: it takes the states that its recipe names, answers, and says what each answer costs.

Legend: B rows, S tokens of a row, N pictures, W width of states, E decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from megamm.config import Head
from megamm.core.errors import ConfigError
from megamm.core.geometry import PictureView
from megamm.models.configuration_megamm import MegaMMConfig
from megamm.models.heads.ctc import CtcHead
from megamm.models.heads.detector import DetectorHead
from megamm.models.heads.linear import LinearHead
from megamm.models.heads.masked import MaskedHead
from megamm.models.heads.segmenter import SegmenterHead
from megamm.models.heads.states import Place, States, media_tokens, pictures_of, places_of, side_by_side, sounds_of, whole_documents
from megamm.models.heads.targets import Targets
from megamm.models.parts import nothing_of

KINDS = {"linear": LinearHead, "detector": DetectorHead, "segmenter": SegmenterHead, "ctc": CtcHead}
_STATES = {
    "linear": ("decoder", "vision", "audio", "towers"),
    "detector": ("decoder", "vision"),
    "segmenter": ("decoder", "vision"),
    "ctc": ("decoder", "audio"),
    "masked": ("vision", "audio", "towers"),
}
_MOST_STAGES = 6
_USES_SCIPY = ("detector", "segmenter")


class BackboneHead(nn.Module):
    """A head and the way to its states.

    Attributes:
        settings: Of the recipe.
        kind: The module that answers.
    """

    def __init__(self, settings: Head, config: MegaMMConfig):
        """Build it for a composed model.

        Raises:
            ConfigError: The head does not go with these states or this model.
        """
        super().__init__()
        check_head(settings, config)
        self.settings, self.config = settings, config
        if settings.kind == "masked":
            self.kind = MaskedHead(tower_widths(settings, config), config)
        else:
            self.width = state_width(settings, config)
            self.kind = KINDS[settings.kind](settings, self.width)

    def forward(
        self,
        *,
        hidden: torch.Tensor,
        towers: dict[str, Any],
        input_ids: torch.Tensor,
        document_lengths: Sequence[Sequence[int]],
        num_padding: Sequence[int] | None,
        grids: torch.Tensor | None,
        targets: Targets | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """Answer every document of a micro-batch; one without documents runs the head on nothing, for the modality contract.

        Args:
            hidden: float[B, S, E], the decoder's last states.
            towers: `vision`: float[rows, columns, W] of each picture; `audio`: float[tokens, W] of all sounds; before the projectors, and
                only of towers that had something to see.
            input_ids: int64[B, S].
            document_lengths: For each row the lengths of its documents.
            num_padding: For each row the tokens of its last document if that is padding, else 0.
            grids: int64[N, 2], rows and columns of each picture's cells before merging; None for fixed-size towers or without pictures.
            targets: What the documents' answers are.

        Returns:
            Logits of the kind, meaningless without documents; and where there are targets, the scalar sum of weight times loss over the
            documents and float32[B, S], each document's loss at its last token.
        """
        places = places_of(document_lengths, num_padding)
        # Decoder and towers may compute in another type than the head's.
        dtype = next(self.kind.parameters()).dtype
        if isinstance(self.kind, MaskedHead):
            logits = self.kind(states=_all_cells(self.kind.widths, towers, hidden, dtype))
        else:
            seen = _Seen(hidden, towers, input_ids, grids, places)
            states = self._states_of(seen) if places else States.nothing(self.width, hidden)
            logits = self.kind(states=States(states.values.to(dtype), states.mask, states.grids))
        if targets is None:
            return logits, None, None
        token_losses = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
        if not places:
            return logits, sum(nothing_of(one, token_losses) for one in logits.values() if one.is_floating_point()), token_losses
        losses = self.kind.loss(logits, targets)
        token_losses[[place.row for place in places], [place.stop - 1 for place in places]] = losses.detach()
        return logits, losses @ targets.weights, token_losses

    def decode(self, logits: dict[str, torch.Tensor], views: Sequence[PictureView | None]) -> list[Any]:
        """Typed predictions in source coordinates, one a document.

        Args:
            logits: From `forward`.
            views: What the model saw of each document's picture; None where it saw none.

        Returns:
            `linear`: every label with its score; `detector`: boxes; `segmenter`: instances; `ctc`: the text.

        Raises:
            ConfigError: The head answers nothing.
        """
        if isinstance(self.kind, MaskedHead):
            raise ConfigError("a masked head fills in what is hidden and answers nothing; train another head, or tokens, from its run")
        return self.kind.decode(logits, views)

    def _states_of(self, seen: _Seen) -> States:
        if self.settings.kind == "linear":
            # Pooled before documents are joined: beside one long document, padding of many short ones is most of a row.
            return States.of(side_by_side(self._pooled(seen), self.settings.pool))
        if self.settings.states == "vision":
            maps = _one_each(seen.towers.get("vision", []), seen.places, "picture")
            return States.of([one.flatten(0, 1) for one in maps], [tuple(one.shape[:2]) for one in maps])
        if self.settings.states == "audio":
            return States.of(_some(self._sounds(seen), "sound"))
        if self.settings.kind == "ctc":
            return States.of(_some(media_tokens(seen.hidden, seen.input_ids, seen.places, self.config.audio_token_id), "sound"))
        pictures = _some(media_tokens(seen.hidden, seen.input_ids, seen.places, self.config.image_token_id), "picture")
        return States.of(pictures, _one_each(self._merged_grids(seen.grids, len(pictures)), seen.places, "picture"))

    def _pooled(self, seen: _Seen) -> list[list[torch.Tensor]]:
        """float[T, W] of each document, for each tower that becomes one state by itself."""
        of = self.settings.states
        if of == "decoder":
            return [whole_documents(seen.hidden, seen.places)]
        if of == "vision":
            return [[one.flatten(0, 1) for one in _one_each(seen.towers.get("vision", []), seen.places, "picture")]]
        if of == "audio":
            return [_some(self._sounds(seen), "sound")]
        towers = {"vision": self._pictures, "audio": self._sounds}
        return [towers[name](seen) for name in tower_widths(self.settings, self.config)]

    def _pictures(self, seen: _Seen) -> list[torch.Tensor]:
        """float[T, W] of each document: the vision tower's states of all its pictures."""
        nothing = seen.hidden.new_zeros(0, self.config.vision_hidden_size)
        return pictures_of(seen.towers.get("vision", []), seen.input_ids, seen.places, self.config.image_start_token_id, nothing)

    def _sounds(self, seen: _Seen) -> list[torch.Tensor]:
        """float[T, W] of each document: the audio tower's states of all its sounds."""
        nothing = seen.hidden.new_zeros(0, self.config.audio_config.d_model)
        return sounds_of(seen.towers.get("audio", nothing), seen.input_ids, seen.places, self.config.audio_token_id)

    def _merged_grids(self, grids: torch.Tensor | None, num_pictures: int) -> list[tuple[int, int]]:
        features = self.config.image_features
        if grids is None or not self.config.is_patch_tower:
            cells = features["size"] // features["stride"] // features["merge"]
            return [(cells, cells)] * num_pictures
        return [(rows // features["merge"], columns // features["merge"]) for rows, columns in grids.tolist()]


class _Seen(NamedTuple):
    """What the model saw of a micro-batch, as `BackboneHead.forward` takes it, and where its documents lie."""

    hidden: torch.Tensor
    towers: dict[str, Any]
    input_ids: torch.Tensor
    grids: torch.Tensor | None
    places: list[Place]


def _all_cells(widths: Mapping[str, int], towers: dict[str, Any], hidden: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """float[P, W] of each tower, the states of all pictures or sounds; one state of zeros of a tower that saw nothing."""
    found = {name: hidden.new_zeros(1, width, dtype=dtype) for name, width in widths.items()}
    if "vision" in found and "vision" in towers:
        found["vision"] = torch.cat([one.flatten(0, 1) for one in towers["vision"]]).to(dtype)
    if "audio" in found and "audio" in towers:
        found["audio"] = towers["audio"].to(dtype)
    return found


def check_head(settings: Head, config: MegaMMConfig) -> None:
    """Refuse a head that cannot work on this model.

    Raises:
        ConfigError: States that the model lacks or that the kind cannot use, labels twice, characters that are none, sizes that do
            not divide, labels that an answer could not be read back to, or scipy is not installed.
    """
    kind, states = settings.kind, settings.states
    if states not in _STATES[kind]:
        raise ConfigError(f'model.head.states="{states}" is nothing for a {kind} head; use one of {", ".join(_STATES[kind])}')
    if states == "towers" and config.vision_config is None and config.audio_config is None:
        raise ConfigError(f"a {kind} head on tower states needs model.vision or model.audio; add a tower")
    wanted = {"vision": "vision", "audio": "audio", "towers": None, "decoder": {"linear": None, "ctc": "audio"}.get(kind, "vision")}[states]
    if wanted is not None and getattr(config, f"{wanted}_config") is None:
        raise ConfigError(f"a {kind} head on {states} states needs model.{wanted}; add the tower")
    if twice := sorted({label for label in settings.labels if settings.labels.count(label) > 1}):
        raise ConfigError(f"model.head.labels holds {twice[0]!r} twice; name each label once")
    if kind == "linear":
        _check_written(settings)
    if kind == "ctc" and (long := [label for label in settings.labels if len(label) != 1]):
        raise ConfigError(f"model.head.labels holds {long[0]!r}; the labels of a ctc head are single characters")
    num_heads = settings.num_heads if settings.queries == "learned" else 1
    if kind == "detector" and (settings.hidden_size % num_heads or settings.hidden_size % 4):
        raise ConfigError(
            f"model.head.hidden_size={settings.hidden_size} is not a multiple of 4 and of model.head.num_heads={num_heads}; "
            f"set it to {4 * num_heads * max(1, settings.hidden_size // (4 * num_heads))}"
        )
    if kind == "segmenter" and settings.num_layers > _MOST_STAGES:
        raise ConfigError(
            f"model.head.num_layers={settings.num_layers} makes {2**settings.num_layers} pixels of a cell's side; set {_MOST_STAGES}"
        )
    if kind in _USES_SCIPY and find_spec("scipy") is None:
        raise ConfigError(f"a {kind} head needs scipy; pip install 'megamm[heads]'")


def _check_written(settings: Head) -> None:
    """Answers are kept and judged as text without blanks around it; several labels stand between commas."""
    for label in settings.labels:
        if label != label.strip():
            raise ConfigError(f"model.head.labels holds {label!r} with blanks at its ends, which no answer keeps; write {label.strip()!r}")
        if settings.multi_label and "," in label:
            raise ConfigError(
                f"model.head.labels holds {label!r}; with multi_label commas stand between labels, write {label.replace(',', ';')!r}"
            )


def state_width(settings: Head, config: MegaMMConfig) -> int:
    """Width of the states that a head looks at; towers' states stand side by side."""
    return config.text_config.hidden_size if settings.states == "decoder" else sum(tower_widths(settings, config).values())


def tower_widths(settings: Head, config: MegaMMConfig) -> dict[str, int]:
    """Width of the states of each tower that a head looks at, in a fixed order."""
    widths = {}
    if config.vision_config is not None and settings.states in ("vision", "towers"):
        widths["vision"] = config.vision_hidden_size
    if config.audio_config is not None and settings.states in ("audio", "towers"):
        widths["audio"] = config.audio_config.d_model
    return widths


def _one_each(of: list[Any], places: list[Place], what: str) -> list[Any]:
    if len(of) != len(places):
        raise ValueError(f"{len(of)} {what}s for {len(places)} documents; a head that looks at {what}s takes one a document")
    return of


def _some(states: list[torch.Tensor], what: str) -> list[torch.Tensor]:
    if any(not len(one) for one in states):
        raise ValueError(f"a document without a {what}; this head takes one a document")
    return states
