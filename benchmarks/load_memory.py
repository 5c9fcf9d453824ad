"""
Peak memory of loading a sparse student, as a multiple of its checkpoint.

    python benchmarks/load_memory.py [--layers 4] [--remote] [--json]

Writes a student of Qwen2-0.5B's width with experts in every layer, in float32 about 0.1 GB and 0.22 GB per layer, and
loads it in a fresh process; with `--remote` in one that cannot import this package, as somebody who downloads it would.
Counted is what that process holds at its peak above what it held after its imports: `resident` is all of it, pages of
the mapped file included, which the system may take back at any time; `anonymous` is without those.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, Qwen2Config


def write_student(folder, layers):
    """Saves a student with random weights; returns the bytes of its weights."""
    from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration  # not in the process that is measured

    config = LlavaModConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
        ),
        text_config=Qwen2Config(
            vocab_size=32000,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=layers,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        moe_layers=list(range(layers)),
    )
    LlavaModForConditionalGeneration._from_config(config).save_pretrained(folder)
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def memory():
    """Resident and anonymous memory of this process in bytes."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {
        kind: int(fields[field].split()[0]) * 1024 for kind, field in (("resident", "VmRSS"), ("anonymous", "RssAnon"))
    }


def load_and_watch(folder, remote):
    """Loads the student and returns the peaks of memory above what there was before."""
    if remote:
        sys.modules["llava_mod_hf"] = None  # type: ignore[assignment]
    else:
        import llava_mod_hf  # noqa: F401
    # imports what the model needs, on the meta device: no weight
    config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    with torch.device("meta"):
        AutoModelForImageTextToText.from_config(config, trust_remote_code=remote)
    before = memory()
    peak, done = dict(before), threading.Event()

    def sample():
        while not done.is_set():
            for kind, value in memory().items():
                peak[kind] = max(peak[kind], value)
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", trust_remote_code=remote)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    after = memory()
    return {
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{f"peak_{kind}": peak[kind] - before[kind] for kind in peak},
        **{f"held_{kind}": after[kind] - before[kind] for kind in after},
    }


def measure(layers=4, remote=False):
    """Writes a student, loads it in a fresh process, and compares its peak with the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_student(folder, layers)
        process = subprocess.run(
            [sys.executable, __file__, "--load", folder, *(["--remote"] if remote else [])],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{folder}/modules"},
            capture_output=True,
            text=True,
        )
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    found = json.loads(process.stdout.splitlines()[-1])
    ratios = {kind.replace("peak_", "ratio_"): value / size for kind, value in found.items() if "peak_" in kind}
    return {"checkpoint": size, "remote": remote, **found, **ratios}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="4 make about 1 GB")
    parser.add_argument("--remote", action="store_true", help="load by remote code, without this package")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.load:
        sys.stdout.write(json.dumps(load_and_watch(args.load, args.remote)) + "\n")
        return None
    result = measure(args.layers, args.remote)
    if args.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    else:
        sys.stdout.write(
            f"checkpoint {result['checkpoint'] / 1e9:.2f} GB, peak {result['peak_resident'] / 1e9:.2f} GB resident "
            f"({result['ratio_resident']:.2f} ×), {result['peak_anonymous'] / 1e9:.2f} GB anonymous "
            f"({result['ratio_anonymous']:.2f} ×), loaded in {result['seconds']:.1f} s\n"
        )
    return result


if __name__ == "__main__":
    main()
