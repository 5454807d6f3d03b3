"""Which ranks of its changes a layer needs: AdaLoRA's importance, budget and penalty, over parameters that ranks hold in slices.

After every update each element of the adapter has a sensitivity |weight x gradient| and an uncertainty, how much that moves about, as
moving averages. Their products make the score of a triplet (a left vector, a number, a right vector); triplets beyond the budget get
the number zero. They may grow again until the ranks are final, `final_steps` before the end; from then on they stay zero.

Everything by element needs this rank's slices alone, and scores one sum over all ranks. peft's arithmetic, but that averages are
float32 masters' and clipping does not touch the gradient that they see.

Source: AdaLoRA (arXiv:2303.10512, equations 4, 8 to 10 and 12).
"""

from __future__ import annotations

from typing import Any

import torch

from megamm.config import Adapter
from megamm.core.errors import CheckpointError, ConfigError
from megamm.engine import distributed, followed
from megamm.engine.runtime import Engine
from megamm.models.adapters import triplet_layers

_KINDS = ("lora_A", "lora_E", "lora_B")


def check_budget(adapter: Adapter, num_steps: int) -> None:
    """Refuse a budget that a run of `num_steps` cannot follow; says nothing of adapters whose ranks stay.

    Raises:
        ConfigError: Ranks would have to grow, or have no steps to fall in.
    """
    budget = adapter.budget
    if adapter.method != "adalora":
        return
    if budget.initial_rank < adapter.rank:
        raise ConfigError(
            f"adapter.budget.initial_rank={budget.initial_rank} is less than adapter.rank={adapter.rank}, which ranks fall to; raise it"
        )
    if budget.warmup_steps >= num_steps - budget.final_steps:
        raise ConfigError(
            f"adapter.budget.warmup_steps={budget.warmup_steps} and final_steps={budget.final_steps} leave none of train.steps={num_steps} "
            "for ranks to fall in; lower them"
        )


