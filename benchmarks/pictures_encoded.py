"""
Time of the frozen vision encoder where pictures of a batch are the same: encoded once, as often as they come, and where
their features are on disk (`vision_cache`), with the hash of each picture and the reading of its file.

    python benchmarks/pictures_encoded.py [--layers 4] [--images 8] [--rounds 3] [--json FILE]

Random weights of CLIP-L/14-336's widths with `--layers` of its 24 layers, behind a student whose language model is
tiny, so that the encoder is nearly all of the forward pass. Ways take turns in one process; medians of processor
seconds, which other work on the machine changes less. In the JSON, the floor is a batch without any picture twice.
"""

import argparse
import statistics
import tempfile
from functools import partial

import torch
from measuring import add_json, in_turns, measured, write_json
from transformers import CLIPVisionConfig, Qwen2Config

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.teachers.unique_images import encode_once, keep_features
from llava_mod_hf.teachers.vision_cache import VisionCache

SIZE, PATCH = 336, 14


def make_student(layers):
    vision_config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text_config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaModConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=1,
        image_seq_length=(SIZE // PATCH) ** 2,
    )
    student = LlavaModForConditionalGeneration(config).eval()
    student.model.vision_tower.requires_grad_(False)
    return student


def batch_of(images, different):
    """Rows of one picture each, `different` of which are not the same."""
    pixels = torch.randn(different, 3, SIZE, SIZE)[torch.arange(images) % different]
    ids = torch.ones(images, (SIZE // PATCH) ** 2 + 1, dtype=torch.long)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": pixels}


@torch.no_grad()
def forward(model, inputs):
    model.base_model(**inputs)


def measure(args, folder):
    """
    `{different pictures: {"once", "plain", "kept", "floor": [seconds]}}`: encoded once, as often as they come, and read
    from a folder; the floor has no picture twice.
    """
    plain, once, kept = (make_student(args.layers) for _ in range(3))
    for model in (once, kept):
        model.load_state_dict(plain.state_dict())
    encode_once(once)
    keep_features(VisionCache(folder), kept)
    found = {}
    for different in sorted({args.images, args.images // 2, 1}, reverse=True):
        batch, alone = batch_of(args.images, different), batch_of(different, different)
        ways = {"once": (once, batch), "plain": (plain, batch), "kept": (kept, batch), "floor": (plain, alone)}
        steps = {name: partial(forward, model, inputs) for name, (model, inputs) in ways.items()}
        found[different] = in_turns(steps, args.rounds, clock="cpu")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--images", type=int, default=8, help="of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_json(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, folder)
    print(f"| different of {args.images} pictures | seconds | × as often as they come | from disk, seconds |")
    print("|---:|---:|---:|---:|")
    rows = []
    for different, times in found.items():
        once, plain, kept = (statistics.median(times[way]) for way in ("once", "plain", "kept"))
        print(f"| {different} | {once:.2f} | {once / plain:.2f} | {kept:.3f} |")
        bases = {"as often as they come": times["plain"], "floor": times["floor"]}
        name = f"{different} of {args.images} different"
        rows.append(measured(name, times["once"], "processor s", bases))
        rows.append(measured(f"{name}: from disk", times["kept"], "processor s", bases))
    write_json(args.json, __file__, rows, argv, threads=args.threads)


if __name__ == "__main__":
    main()
