"""Decoding as one writes it with public parts: Pillow, soundfile, and transformers' extractors and tokenizer.

The extractors take one sample at a time, which costs them less than a batch does; texts are tokenized a batch at a time, which is what
that library is fastest at. The outputs are those of our own decoder (`check_equal` of `benchmarks.decoding`).
"""

from __future__ import annotations

import io
import json
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import library
from torch.utils.data import default_collate

from benchmarks.corpus import MODEL
from megamm.core.lengths import audio_num_tokens

IGNORE_LABEL = -100


class Batches:
    """Samples of `json`, `jpg` and `flac` to a batch of tensors, texts padded to the longest.

    What it uses is made where it is first called, so that it can be sent to worker processes.
    """

    def __init__(self, tokenizer: Path) -> None:
        self._folder = tokenizer

    def __call__(self, samples: list[dict[str, bytes]]) -> dict[str, torch.Tensor]:
        """Decode, extract, stack, tokenize, pad."""
        # Torch's own collation stacks straight into shared memory; it can, because all sounds are equally long.
        features = default_collate([{**self._picture(sample["jpg"]), **self._sound(sample["flac"])} for sample in samples])
        num_patches, num_frames = (features[name].sum(1).tolist() for name in ("pixel_attention_mask", "input_features_mask"))
        return {**self._texts([json.loads(sample["json"]) for sample in samples], num_patches, num_frames), **features}

    @cached_property
    def _tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder)

    @cached_property
    def _image_processor(self):
        define_torchvision_operators()
        from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

        features = MODEL.image_features
        return Siglip2ImageProcessorPil(patch_size=features.patch_size, max_num_patches=features.max_patches)

    @cached_property
    def _feature_extractor(self):
        from transformers.models.qwen3_asr.feature_extraction_qwen3_asr import Qwen3ASRFeatureExtractor

        features = MODEL.audio_features
        return Qwen3ASRFeatureExtractor(feature_size=features.num_mel, sampling_rate=features.rate_hz)

    def _picture(self, content: bytes) -> dict[str, torch.Tensor]:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        return {name: value[0] for name, value in self._image_processor(picture, return_tensors="pt").items()}

    def _sound(self, content: bytes) -> dict[str, torch.Tensor]:
        wave, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32")
        sound = self._feature_extractor(wave, sampling_rate=rate_hz, padding="longest", return_attention_mask=True, return_tensors="pt")
        return {"input_features": sound["input_features"][0], "input_features_mask": sound["attention_mask"][0]}

    def _texts(self, documents: list[dict[str, Any]], num_patches: list[int], num_frames: list[int]) -> dict[str, torch.Tensor]:
        """The chat's string with one placeholder a media token, as transformers' processors write it; labels are the next token's id."""
        prompts, answers = [], []
        for document, patches, frames in zip(documents, num_patches, num_frames, strict=True):
            user, assistant = (message["content"] for message in document["messages"])
            prompts.append(
                f"<|bos|><|user|><|image_start|>{'<|image|>' * patches}<|image_end|>"
                f"<|audio_start|>{'<|audio|>' * audio_num_tokens(frames)}<|audio_end|>{user[2]['text']}<|end|><|assistant|>"
            )
            answers.append(f"{assistant[0]['text']}<|end|>")
        prompt_ids, answer_ids = (self._tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers))
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]
        shape = len(documents), max(lengths)
        input_ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_LABEL, dtype=np.int64)
        for row, (prompt, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
            input_ids[row, : lengths[row]] = [*prompt, *answer]
            labels[row, len(prompt) - 1 : lengths[row] - 1] = answer
        mask = np.arange(shape[1]) < np.array(lengths)[:, None]
        arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": mask.astype(np.int64)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def define_torchvision_operators() -> None:
    """Let `import torchvision` pass beside a torch without its compiled operators: MosaicML streaming imports it, nothing here uses it."""
    if find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