class RankAllocator:
    """Takes ranks from the layers of an adapter while it trains; every rank calls every method.

    State: averages in the engine, which its checkpoints hold; the number of updates so far and, once they are final, which triplets
    are kept, in `to_json`. Both together go on bit for bit; averages are cut anew for any number of ranks.

    Args:
        engine: Of a model with `TripletLinear` layers, before anything is loaded into it.
        adapter: The recipe's.
        num_steps: Of the whole run.
    """

    def __init__(self, engine: Engine, adapter: Adapter, num_steps: int):
        self._engine = engine
        self._budget = adapter.budget
        self._layers = dict(triplet_layers(engine.module))
        self._names = [f"{layer}.{kind}" for layer in self._layers for kind in _KINDS]
        self._first_total = adapter.budget.initial_rank * len(self._layers)
        self._last_total = adapter.rank * len(self._layers)
        self._final_step = num_steps - adapter.budget.final_steps
        self._gradients: dict[str, torch.Tensor] = {}
        self.restore(None)
        followed.follow(engine, self._names)

    @property
    def mean_rank(self) -> float:
        """Ranks that layers had on average after they were last shared out."""
        return self._num_kept / len(self._layers)

    def before_update(self) -> None:
        """After the last backward of a step: the penalty joins its gradient, which `after_update` then looks at."""
        if self._budget.orthogonality:
            names = [name for name in self._names if not name.endswith("lora_E")]
            with followed.whole(self._engine, names) as weights, torch.no_grad():
                scale = self._budget.orthogonality / len(names)
                penalties = {name: scale * orthogonality_gradient(weights[name].float(), by_row="lora_A" in name) for name in names}
            followed.add_to_gradients(self._engine, penalties)
        if self._kept is None:
            self._gradients = followed.gradients(self._engine, self._names)

    def after_update(self, *, applied: bool) -> None:
        """After the step's update: follow importance and share ranks out when it is time.

        Args:
            applied: Whether the weights changed; a gradient that is not finite says nothing.
        """
        self._step += 1
        if self._kept is not None:
            followed.set_to_zero(self._engine, self._cleared(self._kept))
        elif self._step >= self._final_step:
            self._kept = self._share_out()
            for average in self._engine.averages.values():
                average.zero_()
        else:
            if applied:
                self._average()
            if self._step > self._budget.warmup_steps and self._step % self._budget.every == 0:
                self._share_out()
        self._gradients = {}

    def to_json(self) -> dict[str, Any]:
        """The state that is not the engine's, as plain JSON values; a layer's triplets are a string of `1` (kept) and `0`."""
        kept = self._kept
        final = None if kept is None else {name: "".join("01"[bit] for bit in one.tolist()) for name, one in kept.items()}
        return {"step": self._step, "num_kept": self._num_kept, "kept": final}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on from what `to_json` gave; None begins anew.

        Raises:
            CheckpointError: That is something else, or of another adapter.
        """
        values = saved or {"step": 0, "num_kept": self._first_total, "kept": None}
        try:
            self._step, self._num_kept = int(values["step"]), int(values["num_kept"])
            final = values["kept"]
            kept = None if final is None else {name: torch.tensor([bit == "1" for bit in final[name]]) for name in self._layers}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the record of AdaLoRA's ranks cannot be read ({error!r}); resume from another checkpoint") from None
        self._kept = kept

    def _average(self) -> None:
        """Follow every element that this rank holds: its sensitivity, then how far that is from its average."""
        weights, averages = followed.masters(self._engine, self._names), self._engine.averages
        for name, gradient in self._gradients.items():
            sensitivity, uncertainty = averages[f"sensitivity/{name}"], averages[f"uncertainty/{name}"]
            now = (weights[name] * gradient).abs()
            sensitivity.lerp_(now, 1 - self._budget.sensitivity_decay)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - self._budget.uncertainty_decay)

    def _share_out(self) -> dict[str, torch.Tensor]:
        """Make the numbers of the triplets beyond the budget zero; bool[R] of each layer, whether a triplet is kept."""
        scores = self._scores()
        num_cut = self._first_total - self._total_now()
        # As peft: those that tie with the last one to go are cut as well, so that what never mattered does not stay by accident.
        bound = torch.cat(list(scores.values())).kthvalue(num_cut).values if num_cut else torch.tensor(-1.0)
        kept = {name: one > bound for name, one in scores.items()}
        self._num_kept = int(sum(int(one.sum()) for one in kept.values()))
        followed.set_to_zero(self._engine, self._cleared(kept))
        return kept

    def _total_now(self) -> int:
        """Triplets of all layers that may stay: falls with the third power of what is left of the steps in which it falls."""
        first, last = self._budget.warmup_steps, self._final_step
        left = max(0.0, 1 - (self._step - first) / (last - first))
        return int((self._first_total - self._last_total) * left**3 + self._last_total)

    def _scores(self) -> dict[str, torch.Tensor]:
        """float64[R] of each layer: the number's own importance and the means of the two vectors', over all ranks."""
        bounds, averages = followed.bounds(self._engine, self._names), self._engine.averages
        own, rank = {}, self._budget.initial_rank
        for layer, module in self._layers.items():
            score = torch.zeros(rank, dtype=torch.float64, device=averages[f"sensitivity/{layer}.lora_E"].device)
            # How many elements one triplet has of a factor, and how far apart in the flattened parameter it begins anew.
            for kind, length in (("lora_A", module.in_features), ("lora_E", 1), ("lora_B", module.out_features)):
                name = f"{layer}.{kind}"
                element = torch.arange(*bounds[name], device=score.device)
                triplet = element % rank if kind == "lora_B" else element // length
                product = averages[f"sensitivity/{name}"].double() * averages[f"uncertainty/{name}"].double()
                score.index_add_(0, triplet, product / length)
            own[layer] = score
        total = torch.tensor(distributed.all_reduce_sum(torch.cat(list(own.values())).tolist()), dtype=torch.float64)
        return dict(zip(own, total.split([len(one) for one in own.values()]), strict=True))

    def _cleared(self, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{name}.lora_E": ~one for name, one in kept.items()}


def orthogonality_gradient(weight: torch.Tensor, *, by_row: bool) -> torch.Tensor:
    """Gradient of ||M Mᵀ - 1||, the Frobenius norm, at a weight whose rows, or columns, are M's; zeros where the norm is zero.

    Args:
        weight: float32[R, I] or float32[O, R].
        by_row: Whether the R vectors are rows.
    """
    rows = weight if by_row else weight.T
    excess = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    norm = excess.norm()
    gradient = 2 * excess @ rows / norm if norm else torch.zeros_like(rows)
    return gradient if by_row else gradient.T
