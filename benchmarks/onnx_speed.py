"""
Tokens per second of a sparse student in PyTorch, in onnxruntime and in WebAssembly, one thread each.

    make test-onnx  # installs what writes and runs the graphs, and transformers.js
    PYTHONPATH=.venv/onnx:.venv/demo .venv/bin/python benchmarks/onnx_speed.py --runtime .venv/transformers-js

`embedded` is the embedded teacher with experts in alternate layers; `qwen2-0.5b` is random, of that model's widths with
fewer layers. The engines take turns, so that what else the machine does meets all of them; ratios are what counts.
PyTorch runs the model's own `forward`, without what `generate` adds. With `--runtime` a headless Chromium runs
transformers.js (Debian's `chromium` with `chromium-driver`).
"""

import argparse
import functools
import http.server
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, SiglipVisionConfig

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, load_model_and_processor, upcycle
from llava_mod_hf.students.onnx_reader import OnnxStudent
from llava_mod_hf.students.web_export import export_web

# The browser's part: as the page loads and asks, with token ids given, so that all engines have the same.
SCRIPT = """
const [name, ids, pixels, count, done] = arguments;
(async () => {
  const { AutoModelForImageTextToText, Tensor, env } = await import("/runtime/" + name);
  if (!window.model) {
    const path = (kind) => new URL("/runtime/ort-wasm-simd-threaded.asyncify." + kind, location.href).href;
    env.backends.onnx.wasm.wasmPaths = { mjs: path("mjs"), wasm: path("wasm") };
    env.backends.onnx.wasm.numThreads = 1;
    Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: "/" });
    Object.assign(env, { useBrowserCache: false, useWasmCache: false });
    window.model = await AutoModelForImageTextToText.from_pretrained("model", { device: "wasm", dtype: "fp32" });
  }
  const long = (array) => new Tensor("int64", BigInt64Array.from(array), [1, array.length]);
  const side = Math.sqrt(pixels.length / 3), times = [];
  await window.model.generate({
    input_ids: long(ids.map(BigInt)),
    attention_mask: long(ids.map(() => 1n)),
    pixel_values: new Tensor("float32", Float32Array.from(pixels), [1, 3, side, side]),
    min_new_tokens: count, max_new_tokens: count, do_sample: false,
    streamer: { put: () => times.push(performance.now()), end: () => {} },  // first of all with the prompt
  });
  return times;
})().then(done, (error) => done(String(error)));
"""


def student(size, layers):
    """`(model, processor)`; the random one has the embedded one's processor, whose tokenizer nobody asks."""
    dense, processor = load_model_and_processor("embedded:tiny-teacher")
    if size != "embedded":
        torch.manual_seed(0)
        text = Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        vision = SiglipVisionConfig(**dense.config.vision_config.to_dict())
        kept = ("image_token_index", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy")
        values = {name: getattr(dense.config, name) for name in kept}
        config = LlavaModConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **values)
        dense = LlavaModForConditionalGeneration(config)
    return upcycle(dense, layers="alternate").eval(), processor


@torch.no_grad()
def in_torch(model, inputs, count):
    ids, mask, cache, times = inputs["input_ids"], inputs["attention_mask"], None, [time.perf_counter()]
    for _ in range(count):
        given = {"pixel_values": inputs["pixel_values"]} if cache is None else {}
        out = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **given
        )
        ids, cache = out.logits[:, -1:].argmax(dim=-1), out.past_key_values
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        times.append(time.perf_counter())
    return times


def in_onnxruntime(reader, inputs, count):
    mask, cache, times = inputs["attention_mask"], reader.empty_cache(1), [time.perf_counter()]
    vectors = reader.embed(inputs["input_ids"], inputs["pixel_values"])
    for _ in range(count):
        outputs, cache = reader.decode(vectors, mask, cache)
        vectors = reader.embed(outputs["logits"][:, -1:].argmax(axis=-1))
        mask = np.append(mask, [[1]], axis=1)
        times.append(time.perf_counter())
    return times


def in_browser(browser, inputs, count):
    pixels = inputs["pixel_values"].flatten().tolist()
    times = browser.execute_async_script(SCRIPT, "transformers.min.js", inputs["input_ids"][0].tolist(), pixels, count)
    if isinstance(times, str):
        raise RuntimeError(times)
    return [milliseconds / 1000 for milliseconds in times]


def open_browser(folder):
    from selenium import webdriver

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_script_timeout(1800)
    browser.get(f"http://127.0.0.1:{server.server_port}/model/config.json")  # a page of the server's that loads nothing
    return browser


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("embedded", "qwen2-0.5b"), default="embedded")
    parser.add_argument("--layers", type=int, default=4, help="of the random one")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runtime", help="folder where npm installed transformers.js; without, no browser")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = student(args.size, args.layers)
    image = torch.full((1, model.config.image_seq_length), model.config.image_token_index)
    ids = torch.cat([torch.tensor([[4]]), image, torch.arange(20, 40)[None], torch.tensor([[5]])], dim=1)
    side = model.config.vision_config.image_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, side, side)}
    arrays = {name: value.numpy() for name, value in inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        export_web(model, processor, Path(folder, "page"), runtime=args.runtime)
        reader = OnnxStudent(Path(folder, "page/model"), threads=1)
        engines = {"torch": lambda: in_torch(model, inputs, args.tokens)}
        engines["onnxruntime"] = lambda: in_onnxruntime(reader, arrays, args.tokens)
        if args.runtime:
            browser = open_browser(Path(folder, "page"))
            engines["wasm"] = lambda: in_browser(browser, arrays, args.tokens)
        found = {name: [] for name in engines}
        for turn in range(args.repeats + 1):
            for name, run in engines.items():
                times = run()
                if turn:  # the first warms up
                    found[name].append((times[1] - times[0], (len(times) - 2) / (times[-1] - times[1])))
        if args.runtime:
            browser.quit()
    for name, turns in found.items():
        prompts, speeds = (statistics.median(values) for values in zip(*turns, strict=True))
        ratios = [ours[1] / theirs[1] for ours, theirs in zip(turns, found["torch"], strict=True)]
        row = {"engine": name, "prompt_seconds": round(prompts, 4), "tokens_per_second": round(speeds, 1)}
        print(json.dumps(row | {"times_torch": round(statistics.median(ratios), 2), "prompt_tokens": ids.shape[1]}))
    print(json.dumps({"load_average": os.getloadavg(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
