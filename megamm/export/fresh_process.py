"""What somebody who has transformers and not megamm gets out of an exported folder. Run in a process of its own:

    python fresh_process.py FOLDER PROBES OUTPUT

PROBES and OUTPUT are safetensors files. PROBES holds, for each probe of the JSON list in its metadata, the model's inputs
(`NAME/input/...`) and the raw picture or sound (`NAME/picture`, `NAME/sound`); OUTPUT gets the logits on those inputs,
what the exported processor makes of the raw media, the logits on that, and a greedy answer.
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
    for probe in probes:
        own = {name.removeprefix(f"{probe['name']}/"): value for name, value in tensors.items() if name.startswith(f"{probe['name']}/")}
        for key, value in answer(model, processor, probe["messages"], own).items():
            results[f"{probe['name']}/{key}"] = value.contiguous()
    metadata = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(model.dtype).removeprefix("torch.")}
    save_file(results, output_path, metadata=metadata)


@torch.inference_mode()
def answer(model, processor, messages: list, own: dict) -> dict:
    """Logits on given inputs, then everything again from the raw picture or sound."""
    given = {name.removeprefix("input/"): value for name, value in own.items() if name.startswith("input/")}
    results = {"logits": model(**given).logits.float()}
    # A copy a part, because the template's own lists must stay as they were.
    raw = {"image": own.get("picture"), "audio": own.get("sound")}
    chat = [{"role": message["role"], "content": [_part(part, raw) for part in message["content"]]} for message in messages]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    results |= {f"processed/{name}": value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    results["processed_logits"] = model(**inputs).logits.float()
    results["answer"] = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    return results


def _part(part: dict, raw: dict) -> dict:
    if part["type"] == "image":
        from PIL import Image

        return {"type": "image", "image": Image.fromarray(raw["image"].numpy())}
    if part["type"] == "audio":
        return {"type": "audio", "audio": raw["audio"].numpy()}
    return part


if __name__ == "__main__":
    main(*sys.argv[1:])
