"""Weights before training: built partitioned, initialised reproducibly, warm-started slice by slice.

No rank ever holds the whole model. Initial values are a function of the seed and the module's name alone: the same for
every number of ranks and every ZeRO stage, and drawn in float32 before they are rounded to the training precision
(truncated normals drawn in bf16 pile up at their bounds).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from megamm.core.errors import CheckpointError
from megamm.core.files import digest_text
from megamm.engine.distributed import import_deepspeed


def partitioned(construct: Callable[[], nn.Module], ds_config: dict[str, Any], *, seed: int) -> nn.Module:
    """Build a model whose parameters are split over the ranks as soon as each module exists (ZeRO-3), and initialise it.

    Parameters are stored in the training precision; buffers keep the precision that the model gives them (DeepSpeed's
    plain `zero.Init` rounds RoPE frequencies and position tables to bf16). At lower ZeRO stages the model is built whole.

    Args:
        construct: Builds the model without loading weights, the same on every rank.
        ds_config: From `settings.deepspeed_config`.
        seed: Decides the initial weights.
    """
    with _own_random_numbers(), _without_model_initialisation():
        # Decides the parameters that no `_init_weights` covers and that keep what their constructor drew.
        torch.manual_seed(seed)
        if ds_config["zero_optimization"]["stage"] == 3:
            with _zero_init(ds_config):
                model = construct()
        else:
            model = construct()
    initialize_weights(model, seed)
    for param in model.parameters():
        if hasattr(param, "ds_tensor"):
            _zero_padding(param)
    return model


def initialize_weights(model: nn.Module, seed: int) -> None:
    """Run every sub-model's `_init_weights` on its modules, children before parents, each module with its own seed.

    A module without a transformers model above it keeps what its constructor drew. Works on plain and partitioned models.
    """
    reaches: dict[tuple[type, type], bool] = {}
    with _own_random_numbers(), torch.no_grad():
        for name, module, owner in _modules_with_owner(model, "", None):
            if owner is None:
                continue
            own, children = _own_parameters(module), _parameters_of_children(module)
            # Gathering the children as well doubles the traffic, so the first module of a class shows whether it is needed.
            kind = (type(owner), type(module))
            with whole_float32([*own, *children] if reaches.get(kind, True) else own):
                before = [param.clone() for param in children] if kind not in reaches else []
                torch.manual_seed(int(digest_text(f"{seed}/{name}")[:15], 16))
                owner._init_weights(module)
                if children and kind not in reaches:
                    reaches[kind] = not all(map(torch.equal, before, children))


def run_initializers(initializers: Iterable[tuple[str, nn.Parameter, Callable[[torch.Tensor], object]]], seed: int) -> None:
    """Initialise some parameters of a plain or partitioned model anew; a collective.

    Args:
        initializers: Names, parameters, and what writes into the whole float32 parameter with torch's random numbers, which depend on the
            seed and the name alone. The same on all ranks.
        seed: Decides the weights.
    """
    with _own_random_numbers(), torch.no_grad():
        for name, param, write in initializers:
            with whole_float32([param]):
                torch.manual_seed(int(digest_text(f"{seed}/{name}")[:15], 16))
                write(param)


def load_weights(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Warm start: every rank copies its own slice of each tensor into the model. Call it before `initialize`.

    DeepSpeed makes the float32 master weights from these values, so they start rounded to the training precision.

    Args:
        model: From `partitioned`.
        tensors: Names of parameters or buffers and whole tensors, on each rank; memory-mapped ones are read only where used.

    Returns:
        Names that were loaded; of tied parameters the first name.

    Raises:
        CheckpointError: A name or a shape that the model does not have.
    """
    places = _Places(model)
    for name, tensor in tensors:
        flat = tensor.reshape(-1)
        places.fill(name, tuple(tensor.shape), lambda start, stop, flat=flat: flat[start:stop])
    return places.filled


def load_slices(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, int, int], torch.Tensor]) -> set[str]:
    """`load_weights` from where anybody can read any slice: every rank reads its own and nothing else.

    Args:
        model: From `partitioned`.
        shapes: Names of parameters or buffers and whole shapes.
        read: (name, start, stop) -> the elements [start, stop) of the flattened tensor.

    Returns:
        Names that were loaded; of tied parameters the first name.

    Raises:
        CheckpointError: A name or a shape that the model does not have.
    """
    places = _Places(model)
    for name, shape in shapes.items():
        places.fill(name, shape, functools.partial(read, name))
    return places.filled


