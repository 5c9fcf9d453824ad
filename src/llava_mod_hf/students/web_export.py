"""A static folder with a page that asks a student about pictures, in the browser."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

from llava_mod_hf.students.onnx_export import check_can_write, export_onnx

TRANSFORMERS_JS = "4.3.2"

# Beside the library, what it computes with: the kind of WebAssembly that it takes itself where there is a network.
WASM = ("ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
LIBRARY = "@huggingface/transformers/dist/transformers.min.js"

# What a Space of the Hub is told of the folder.
SPACE = """---
title: Ask a picture
sdk: static
app_file: index.html
---

A vision-language model that answers in the browser. Written by `llava-mod export --form web`.
"""


def export_web(model, processor, folder, *, dtypes=("fp32",), runtime=None, max_new_tokens=128):
    """
    Writes `index.html` and, in `model/`, what [`~llava_mod_hf.students.onnx_export.export_onnx`] writes; and a
    `README.md` that makes a static Space of the folder.

    Any static server will do, a Space of the Hub too: no build step, and no request to anybody but the server and,
    without `runtime`, the CDN that has transformers.js.

    Args:
        model, processor, folder, dtypes: as there.
        runtime (`str` or `Path`, *optional*):
            Folder where `npm install @huggingface/transformers` was run: the library is copied beside the page, which
            then works offline. By default the page imports the pinned version from jsDelivr.
        max_new_tokens (`int`, *optional*, defaults to 128): of an answer.

    Raises:
        ValueError: as there, as [`runtime_files`], and if the processor has no chat template.
    """
    folder = Path(folder)
    check_web(folder, dtypes, runtime)
    if not (processor.chat_template or getattr(processor.tokenizer, "chat_template", None)):
        raise ValueError("The processor has no chat template, by which the page asks: set `processor.chat_template`.")
    export_onnx(model, processor, folder / "model", dtypes=dtypes)
    text = model.config.text_config
    settings = {
        "library": f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{TRANSFORMERS_JS}",
        "wasm": None,
        "dtypes": list(dtypes),
        "max_new_tokens": max_new_tokens,
        "moe_layers": list(getattr(text, "moe_layers", [])),
        "num_experts": getattr(text, "num_experts", None),
    }
    if runtime is not None:
        (folder / "runtime").mkdir()
        for path in runtime_files(runtime):
            shutil.copyfile(path, folder / "runtime" / path.name)
        settings |= {"library": f"./runtime/{Path(LIBRARY).name}", "wasm": [f"./runtime/{name}" for name in WASM]}
    page = files("llava_mod_hf.students").joinpath("web_page.html").read_text(encoding="utf-8")
    written = json.dumps(settings).replace("<", "\\u003c")  # inside a script element
    (folder / "index.html").write_text(page.replace("{{ settings }}", written), encoding="utf-8")
    (folder / "README.md").write_text(SPACE, encoding="utf-8")


def check_web(folder, dtypes, runtime):
    """
    Raises:
        ValueError: as [`~llava_mod_hf.students.onnx_export.check_can_write`], and as [`runtime_files`].
    """
    check_can_write(folder, dtypes)
    if runtime is not None:
        runtime_files(runtime)


def runtime_files(runtime):
    """
    Where the library and its WebAssembly are in a folder of npm.

    Raises:
        ValueError: if one of them is not there, or the library is of another major version than the page needs.
    """
    modules = Path(runtime) / "node_modules"
    library = modules / LIBRARY
    places = (library.parents[1] / "node_modules", modules)  # npm nests a package where another version is above
    package = library.parents[1] / "package.json"
    found = [library, *(next((p for p in _in(places, name) if p.is_file()), None) for name in WASM)]
    if not (library.is_file() and package.is_file()) or None in found:
        raise ValueError(
            f"`{runtime}` has no transformers.js: give the folder where `npm install "
            f"@huggingface/transformers@{TRANSFORMERS_JS}` was run."
        )
    version = json.loads(package.read_text(encoding="utf-8"))["version"]
    if version.split(".")[0] != TRANSFORMERS_JS.split(".")[0]:
        raise ValueError(
            f"`{runtime}` has transformers.js {version}, and the page is written for {TRANSFORMERS_JS}: run `npm "
            f"install @huggingface/transformers@{TRANSFORMERS_JS}` there."
        )
    return found


def _in(places, name):
    return [place / "onnxruntime-web" / "dist" / name for place in places]
