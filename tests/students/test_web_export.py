"""The page that asks a student about pictures, in a real Chromium: its answers, and whom it talks to."""

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from helpers.browser import browsing, requested, screenshot, served
from helpers.onnx_cases import different, libraries_or_skip, transformers_js_or_skip
from llava_mod_cli import main
from llava_mod_hf import load_model_and_processor, upcycle
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.publishing.fresh_process import conversation
from llava_mod_hf.students.web_export import TRANSFORMERS_JS, export_web

ROOT = Path(__file__).parents[2]
ROWS = 5


@pytest.fixture(scope="module")
def student():
    model, processor = load_model_and_processor("embedded:tiny-teacher")
    return different(upcycle(model, layers="alternate")), processor


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    libraries_or_skip()
    folder = tmp_path_factory.mktemp("web") / "page"
    export_web(*student, folder, dtypes=("fp32", "q8"), runtime=transformers_js_or_skip())
    return folder


@pytest.fixture
def browser(tmp_path):
    with browsing(tmp_path / "profile", width=820, height=900) as browser:
        yield browser


def wait_for(browser, condition, seconds=200):
    from selenium.webdriver.support.ui import WebDriverWait

    def met(browser):
        status = browser.execute_script("return document.getElementById('status')?.textContent ?? ''")
        assert not status.startswith("It failed"), status
        return browser.execute_script(f"return {condition}")

    WebDriverWait(browser, seconds, poll_frequency=0.1).until(met)


def ask(browser, row):
    """What the page answers, and the experts that it draws below each token."""
    from selenium.webdriver.common.by import By

    browser.execute_script("document.getElementById('hint').replaceChildren()")
    browser.find_element(By.ID, "file").send_keys(str(row["image"]))
    wait_for(browser, "document.querySelector('#drop img') !== null && !document.getElementById('send').disabled")
    question = browser.find_element(By.ID, "question")
    question.clear()
    question.send_keys(row["question"])
    browser.find_element(By.ID, "send").click()
    wait_for(
        browser, "!document.getElementById('send').disabled && document.getElementById('figures').textContent !== ''"
    )
    layers = browser.execute_script(
        "return [...document.querySelectorAll('.token')].map(token => [...token.querySelectorAll('.layer')].map("
        "layer => [...layer.querySelectorAll('.chip')].map(chip => Number(chip.textContent))))"
    )
    return browser.find_element(By.ID, "answer").text, layers


