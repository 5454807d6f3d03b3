"""The proof that an exported folder is the trained model: the same questions, put to both.

One side is the model as the training checkpoint gives it, the other a fresh process that can import transformers and not
megamm. Compared are the logits and the first tokens of a greedy answer on equal inputs, and what the exported processor makes
of raw text, pictures and sounds, as features and as logits in float32.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megamm.core.errors import ExportError
from megamm.core.files import write_json
from megamm.core.types import Message
from megamm.export.probes import Probe, make_probes
from megamm.inference.generate import Sampling, generate
from megamm.inference.load import Loaded
from megamm.inference.prompt import left_padded, make_prompt

REPORT = "parity.json"
MAX_FEATURE_DIFFERENCE = 1e-4
"""Between our log-mel or pixels and the exported processor's: two implementations of one float32 formula."""
MAX_RAW_SHARE = 1e-3
"""Share of the largest logit by which float32 logits from raw media may differ: ten times what features may."""

_SCRIPT = Path(__file__).with_name("fresh_process.py")
SMALLEST_SCALE = 0.125
"""Least value that stands for the largest logit in a tolerance.

A logit sums products of the last hidden state, normed to about 1, and weights of about 0.02: over 40 and more channels their
root of the sum of squares is at least 0.02 * sqrt(40) = 0.126. Rounding follows these addends, also where they cancel and leave
smaller logits.
"""

_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}
_WHY = (
    "a tolerance is a share of the largest logit: both sides run the same operations on the same weights, so only the order of sums "
    "inside kernels may differ; float32 then differs by up to 1e-5 over dozens of layers, float16 by up to 4 units in the last place and "
    "bfloat16 by two (2^-6): one unit more or less in every twentieth output of a layer moves the logits that far"
)
_FEATURES = ("pixel_values", "input_features")


@dataclass(frozen=True)
class Expected:
    """What the trained model does with a probe.

    Attributes:
        probe: The question.
        inputs: Arguments of the model's forward, a batch of one.
        logits: float32[T, V].
        answer: First N token ids of the greedy answer.
        answer_logits: float32[N, V], from which each of them was chosen.
    """

    probe: Probe
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    answer: tuple[int, ...]
    answer_logits: torch.Tensor


def expected(loaded: Loaded) -> list[Expected]:
    """Put the probes to the trained model."""
    results = []
    for probe in make_probes(loaded.config):
        prompt = make_prompt(loaded, [probe.message], probe.media)
        inputs = left_padded([prompt], loaded.config.pad_token_id, loaded.device)
        (answer,) = generate(loaded, [prompt], Sampling(max_new_tokens=8))
        tokens = inputs["input_ids"].new_tensor([answer.token_ids])
        extended = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        whole = inputs | {name: torch.cat([inputs[name], value], dim=1) for name, value in extended.items()}
        chosen_from = logits_of(loaded.model, whole)[len(inputs["input_ids"][0]) - 1 : -1]
        results.append(Expected(probe, inputs, logits_of(loaded.model, inputs), answer.token_ids, chosen_from))
    return results


