"""The states that a head looks at, document by document.

Legend: D documents, T states of one, W their width, B rows, S tokens of a row, E decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document lies: tokens `start` to `stop` of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class States:
    """States of documents, padded to a common number.

    Attributes:
        values: float[D, T, W], zeros where `mask` is False.
        mask: bool[D, T].
        grids: Rows and columns of the cells of each document's picture, whose states stand in reading order; None where they are no grid.
    """

    values: torch.Tensor
    mask: torch.Tensor
    grids: list[tuple[int, int]] | None = None

    @classmethod
    def of(cls, states: Sequence[torch.Tensor], grids: list[tuple[int, int]] | None = None) -> States:
        """Join float[T, W] of each document."""
        lengths = torch.tensor([len(one) for one in states], device=states[0].device)
        values = pad_sequence(list(states), batch_first=True)
        return cls(values, torch.arange(values.shape[1], device=values.device) < lengths[:, None], grids)

    @classmethod
    def nothing(cls, width: int, like: torch.Tensor) -> States:
        """One state of zeros, for a micro-batch without documents: every rank runs the head in every micro-step."""
        return cls(like.new_zeros(1, 1, width), torch.ones(1, 1, dtype=torch.bool, device=like.device), [(1, 1)])

    def maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float[D, R, C, W] and bool[D, R, C]: the states on their grids, padded to the most rows and columns."""
        assert self.grids is not None, "only a picture's states lie on a grid"
        shape = len(self.grids), max(rows for rows, _ in self.grids), max(columns for _, columns in self.grids)
        values, mask = self.values.new_zeros(*shape, self.values.shape[-1]), self.mask.new_zeros(shape)
        for number, (rows, columns) in enumerate(self.grids):
            values[number, :rows, :columns] = self.values[number, : rows * columns].view(rows, columns, -1)
            mask[number, :rows, :columns] = True
        return values, mask


def places_of(document_lengths: Sequence[Sequence[int]], num_padding: Sequence[int] | None) -> list[Place]:
    """Where the documents of packed rows lie, padding left out."""
    places = []
    for row, lengths in enumerate(document_lengths):
        start = 0
        for length in lengths[:-1] if num_padding is not None and num_padding[row] else lengths:
            places.append(Place(row, start, start + length))
            start += length
    return places


def whole_documents(hidden_BSE: torch.Tensor, places: Sequence[Place]) -> list[torch.Tensor]:
    """The decoder's states of each document."""
    return [hidden_BSE[place.row, place.start : place.stop] for place in places]


def media_tokens(hidden_BSE: torch.Tensor, input_ids_BS: torch.Tensor, places: Sequence[Place], token_id: int) -> list[torch.Tensor]:
    """The decoder's states at the placeholders of each document's picture or sound."""
    return [
        hidden_BSE[place.row, place.start : place.stop][input_ids_BS[place.row, place.start : place.stop] == token_id] for place in places
    ]


def side_by_side(towers: Sequence[Sequence[torch.Tensor]], pool: str) -> list[torch.Tensor]:
    """float[1, W of all together] of each document: what each tower's states become by themselves, one behind the other.

    Args:
        towers: For each tower, or the decoder, float[T, W of it] of each document; T is 0 where it saw nothing of a document, which then
            says zeros.
        pool: `mean`, which is taken and kept in float32, or `last`.
    """

    def pooled(states: torch.Tensor) -> torch.Tensor:
        if not len(states):
            return states.new_zeros(states.shape[1])
        return states[-1] if pool == "last" else states.float().mean(0)

    return [torch.cat([pooled(one) for one in document])[None] for document in zip(*towers, strict=True)]


def pictures_of(
    maps: Sequence[torch.Tensor], input_ids_BS: torch.Tensor, places: Sequence[Place], start_id: int, nothing: torch.Tensor
) -> list[torch.Tensor]:
    """float[T, W] of each document: the cells of all its pictures.

    Args:
        maps: float[rows, columns, W] of each picture.
        input_ids_BS: int64[B, S].
        places: Of the documents.
        start_id: The token that stands before each picture.
        nothing: float[0, W].
    """
    left = iter(maps)
    counts = [int((input_ids_BS[place.row, place.start : place.stop] == start_id).sum()) for place in places]
    return [torch.cat([nothing, *(next(left).flatten(0, 1) for _ in range(count))]) for count in counts]


def sounds_of(states: torch.Tensor, input_ids_BS: torch.Tensor, places: Sequence[Place], token_id: int) -> list[torch.Tensor]:
    """Split the audio tower's float[tokens, W] into the documents' sounds, one each."""
    counts = [int((input_ids_BS[place.row, place.start : place.stop] == token_id).sum()) for place in places]
    return list(states.split(counts))
