"""Initial weights of towers, where those of their own classes would let little of a picture or a sound through.

Stock classes are written to be loaded. From their own initial values a decoder learns for hundreds of steps what answers are frequent, and
nothing of what it is shown: three convolutions of the audio tower leave nothing that differs between sounds beside what marks the place,
and attention over patches that are nearly alike leaves little between pictures and less between places: see the test of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from megamm.models.modeling_megamm import MegaMMForConditionalGeneration

_BRANCH_SCALE = 0.1
"""Of what the class would draw."""
_POSITION_STD = 0.3
"""About that of embedded patches, whatever the width."""


def initializers(model: MegaMMForConditionalGeneration) -> Iterator[tuple[str, nn.Parameter, Callable[[torch.Tensor], object]]]:
    """What is initialised otherwise than its class would: names, parameters, and what writes into the whole float32 parameter.

    In a `qwen3_asr_encoder` convolutions keep the variance (He et al. 2015), and what they lead to keeps it as well. In a SigLIP tower, of
    the first kind or the second, layers add little to what they are given (De and Smith 2020), and positions show beside the patches.
    Everything else stays, towers of other classes included.
    """
    towers = {"vision": ("siglip_vision_model", "siglip2_vision_model"), "audio": ("qwen3_asr_encoder",)}
    known = tuple(
        f"model.{name}_tower."
        for name, types in towers.items()
        if getattr(getattr(model.config, f"{name}_config"), "model_type", "") in types
    )
    for name, parameter in model.named_parameters():
        if not name.startswith(known):
            continue
        if name.startswith("model.audio_tower.conv2d") and name.endswith(".weight"):
            yield name, parameter, lambda whole: nn.init.kaiming_normal_(whole, nonlinearity="relu")
        elif name == "model.audio_tower.conv_out.weight":
            yield name, parameter, lambda whole: nn.init.normal_(whole, std=1 / math.sqrt(whole.shape[1]))
        elif name.startswith("model.vision_tower.encoder.") and name.endswith((".self_attn.out_proj.weight", ".mlp.fc2.weight")):
            yield name, parameter, lambda whole: nn.init.xavier_uniform_(whole, gain=_BRANCH_SCALE)
        elif name == "model.vision_tower.embeddings.position_embedding.weight":
            yield name, parameter, lambda whole: nn.init.normal_(whole, std=_POSITION_STD)
