"""
Loads students as somebody does who has another transformers and not this package. Run in a process of its own.

    python answer.py FOLDER...

Each folder holds a student and `inputs.safetensors`; the logits, the last hidden states and the greedy answer go to
`found.safetensors` in it, and a line of JSON about the processor to standard output.
"""

import json
import sys

import torch
from PIL import Image
from safetensors.torch import load_file, save_file


@torch.no_grad()
def answer(folder):
    from transformers import AutoModel, AutoModelForImageTextToText

    inputs = load_file(f"{folder}/inputs.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    greedy = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": [model.config.image_token_index]}
    return {
        "logits": model(**inputs).logits,
        "last logits": model(**inputs, logits_to_keep=1).logits,
        "hidden": base(**inputs).last_hidden_state,
        "answer": model.generate(**inputs, **greedy),
        "answer without cache": model.generate(**inputs, **greedy, use_cache=False),
    }


def prepare(folder):
    """What the processor of the folder makes of a prompt and a picture."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    image = Image.linear_gradient("L").convert("RGB").resize((48, 64))
    return dict(processor(text="<image>\nis there a dog?", images=image, return_tensors="pt"))


def main(folders):
    sys.modules["llava_mod_hf"] = None  # any import of the package fails from here on
    for folder in folders:
        save_file({name: value.contiguous() for name, value in answer(folder).items()}, f"{folder}/found.safetensors")
        try:
            processed = {name: value.float().sum().item() for name, value in prepare(folder).items()}
        except Exception as error:
            processed = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps({"folder": folder, "processed": processed}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
