"""Where a detector looks: queries that learn what to ask for, or one query for each cell of the picture.

Legend: D documents, T states of one, Q queries, H width inside, R, C rows and columns of cells.

Source: Carion et al. 2020, DETR, with fixed places to begin at as in Wang et al. 2022, Anchor DETR; a query a cell as in Sun et al. 2021,
OneNet (what is matched one to one needs no learned queries).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from megamm.config import Head
from megamm.models.heads.states import States


class LearnedQueries(nn.Module):
    """As many queries as the recipe says, spread over the view; they attend to each other and to the picture's states."""

    def __init__(self, settings: Head):
        super().__init__()
        size = settings.hidden_size
        self.num_queries = settings.num_queries
        self.queries, self.norm = nn.Embedding(settings.num_queries, size), nn.LayerNorm(size)
        self.layers = nn.ModuleList(_QueryLayer(size, settings.num_heads) for _ in range(settings.num_layers))

    def forward(self, pictures: torch.Tensor, states: States) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the queries found.

        Args:
            pictures: float[D, T, H], the states in the width inside.
            states: Where they lie.

        Returns:
            float[D, Q, H]; float32[Q, 4] or float32[D, Q, 4], the box that each query begins at; bool[D, Q], False for queries that pad.
        """
        size = pictures.shape[-1]
        keys = pictures + position_code(cell_middles(states), size).to(pictures.dtype)
        begin = anchors(self.num_queries, pictures.device)
        queries = self.norm(self.queries(torch.arange(self.num_queries, device=pictures.device)))
        hidden = (queries + position_code(begin[:, :2], size).to(pictures.dtype)).expand(len(pictures), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, keys, pictures, states.mask)
        return hidden, begin, begin.new_ones(hidden.shape[:2], dtype=torch.bool)


class CellQueries(nn.Module):
    """Every cell of the picture asks for the box whose middle it is, and looks at its neighbours alone.

    What lies where need not be found first, so this learns from few pictures; the backbone has looked at the whole of them, and attention
    between the cells took time without gain where it was tried.
    """

    def __init__(self, settings: Head):
        super().__init__()
        self.layers = nn.ModuleList(_CellLayer(settings.hidden_size) for _ in range(settings.num_layers))

    def forward(self, pictures: torch.Tensor, states: States) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the cells found; see `LearnedQueries.forward`."""
        middles = cell_middles(states)
        hidden = pictures + position_code(middles, pictures.shape[-1]).to(pictures.dtype)
        for layer in self.layers:
            hidden = layer(hidden, states)
        begin = torch.cat([middles, cell_sizes(states)], dim=-1)
        # What pads lies beside the view, where a box has no logarithm.
        return hidden, torch.where(states.mask[..., None], begin, 0.5), states.mask


class _QueryLayer(nn.Module):
    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.own_norm, self.own = nn.LayerNorm(size), _Attention(size, num_heads)
        self.cross_norm, self.cross = nn.LayerNorm(size), _Attention(size, num_heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(size), _mlp(size)

    def forward(self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        own = self.own_norm(hidden)
        hidden = hidden + self.own(own, own, own)
        hidden = hidden + self.cross(self.cross_norm(hidden), keys, values, mask[:, None, None])
        return hidden + self.mlp(self.mlp_norm(hidden))


class _CellLayer(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.near_norm, self.near = nn.LayerNorm(size), nn.Conv2d(size, size, 3, padding=1, groups=size)
        self.mlp_norm, self.mlp = nn.LayerNorm(size), _mlp(size)

    def forward(self, hidden: torch.Tensor, states: States) -> torch.Tensor:
        maps, mask = States(self.near_norm(hidden), states.mask, states.grids).maps()
        near = F.gelu(self.near(maps.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        hidden = hidden + States.of([one[is_cell] for one, is_cell in zip(near, mask, strict=True)]).values
        return hidden + self.mlp(self.mlp_norm(hidden))


class _Attention(nn.Module):
    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        projected = (layer(one) for layer, one in ((self.query, queries), (self.key, keys), (self.value, values)))
        q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in projected)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def _mlp(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))


def position_code(points: torch.Tensor, size: int) -> torch.Tensor:
    """float32[..., size]: sines and cosines of points float[..., 2] in shares, from a quarter of a wave over the view to eight.

    Shorter waves would be noise on the few cells of a picture, and slowed learning down where it was tried.
    """
    frequencies = 2 * math.pi * torch.logspace(-2, 3, size // 4, base=2, device=points.device)
    angles = (points.float()[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def anchors(num: int, device: torch.device) -> torch.Tensor:
    """float32[num, 4]: boxes spread evenly over the view, as centre and size."""
    side = math.ceil(math.sqrt(num))
    number = torch.arange(num, device=device)
    rows = math.ceil(num / side)
    size = torch.full((num,), 1 / (side + 1), device=device)
    return torch.stack([(number % side + 0.5) / side, (number // side + 0.5) / rows, size, size], dim=-1)


def cell_middles(states: States) -> torch.Tensor:
    """float32[D, T, 2]: x and y of each state's cell in shares of the view."""
    assert states.grids is not None, "only a picture's states lie on a grid"
    number = torch.arange(states.values.shape[1], device=states.values.device)
    middles = [
        torch.stack([(number % columns + 0.5) / columns, (number // columns + 0.5) / rows], dim=-1) for rows, columns in states.grids
    ]
    return torch.stack(middles)


def cell_sizes(states: States) -> torch.Tensor:
    """float32[D, T, 2]: width and height of two cells in shares of the view, half of the view at most."""
    assert states.grids is not None, "only a picture's states lie on a grid"
    sizes = [[min(2 / columns, 0.5), min(2 / rows, 0.5)] for rows, columns in states.grids]
    return torch.tensor(sizes, device=states.values.device)[:, None].expand(-1, states.values.shape[1], -1)