@torch.no_grad()
def logits_of(forward: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    """float32[T, V] of one prompt; `forward` is a model or the training engine."""
    return forward(**inputs).logits[0].float().cpu()


def tolerance_of(logits: torch.Tensor, dtype: torch.dtype) -> float:
    """How far logits of equal weights and inputs may be from `logits` where only the order of sums inside kernels differs.

    Args:
        logits: The reference, any shape.
        dtype: Type of the weights: float32, float16 or bfloat16.
    """
    return _TOLERANCES[dtype] * max(SMALLEST_SCALE, float(logits.abs().max()))


def compare(folder: Path, references: Sequence[Expected]) -> dict[str, Any]:
    """Put the probes to a fresh process on `folder` and measure the differences.

    Returns:
        The parity report: versions, a row a probe, and for the whole `holds` and the worst probe's `max_abs_difference` (None
        where shapes differ or a logit is not finite) with its `tolerance`.

    Raises:
        ExportError: The fresh process fails.
    """
    results, facts = fresh_results(folder, references)
    rows = [row_of(reference, results, getattr(torch, facts["dtype"])) for reference in references]
    worst = worst_of(rows)
    return {
        "holds": all(row["holds"] for row in rows),
        "max_abs_difference": worst["max_logit_difference"],
        "tolerance": worst["tolerance"],
        "dtype": facts["dtype"],
        "versions": {"python": sys.version.split()[0], "torch": facts["torch"], "transformers": facts["transformers"]},
        "why": _WHY,
        "probes": rows,
    }


def prove(folder: Path, references: Sequence[Expected], facts: dict[str, Any]) -> dict[str, Any]:
    """Write `parity.json` into `folder` and insist that it holds.

    Args:
        folder: The exported folder.
        references: From `expected`, with weights of the exported type.
        facts: Further entries of the report.

    Raises:
        ExportError: The exported folder answers differently.
    """
    report = compare(folder, references) | facts
    write_json(folder / REPORT, report)
    for row in report["probes"]:
        if not row["holds"]:
            raise ExportError(
                f"the exported folder differs from the trained model on probe {row['probe']!r}: largest logit difference "
                f"{row['max_logit_difference']} (tolerance {row['tolerance']}), from raw media, in float32, "
                f"{row['max_logit_difference_from_raw_media']} (tolerance {row['raw_media_tolerance']}), "
                f"equal prompt tokens {row['equal_prompt_tokens']}, answer agrees {row['answer_agrees']}, "
                f"largest feature differences {row['max_feature_differences']} (tolerance {MAX_FEATURE_DIFFERENCE}); "
                f"compare transformers {report['versions']['transformers']} with the version in the run's environment.json"
            )
    return report


def rounding(loaded: Loaded, references: Sequence[Expected]) -> dict[str, Any]:
    """How far the references, in the exported type, are from the same checkpoint in `loaded`'s wider type.

    Returns:
        A table a probe: `max_logit_difference` and `equal_argmax_share` of the positions.
    """
    table = {}
    for one in references:
        wide = logits_of(loaded.model, one.inputs)
        equal = (wide.argmax(-1) == one.logits.argmax(-1)).float().mean()
        table[one.probe.name] = {"max_logit_difference": _max_difference(wide, one.logits), "equal_argmax_share": float(equal)}
    return table


def fresh_results(folder: Path, references: Sequence[Expected]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Run `fresh_process.py` on the probes: its tensors by `PROBE/name`, and its versions.

    Raises:
        ExportError: It fails; the message ends with the last line of its standard error.
    """
    with tempfile.TemporaryDirectory(prefix="megamm-parity-") as name:
        scratch = Path(name)
        save_file(
            _tensors(references), scratch / "probes.safetensors", metadata={"probes": json.dumps([_chat(one.probe) for one in references])}
        )
        # Its own cache of modelling code: code of an earlier export must not run in place of this one's.
        own = {"HF_HOME": str(scratch / "hub"), "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
        # As many threads as here, because they decide the order of sums.
        environment = os.environ | own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        # As text, because a script's own folder would come first on its path.
        command = [
            sys.executable,
            "-c",
            _SCRIPT.read_text(encoding="utf-8"),
            str(folder.resolve()),
            "probes.safetensors",
            "results.safetensors",
        ]
        run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        if run.returncode:
            last = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
            raise ExportError(f"a fresh process cannot use {folder}: {last[0]}")
        with safe_open(scratch / "results.safetensors", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def row_of(reference: Expected, results: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Compare one probe's results.

    It holds when the logits on equal inputs are within the tolerance of their type, those from raw media within a tolerance in
    float32, prompt tokens and features agree, and so does the greedy answer, up to a token that the tolerance leaves open.

    Args:
        reference: What the trained model does.
        results: From `fresh_results`.
        dtype: Type of the exported weights, which sets the tolerance.
    """
    own = {
        key.removeprefix(f"{reference.probe.name}/"): value for key, value in results.items() if key.startswith(f"{reference.probe.name}/")
    }
    largest = float(reference.logits.abs().max())
    tolerance = tolerance_of(reference.logits, dtype)
    difference = _max_difference(own["logits"][0], reference.logits)
    wide = own["float32_logits"][0]
    from_raw = _max_difference(own["processed_logits"][0], wide)
    raw_tolerance = MAX_RAW_SHARE * max(SMALLEST_SCALE, float(wide.abs().max()))
    features = [_feature_difference(own[f"processed/{key}"], reference.inputs[key]) for key in _FEATURES if key in reference.inputs]
    equal_prompt = torch.equal(own["processed/input_ids"], reference.inputs["input_ids"].cpu())
    answer = own["answer"][0].tolist()[: len(reference.answer)]
    same_answer = _answers_agree(reference, answer, tolerance)
    within = all(found is not None and found <= most for found, most in ((difference, tolerance), (from_raw, raw_tolerance)))
    same_features = all(feature is not None and feature <= MAX_FEATURE_DIFFERENCE for feature in features)
    return {
        "probe": reference.probe.name,
        "num_tokens": len(reference.logits),
        "max_logit": largest if math.isfinite(largest) else None,
        "max_logit_difference": difference,
        "tolerance": tolerance if math.isfinite(tolerance) else None,
        "equal_prompt_tokens": equal_prompt,
        "max_feature_differences": features,
        "max_logit_difference_from_raw_media": from_raw,
        "raw_media_tolerance": raw_tolerance if math.isfinite(raw_tolerance) else None,
        "equal_answer": tuple(answer) == reference.answer,
        "answer_agrees": same_answer,
        "holds": within and equal_prompt and same_features and same_answer,
    }


def _answers_agree(reference: Expected, answer: Sequence[int], tolerance: float) -> bool:
    """Whether an answer is the reference's, or leaves it at a token whose logit could as well have been the largest.

    Each of two logits may be off by the tolerance, so a lead of less than twice that decides nothing; what follows such a token
    is another answer's, and is not compared.
    """
    if len(answer) < len(reference.answer):
        return False
    for ours, theirs, logits in zip(reference.answer, answer, reference.answer_logits, strict=False):
        if ours != theirs:
            return float(logits[ours] - logits[theirs]) <= 2 * tolerance
    return True


def worst_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row whose logits on equal inputs differ most in shares of their tolerance; one without a number is worst."""

    def share(row: dict[str, Any]) -> float:
        difference, tolerance = row["max_logit_difference"], row["tolerance"]
        return math.inf if difference is None or tolerance is None else difference / tolerance

    return max(rows, key=share)


def _tensors(references: Sequence[Expected]) -> dict[str, torch.Tensor]:
    tensors = {}
    for one in references:
        tensors |= {f"{one.probe.name}/input/{name}": value.cpu().contiguous() for name, value in one.inputs.items()}
        raw = {"picture": one.probe.picture, "sound": one.probe.sound}
        tensors |= {f"{one.probe.name}/{name}": torch.from_numpy(value) for name, value in raw.items() if value is not None}
    return tensors


def _chat(probe: Probe) -> dict[str, Any]:
    return {"name": probe.name, "messages": [_message(probe.message)]}


def _message(message: Message) -> dict[str, Any]:
    parts = [{"type": "text", "text": part.text} if part.type == "text" else {"type": part.type} for part in message.content]
    return {"role": message.role, "content": parts}


def _max_difference(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Largest absolute difference; None where shapes differ or something is not finite, which is never within a tolerance."""
    if one.shape != other.shape:
        return None
    difference = float((one.float() - other.float()).abs().max())
    return difference if math.isfinite(difference) else None


def _feature_difference(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Of one picture's or sound's features, which both sides may pad to another length."""
    if one.ndim != other.ndim:
        return None
    common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return _max_difference(one[common], other.cpu()[common])
