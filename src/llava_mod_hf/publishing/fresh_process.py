"""
Loads a published folder as somebody does who does not have this package. Run as a script, in a process of its own.

    python fresh_process.py FOLDER QUESTIONS.json OUTPUT.safetensors

QUESTIONS.json holds `[{"image": path, "question": text}, …]`; standard output gets the answers, OUTPUT the logits and
last hidden states of the first question's prompt.
"""

import json
import sys

from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline


def conversation(row):
    content = [{"type": "image", "image": Image.open(row["image"])}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]


def main(folder, questions_file, output_file):
    with open(questions_file) as file:
        questions = json.load(file)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        conversation(questions[0]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    logits = model(**inputs).logits
    save_file({"logits": logits.detach(), "hidden": base(**inputs).last_hidden_state.detach()}, output_file)

    answer = pipeline("image-text-to-text", model=model, processor=processor)
    answers = [
        answer(text=conversation(row), max_new_tokens=16, return_full_text=False)[0]["generated_text"]
        for row in questions
    ]
    json.dump({"model_type": config.model_type, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    sys.modules["llava_mod_hf"] = None  # type: ignore[assignment]  # any import of the package fails from here on
    main(*sys.argv[1:])
