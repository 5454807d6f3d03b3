"""What somebody who has transformers and not megamm gets out of an exported folder. Run in a process of its own:

    python fresh_process.py FOLDER PROBES OUTPUT

PROBES and OUTPUT are safetensors files. PROBES holds, for each probe of the JSON list in its metadata, the model's inputs
(`NAME/input/...`) and the raw picture or sound (`NAME/picture`, `NAME/sound`); OUTPUT gets the logits and a greedy answer on
those inputs, what the exported processor makes of the raw media, and the float32 logits on both.
"""

import json
import sys

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor


def main(folder: str, probes_path: str, output_path: str) -> None:
    """Load `folder`, answer all probes, write the results."""
    # Importing megamm must fail even where it is installed: the folder has to stand alone.
    sys.modules["megamm"] = None
    model, info = AutoModelForMultimodalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype="auto", output_loading_info=True
    )
    problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if problems:
        raise SystemExit(f"the weights do not fit: {problems}")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    model.eval()
    results = {}
    with safe_open(probes_path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        probes = json.loads(file.metadata()["probes"])
    metadata = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(model.dtype).removeprefix("torch.")}
    questions = [(probe["name"], probe["messages"], _of(probe["name"], tensors)) for probe in probes]
    for name, _, own in questions:
        results |= {f"{name}/{key}": value.contiguous() for key, value in as_exported(model, _of("input", own)).items()}
    # Features of two implementations may differ in their last bit; rounded to bfloat16 and through all layers that grows to a unit
    # in the last place of a logit and beyond. In float32 it stays as small as it is, and what is really wrong stands out.
    model.float()
    for name, messages, own in questions:
        results |= {f"{name}/{key}": value.contiguous() for key, value in from_raw_media(model, processor, messages, own).items()}
    save_file(results, output_path, metadata=metadata)


@torch.inference_mode()
def as_exported(model, given: dict) -> dict:
    """Logits and a greedy answer on given inputs, in the type of the folder."""
    answer = model.generate(**given, do_sample=False, max_new_tokens=8)[:, given["input_ids"].shape[1] :]
    return {"logits": model(**given).logits.float(), "answer": answer}


@torch.inference_mode()
def from_raw_media(model, processor, messages: list, own: dict) -> dict:
    """What the processor makes of a raw picture or sound, and float32 logits on that and on the given inputs."""
    # A copy a part, because the template's own lists must stay as they were.
    raw = {"image": own.get("picture"), "audio": own.get("sound")}
    chat = [{"role": message["role"], "content": [_part(part, raw) for part in message["content"]]} for message in messages]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    results = {f"processed/{name}": value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return results | {"processed_logits": model(**inputs).logits, "float32_logits": model(**_of("input", own)).logits}


def _of(name: str, tensors: dict) -> dict:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _part(part: dict, raw: dict) -> dict:
    if part["type"] == "image":
        from PIL import Image

        return {"type": "image", "image": Image.fromarray(raw["image"].numpy())}
    if part["type"] == "audio":
        return {"type": "audio", "audio": raw["audio"].numpy()}
    return part


if __name__ == "__main__":
    main(*sys.argv[1:])