class _Places:
    """Where weights go, by name; State: the names that were filled, of tied parameters the first one."""

    def __init__(self, model: nn.Module):
        self._places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        self._first_names = {id(param): name for name, param in model.named_parameters()}
        self.filled: set[str] = set()

    @torch.no_grad()
    def fill(self, name: str, shape: tuple[int, ...], read: Callable[[int, int], torch.Tensor]) -> None:
        """Put this rank's elements, which `read` gives, into the place of that name."""
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(
                f"weight {name} is not in the model; its names start like {next(iter(self._places))}: load another folder"
            )
        own = tuple(getattr(place, "ds_shape", place.shape))
        if shape != own:
            raise CheckpointError(f"weight {name} has shape {shape}, the model's is {own}: load another folder")
        if hasattr(place, "ds_tensor"):
            start, stop = partition_bounds(place)
            place.ds_tensor[: stop - start].copy_(read(start, stop))
        else:
            place.copy_(read(0, place.numel()).reshape(shape))
        self.filled.add(self._first_names.get(id(place), name))


def partition_bounds(param: nn.Parameter) -> tuple[int, int]:
    """The elements of the flattened parameter that this rank holds under ZeRO-3, padding left out (start = stop for none)."""
    size = param.ds_tensor.ds_numel  # type: ignore[attr-defined]
    start = min(size * param.ds_zero_partition_rank, param.ds_numel)  # type: ignore[attr-defined]
    return start, min(start + size, param.ds_numel)  # type: ignore[attr-defined]


def _own_random_numbers() -> contextlib.AbstractContextManager[None]:
    """Give the generators back afterwards; only this rank's GPU, because asking the others would open a context on each."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def _zero_padding(param: nn.Parameter) -> None:
    """DeepSpeed leaves the padding of the last partitions as it finds it; what is saved and normed must not depend on it."""
    start, stop = partition_bounds(param)
    with torch.no_grad():
        param.ds_tensor[stop - start :].zero_()  # type: ignore[attr-defined]


def _zero_init(ds_config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    deepspeed = import_deepspeed()
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, is_zero_param

    class RoundedParameters(deepspeed.zero.Init):
        """Constructors run in float32 and on the device; only parameters are rounded, just before they are split."""

        def _post_init_method(self, module: nn.Module) -> None:
            for param in module.parameters(recurse=False):
                if param.is_floating_point() and not is_zero_param(param):
                    param.data = param.data.to(self.dtype)
            super()._post_init_method(module)

    return RoundedParameters(config_dict_or_path=ds_config, tensor_overrides=[DeepSpeedTensorOverride.device])


@contextlib.contextmanager
def _without_model_initialisation() -> Iterator[None]:
    """Inside constructors the children's weights are already split and empty: initialising there is lost or fails."""
    original = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = original  # type: ignore[method-assign]


def _modules_with_owner(
    module: nn.Module, name: str, owner: PreTrainedModel | None
) -> Iterator[tuple[str, nn.Module, PreTrainedModel | None]]:
    """Children before parents; the owner is the nearest transformers model at or above, whose `_init_weights` counts."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for child_name, child in module.named_children():
        yield from _modules_with_owner(child, f"{name}.{child_name}" if name else child_name, owner)
    yield name, module, owner


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _parameters_of_children(module: nn.Module) -> list[nn.Parameter]:
    """What `_init_weights(module)` may write beside its own: attention and pooling blocks initialise their projections."""
    own = set(map(id, _own_parameters(module)))
    children = (param for child in module.children() if not isinstance(child, PreTrainedModel) for param in child.parameters(recurse=False))
    return list({id(param): param for param in children if id(param) not in own}.values())


@contextlib.contextmanager
def whole_float32(params: list[nn.Parameter]) -> Iterator[None]:
    """Make `params` whole and float32 inside, and round and split them again after; rank 0's values count. A collective."""
    split = [param for param in params if hasattr(param, "ds_tensor")]
    if not split:
        yield
        return
    with import_deepspeed().zero.GatheredParameters(split, modifier_rank=0):
        stored = [param.data for param in split]
        for param in split:
            param.data = param.data.float()
        try:
            yield
        finally:
            for param, data in zip(split, stored, strict=True):
                param.data = data.copy_(param.data)