@torch.no_grad()
def torch_answer(model, processor, row):
    inputs = processor.apply_chat_template(
        conversation(row), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    # the experts of the positions that chose the answer's tokens
    inputs |= {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
    logits = model(**inputs, output_router_logits=True).router_logits
    chosen = torch.stack([layer[length - 1 :].topk(2).indices for layer in logits], dim=1).tolist()
    return processor.decode(tokens[0, length:], skip_special_tokens=True), chosen


@pytest.mark.slow
def test_the_page_answers_as_torch_and_asks_nobody_else(student, folder, browser, tmp_path):
    paths = easy_vqa.image_paths("test")
    rows = [row | {"image": paths[row["image_id"]]} for row in easy_vqa.questions("test")[3::2003]][:ROWS]
    expected = [torch_answer(*student, row) for row in rows]
    assert len({text for text, _ in expected}) > 2
    with served(folder) as address:
        browser.get(address)
        wait_for(browser, "document.getElementById('status').textContent.startsWith('Ready')")
        megabytes = (
            sum(path.stat().st_size for path in (folder / "model/onnx").iterdir() if "quant" not in path.name) / 1e6
        )
        status = browser.execute_script("return document.getElementById('status').textContent")
        assert abs(float(status.split()[1]) - megabytes) < 0.1
        for row, (text, chosen) in zip(rows, expected, strict=True):
            found, layers = ask(browser, row)
            assert found == text.strip()
            assert [[sorted(layer) for layer in token] for token in layers] == [
                [sorted(layer) for layer in token] for token in chosen
            ]
            assert "tokens per second" in browser.execute_script(
                "return document.getElementById('figures').textContent"
            )
        screenshot(browser, "web.png", tmp_path)
        # lighter weights are another file
        before = requested(browser)
        browser.execute_script(
            "const s = document.getElementById('dtype'); s.value = 'q8'; s.dispatchEvent(new Event('change'))"
        )
        wait_for(browser, "/^Ready: [1-3]\\./.test(document.getElementById('status').textContent)")
        assert ask(browser, rows[0])[0]
        after = requested(browser)
    assert f"{address}model/onnx/decoder_model_merged.onnx" in before
    assert f"{address}model/onnx/decoder_model_merged_quantized.onnx" in after - before
    assert all(url.startswith(address) for url in before | after)


@pytest.mark.slow
def test_a_browser_without_simd_is_told(folder, browser):
    script = {"source": "WebAssembly.validate = () => false"}
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    with served(folder) as address:
        browser.get(address)
        wait_for(
            browser, "document.getElementById('status').textContent.includes('This browser has no WebAssembly SIMD')"
        )
        assert not [url for url in requested(browser) if "model" in url]


def settings_of(folder):
    page = (folder / "index.html").read_text()
    return json.loads(page.split('id="settings">')[1].split("</script>")[0])


def no_graphs(monkeypatch):
    monkeypatch.setattr(
        "llava_mod_hf.students.web_export.export_onnx",
        lambda model, processor, folder, dtypes: folder.mkdir(parents=True),
    )
    monkeypatch.setattr("llava_mod_hf.students.onnx_export.NEEDS", ())


def fake_runtime(folder, version=TRANSFORMERS_JS):
    modules = folder / "node_modules"
    for name in (
        "@huggingface/transformers/dist/transformers.min.js",
        "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
        "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
    ):
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_text(name)
    (modules / "@huggingface" / "transformers" / "package.json").write_text(json.dumps({"version": version}))
    return folder


def test_the_page_takes_the_library_from_a_copy_or_from_the_cdn(make_student, processor, tmp_path, monkeypatch):
    no_graphs(monkeypatch)
    export_web(make_student(), processor, tmp_path / "online", dtypes=("q4", "fp32"))
    settings = settings_of(tmp_path / "online")
    assert settings["library"] == f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{TRANSFORMERS_JS}"
    assert settings["wasm"] is None and settings["dtypes"] == ["q4", "fp32"] and settings["moe_layers"] == [0, 2]
    assert f"TRANSFORMERS_JS_VERSION := {TRANSFORMERS_JS}\n" in (ROOT / "Makefile").read_text()
    space = ModelCard.load(tmp_path / "online" / "README.md").data
    assert space["sdk"] == "static" and (tmp_path / "online" / space["app_file"]).is_file()

    export_web(make_student(moe_layers=[]), processor, tmp_path / "offline", runtime=fake_runtime(tmp_path / "npm"))
    settings = settings_of(tmp_path / "offline")
    for path in (settings["library"], *settings["wasm"]):
        assert (tmp_path / "offline" / path).read_text().endswith(Path(path).name)
    assert settings["moe_layers"] == [] and "http" not in json.dumps(settings)


def test_bad_input(make_student, processor, tmp_path, monkeypatch, capsys):
    no_graphs(monkeypatch)
    with pytest.raises(ValueError, match="has no transformers.js: give the folder where `npm install"):
        export_web(make_student(), processor, tmp_path / "page", runtime=tmp_path)
    with pytest.raises(ValueError, match=r"has transformers.js 3.8.1, and the page is written for 4\.\d"):
        export_web(make_student(), processor, tmp_path / "page", runtime=fake_runtime(tmp_path / "npm", "3.8.1"))
    silent = copy.copy(processor)
    silent.tokenizer, silent.chat_template = copy.deepcopy(processor.tokenizer), None
    silent.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template, by which the page asks"):
        export_web(make_student(), silent, tmp_path / "page")
    with pytest.raises(ValueError, match=r"`onnx_dtypes` is \['q5'\]: give one or more of fp32, fp16, q8, q4"):
        export_web(make_student(), processor, tmp_path / "page", dtypes=["q5"])
    assert not (tmp_path / "page").exists()
    for option, value in (("--onnx_dtypes", "q8"), ("--runtime", "npm")):
        argv = ["export", "--model", "m", "--output_dir", str(tmp_path / "new"), "--form", "stock", option, value]
        assert main(argv) == 2
        assert f"`{option}` is" in capsys.readouterr().err
