"""
Peak memory of loading a sparse student, as a multiple of its checkpoint.

    python benchmarks/load_memory.py [--layers 4] [--remote] [--rounds 1] [--json FILE]

Writes a student of Qwen2-0.5B's width with experts in every layer, in float32 about 0.1 GB and 0.22 GB per layer, and
loads it in a fresh process; with `--remote` in one that cannot import this package, as somebody who downloads it would.
Counted is what that process holds at its peak above what it held after its imports: `resident` is all of it, pages of
the mapped file included, which the system may take back at any time; `anonymous` is without those. The floors: the
checkpoint itself, and the time of reading its bytes in the same process, before. `mixtral`, in the JSON, is stock
transformers' loading of a Mixtral of the same sizes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from measuring import add_json, measured, resident, write_json
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
)

EXPERTS = 4
TEXT = {
    "vocab_size": 32000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


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
        text_config=Qwen2Config(**TEXT, num_hidden_layers=layers),
        moe_layers=list(range(layers)),
        num_experts=EXPERTS,
    )
    LlavaModForConditionalGeneration._from_config(config).save_pretrained(folder)
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def write_mixtral(folder, layers):
    """The same for stock transformers, without a vision encoder."""
    config = MixtralConfig(**TEXT, num_hidden_layers=layers, num_local_experts=EXPERTS)
    MixtralForCausalLM._from_config(config).save_pretrained(folder)
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def memory():
    """Resident and anonymous memory of this process in bytes."""
    return {kind: resident(field) for kind, field in (("resident", "VmRSS"), ("anonymous", "RssAnon"))}


def load_and_watch(folder, remote):
    """Loads the student and returns the peaks of memory above what there was before."""
    if remote:
        sys.modules["llava_mod_hf"] = None  # type: ignore[assignment]
    else:
        import llava_mod_hf  # noqa: F401
    # imports what the model needs, on the meta device: no weight
    config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    auto = AutoModelForCausalLM if config.model_type == "mixtral" else AutoModelForImageTextToText
    with torch.device("meta"):
        auto.from_config(config, trust_remote_code=remote)
    start = time.perf_counter()
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
    read_seconds = time.perf_counter() - start
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
    model = auto.from_pretrained(folder, dtype="float32", trust_remote_code=remote)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    after = memory()
    return {
        "seconds": seconds,
        "read_seconds": read_seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{f"peak_{kind}": peak[kind] - before[kind] for kind in peak},
        **{f"held_{kind}": after[kind] - before[kind] for kind in after},
    }


def load(folder, size, remote):
    """Loads what is there in a fresh process, and compares its peak with the checkpoint."""
    process = subprocess.run(
        [sys.executable, __file__, "--load", str(folder), *(["--remote"] if remote else [])],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{folder}/modules"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    found = json.loads(process.stdout.splitlines()[-1])
    ratios = {kind.replace("peak_", "ratio_"): value / size for kind, value in found.items() if "peak_" in kind}
    return {"checkpoint": size, "remote": remote, **found, **ratios}


def measure(layers=4, remote=False, rounds=1, rival=False):
    """Writes a student, and a rival, and loads each; `{"student", "mixtral": [what a round found]}`."""
    ways = {"student": write_student, **({"mixtral": write_mixtral} if rival else {})}
    found = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {name: make(Path(folder) / name, layers) for name, make in ways.items()}
        for _ in range(rounds):
            for name, each in found.items():
                each.append(load(Path(folder) / name, sizes[name], remote and name == "student"))
    return found


def json_rows(found):
    rows = []
    for figure, base, unit, added in (
        ("seconds", "read_seconds", "s", ""),
        ("peak_resident", "checkpoint", "bytes", ": resident"),
        ("peak_anonymous", "checkpoint", "bytes", ": anonymous"),
    ):
        values = {name: [one[figure] for one in each] for name, each in found.items()}
        for name, each in found.items():
            rivals = {rival: values[rival] for rival in found if rival not in ("student", name)}
            bases = {"floor": [one[base] for one in each], **rivals}
            rows.append(measured(f"{name}{added}", values[name], unit, bases))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="4 make about 1 GB")
    parser.add_argument("--remote", action="store_true", help="load by remote code, without this package")
    parser.add_argument("--rounds", type=int, default=1)
    add_json(parser)
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.load:
        sys.stdout.write(json.dumps(load_and_watch(args.load, args.remote)) + "\n")
        return
    found = measure(args.layers, args.remote, args.rounds, rival=args.json is not None)
    rounds = found["student"]
    result = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    sys.stdout.write(
        f"checkpoint {result['checkpoint'] / 1e9:.2f} GB, peak {result['peak_resident'] / 1e9:.2f} GB resident "
        f"({result['ratio_resident']:.2f} ×), {result['peak_anonymous'] / 1e9:.2f} GB anonymous "
        f"({result['ratio_anonymous']:.2f} ×), loaded in {result['seconds']:.1f} s\n"
    )
    write_json(args.json, __file__, json_rows(found), argv)


if __name__ == "__main__":
    main()
