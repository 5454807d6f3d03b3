"""Ask an exported folder about one picture and one sound, with transformers alone: what a user of the export would write.

    python ask_export.py EXPORT DATA

DATA holds the held-out shards `digits/test-*.tar` and `words/test-*.tar`. megamm is neither imported nor needed.
"""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import soundfile
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor


def first_sample(pattern: str) -> tuple[dict, bytes]:
    """The first sample of the first shard: its JSON and its media member, read as any tar."""
    shard = sorted(Path(sys.argv[2]).glob(pattern))[0]
    document = media = None
    with tarfile.open(shard) as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            if member.name.endswith(".json"):
                document = json.loads(data)
            else:
                media = data
            if document is not None and media is not None:
                return document, media
    raise SystemExit(f"{shard} holds no sample with a picture or a sound")


def main() -> None:
    """Load the folder, ask twice, print both answers beside what is right."""
    processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()

    for pattern in ("digits/test-*.tar", "words/test-*.tar"):
        document, media = first_sample(pattern)
        question, answer = document["messages"][0], document["messages"][1]
        inputs_of_kind = {}
        if pattern.startswith("digits"):
            inputs_of_kind["images"] = [Image.open(io.BytesIO(media)).convert("RGB")]
        else:
            samples, rate_hz = soundfile.read(io.BytesIO(media), dtype="float32")
            assert rate_hz == processor.feature_extractor.sampling_rate
            inputs_of_kind["audio"] = [samples]
        prompt = processor.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[prompt], return_tensors="pt", **inputs_of_kind)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        said = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = "".join(part.get("text", "") for part in answer["content"])
        print(f"{next(iter(inputs_of_kind))}: the exported model says {said!r}, right is {right!r}")

    loaded = [name for name in sys.modules if name.split(".")[0] == "megamm"]
    print(f"modules of megamm that were imported: {len(loaded)}")


if __name__ == "__main__":
    main()
