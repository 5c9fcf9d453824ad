"""
A LLaVA → ONNX graphs, and what onnxruntime answers beside what torch does.

    pip install onnx onnxruntime onnxscript
    python benchmarks/onnx_export.py --model runs/merged --output_dir runs/onnx

Three graphs: `vision` (pixels → image features in the language model's width), `embeddings` (token ids → vectors) and
`language_model` (vectors, mask → logits). Features take the places of `<image>` tokens in between. There is no KV
cache: every new token runs over the whole sequence.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_mod_hf.data import easy_vqa
from llava_mod_hf.publishing.fresh_process import conversation


class Vision(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output[0]


class LanguageModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.language_model, self.head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds, attention_mask):
        outputs = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        return self.head(outputs.last_hidden_state)


def graphs(model):
    """`{name: (module, example inputs, names of dynamic dimensions)}`."""
    batch, sequence = Dim("batch", min=1, max=1024), Dim("sequence", min=2, max=4096)
    width, pixels = model.config.text_config.hidden_size, model.config.vision_config.image_size
    tokens = {0: batch, 1: sequence}
    return {
        # one image: LLaVA returns a list with an entry per image, whose length a graph fixes
        "vision": (Vision(model), {"pixel_values": torch.randn(1, 3, pixels, pixels)}, {"pixel_values": {}}),
        "embeddings": (model.get_input_embeddings(), {"input": torch.zeros(2, 7, dtype=torch.long)}, {"input": tokens}),
        "language_model": (
            LanguageModel(model),
            {"inputs_embeds": torch.randn(2, 7, width), "attention_mask": torch.ones(2, 7, dtype=torch.long)},
            {"inputs_embeds": tokens, "attention_mask": tokens},
        ),
    }


def export(model, folder):
    """Writes the graphs and opens them."""
    folder.mkdir(parents=True, exist_ok=True)
    sessions = {}
    for name, (module, inputs, dynamic) in graphs(model).items():
        path = folder / f"{name}.onnx"
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )
        sessions[name] = onnxruntime.InferenceSession(path)
    return sessions


def run(sessions, inputs, image_token):
    """Logits of the three graphs together."""
    vectors = sessions["embeddings"].run(None, {"input": inputs["input_ids"]})[0]
    features = sessions["vision"].run(None, {"pixel_values": inputs["pixel_values"]})[0]
    vectors[inputs["input_ids"] == image_token] = features
    mask = inputs["attention_mask"]
    return sessions["language_model"].run(None, {"inputs_embeds": vectors, "attention_mask": mask})[0]


def answer(sessions, inputs, image_token, ends, limit):
    """Greedy continuation of one row."""
    inputs, tokens = dict(inputs), []
    while len(tokens) < limit and (not tokens or tokens[-1] not in ends):
        tokens.append(int(run(sessions, inputs, image_token)[0, -1].argmax()))
        inputs["input_ids"] = np.append(inputs["input_ids"], [[tokens[-1]]], axis=1)
        inputs["attention_mask"] = np.append(inputs["attention_mask"], [[1]], axis=1)
    return tokens


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--stride", type=int, default=500, help="take every so many-th test question of easy-VQA")
    parser.add_argument("--max_new_tokens", type=int, default=8)
    parser.add_argument("--experts_implementation", default=None)
    parser.add_argument("--trust_remote_code", action="store_true")
    args = parser.parse_args()
    options = {"experts_implementation": args.experts_implementation} if args.experts_implementation else {}
    model = AutoModelForImageTextToText.from_pretrained(
        args.model, dtype="float32", trust_remote_code=args.trust_remote_code, **options
    ).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    start = time.perf_counter()
    sessions = export(model, args.output_dir)
    seconds = time.perf_counter() - start

    ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()
    paths = easy_vqa.image_paths("test")
    rows = [row | {"image": paths[row["image_id"]]} for row in easy_vqa.questions("test")[:: args.stride]]
    largest, difference, same = 0.0, 0.0, 0
    for row in rows:
        inputs = processor.apply_chat_template(
            conversation(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        logits = model(**inputs).logits.numpy()
        arrays = {name: value.numpy() for name, value in inputs.items()}
        found = run(sessions, arrays, model.config.image_token_index)
        largest, difference = max(largest, np.abs(logits).max()), max(difference, np.abs(found - logits).max())
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        expected = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        same += answer(sessions, arrays, model.config.image_token_index, ends, args.max_new_tokens) == expected
    files = sum(path.stat().st_size for path in args.output_dir.iterdir())
    report = {
        "questions": len(rows),
        "equal_answers": same,
        "largest_logit": round(float(largest), 2),
        "largest_difference": float(f"{difference:.1e}"),
        "export_seconds": round(seconds),
        "megabytes": round(files / 1e6, 2),
        "parameters_megabytes": round(sum(value.numel() for value in model.parameters()) * 4 / 1e6, 2),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
