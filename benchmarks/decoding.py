"""
Time of a greedily decoded token: of a sparse student, a dense one of as many active parameters, and a big teacher.

    python benchmarks/decoding.py [--layers 4] [--tokens 16] [--repeats 5] [--cache static] [--json FILE]

Random weights, float32, one row: 704 tokens before it, 576 of them an image's. The student has Qwen2-0.5B's sizes, four
experts in every second layer, top-2; `dense, as many active` has a FFN of two experts' width in those layers, `dense`
the plain FFN; the teacher has Qwen2-7B's widths and heads. All have the same few layers, so that the head, which a
student of 24 layers has once, weighs more here. The floor reads each active weight once: matrix products of the shapes
that a token passes. Taken in turns in one process, medians; `--clock cpu` counts the seconds of all threads, which
other work on the machine changes less. `picture` is the pass over the 704 tokens, encoder of CLIP-L/14-336 included.
"""

import argparse
import statistics

import torch
from measuring import CLOCKS, add_json, measured, seconds_of, write_json
from torch import nn
from transformers import CLIPVisionConfig, DynamicCache, Qwen2Config, StaticCache

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration

SIZES = {  # of the published configs
    "qwen2-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    "qwen2-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
IMAGE, PROMPT = 576, 704
RIVALS = ("dense, as many active", "dense", "teacher of 7B's widths")


def make(size, layers, *, tie=True, **options):
    """A model of random weights; `wide` layers have a FFN of twice the width."""
    wide = options.pop("wide", ())
    text = Qwen2Config(vocab_size=151936, num_hidden_layers=layers, tie_word_embeddings=tie, **SIZES[size])
    vision = CLIPVisionConfig(**VISION, image_size=336, patch_size=14, projection_dim=768)
    config = LlavaModConfig(
        vision_config=vision, text_config=text, image_token_index=1, image_seq_length=IMAGE,
        tie_word_embeddings=tie, **options,
    )  # fmt: skip
    model = LlavaModForConditionalGeneration(config).eval()
    for index in wide:
        mlp = model.model.language_model.layers[index].mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(mlp, name)
            inputs, outputs = old.in_features, old.out_features
            shape = (2 * inputs, outputs) if name == "down_proj" else (inputs, 2 * outputs)
            setattr(mlp, name, nn.Linear(*shape, bias=False))
    return model


def floor_of(model, top_k=1):
    """Matrix products of one token with each weight of the language model that it passes."""
    weights = [module.weight for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
    for module in model.model.language_model.modules():
        if hasattr(module, "gate_up_proj"):
            weights += [w[expert] for w in (module.gate_up_proj, module.down_proj) for expert in range(top_k)]
    weights.append(model.lm_head.weight)
    ones = [torch.ones(1, weight.shape[1]) for weight in weights]

    def step():
        for one, weight in zip(ones, weights, strict=True):
            one @ weight.T

    return step


class Decoder:
    """Greedy decoding of one row, a token a call."""

    def __init__(self, model, static, tokens):
        self.model, self.static, self.most = model, static, PROMPT + tokens
        ids = torch.randint(2, 300, (1, PROMPT))
        ids[:, 10 : 10 + IMAGE] = 1
        self.inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}

    def begin(self):
        config = self.model.config.get_text_config()
        self.cache = StaticCache(config=config, max_cache_len=self.most) if self.static else DynamicCache(config=config)
        self._take(self.model(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1))

    def step(self):
        self._take(self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True))

    def _take(self, outputs):
        self.next = outputs.logits[:, -1:].argmax(-1)


@torch.no_grad()
def measure(args):
    """`{name: {"picture", "token", "floor"}}`: seconds of each time."""
    sparse = list(range(0, args.layers, 2))
    ways = {
        "sparse student": (lambda: make("qwen2-0.5b", args.layers, moe_layers=sparse), 2),
        "dense, as many active": (lambda: make("qwen2-0.5b", args.layers, wide=sparse), 1),
        "dense": (lambda: make("qwen2-0.5b", args.layers), 1),
        "teacher of 7B's widths": (lambda: make("qwen2-7b", args.layers, tie=False), 1),
    }
    models = {name: (model(), top_k) for name, (model, top_k) in ways.items() if name not in args.without}
    found = {name: {"picture": [], "token": [], "floor": []} for name in models}
    decoders = {name: Decoder(model, args.cache == "static", args.tokens) for name, (model, _) in models.items()}
    floors = {name: floor_of(*model) for name, model in models.items()}
    for _ in range(args.repeats + 1):  # the first warms up
        for name, decoder in decoders.items():
            found[name]["picture"].append(seconds_of(decoder.begin, clock=args.clock))
        for _ in range(args.tokens - 1):
            for name, decoder in decoders.items():
                for kind, step in (("token", decoder.step), ("floor", floors[name])):
                    found[name][kind].append(seconds_of(step, clock=args.clock))
    first = {"picture": 1, "token": args.tokens - 1, "floor": args.tokens - 1}
    return {name: {kind: values[first[kind] :] for kind, values in kinds.items()} for name, kinds in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--without", nargs="+", default=[], choices=RIVALS, metavar="NAME", help="models to leave out")
    add_json(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    times = measure(args)
    found = {name: {kind: statistics.median(each) for kind, each in kinds.items()} for name, kinds in times.items()}
    student = found["sparse student"]["token"]
    print("| | tokens/s | time / floor | student's speed / its | picture, s |", "|---|---:|---:|---:|---:|", sep="\n")
    for name, each in found.items():
        ratios = f"{each['token'] / each['floor']:.2f} | {each['token'] / student:.2f}"
        print(f"| {name} | {1 / each['token']:.1f} | {ratios} | {each['picture']:.2f} |")
    rows = []
    for name, kinds in times.items():
        others = {other: each for other, each in times.items() if other not in (name, "sparse student")}
        for kind in ("token", "picture"):
            bases = {"floor": kinds["floor"]} if kind == "token" else {}
            bases |= {other: each[kind] for other, each in others.items()}
            rows.append(measured(name if kind == "token" else f"{name}: {kind}", kinds[kind], "s", bases))
    write_json(args.json, __file__, rows, threads=args.threads)


if __name__ == "__main__":
    main()
