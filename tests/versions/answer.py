"""
Loads students as somebody does who has another transformers and not this package. Run in a process of its own.

    python answer.py FOLDER...

Each folder holds a student and `inputs.safetensors`; what it computes and answers goes to `found.safetensors` in it,
the student as this transformers saves it to `again`, and a line of JSON about the processor to standard output.
"""

import json
import shutil
import sys

import torch
from PIL import Image
from safetensors.torch import load_file, save_file


def generate(model, inputs, **options):
    """Greedy answers, and the number of tokens that each step ran through the language model."""
    tokens = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    suppressed = [model.config.image_token_index]
    answers = model.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=suppressed, **options)
    hook.remove()
    return answers, torch.tensor(tokens)


@torch.no_grad()
def answer(folder):
    from transformers import AutoModel, AutoModelForImageTextToText

    inputs = load_file(f"{folder}/inputs.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    answers, tokens = generate(model, inputs)
    everything = {"output_router_logits": True, "output_hidden_states": True}
    whole = model(**inputs, labels=inputs["input_ids"], **everything)
    found = {
        "logits": model(**inputs).logits,
        "last logits": model(**inputs, logits_to_keep=1).logits,
        "hidden": base(**inputs).last_hidden_state,
        "loss": whole.loss,
        "image features": whole.image_hidden_states,
        **{f"hidden states {layer}": states for layer, states in enumerate(whole.hidden_states)},
        **{f"router logits {layer}": logits for layer, logits in enumerate(whole.router_logits or ())},
        "answer": answers,
        "tokens of each step": tokens,
        "answer without cache": generate(model, inputs, use_cache=False)[0],
    }
    model.save_pretrained(f"{folder}/again")
    return {name: value.clone().contiguous() for name, value in found.items()}


def prepare(folder):
    """What the processor of the folder makes of a prompt and a picture."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(f"{folder}/again")
    image = Image.linear_gradient("L").convert("RGB").resize((48, 64))
    return dict(processor(text="<image>\nis there a dog?", images=image, return_tensors="pt"))


def main(folders):
    sys.modules["llava_mod_hf"] = None  # any import of the package fails from here on
    for folder in folders:
        save_file(answer(folder), f"{folder}/found.safetensors")
        shutil.copy(f"{folder}/inputs.safetensors", f"{folder}/again")
        try:
            processed = {name: value.float().sum().item() for name, value in prepare(folder).items()}
        except Exception as error:
            processed = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps({"folder": folder, "processed": processed}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
