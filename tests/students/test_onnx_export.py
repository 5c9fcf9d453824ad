"""A student as ONNX graphs: answers in onnxruntime and in transformers.js beside PyTorch's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, LlavaImageProcessorPil

from helpers import tiny
from helpers.models import assert_same_logits
from helpers.onnx_cases import different, libraries_or_skip, transformers_js_or_skip
from llava_mod_cli import main
from llava_mod_hf import (
    LlavaModConfig,
    LlavaModForConditionalGeneration,
    load_model_and_processor,
    merge_experts,
    upcycle,
)
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.publishing.fresh_process import conversation
from llava_mod_hf.students.onnx_export import FAMILIES, export_onnx
from llava_mod_hf.students.onnx_reader import OnnxStudent
from llava_mod_hf.students.onnx_weights import DTYPES
from llava_mod_hf.students.router_bias import add_router_bias, router_biases

ROOT = Path(__file__).parents[2]
LENGTH = 6  # tokens of an answer
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")


@pytest.fixture(autouse=True, scope="module")
def libraries():
    libraries_or_skip()


@pytest.fixture(scope="module")
def rows():
    paths = easy_vqa.image_paths("test")
    return [{"image": paths[row["image_id"]], "question": row["question"]} for row in easy_vqa.questions("test")[::501]]


def student_of(tokenizer, kind, layers, rank=None, **fields):
    """A random student with grouped queries, whose experts and answers differ; its answers end by their length."""
    values = tiny.make_student(tokenizer, moe_layers=[]).config.to_dict() | {"tie_word_embeddings": False}
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    text |= {"tie_word_embeddings": False}  # a tied head says the last token again
    text |= {"head_dim": 16} if kind in ("qwen3", "gemma3_text") else {}
    text |= (
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3_text" else {}
    )
    kept = ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id", "bos_token_id")
    text_config = CONFIG_MAPPING[kind](**{name: values["text_config"][name] for name in kept} | text | fields)
    values = {name: value for name, value in values.items() if name not in ("model_type", "auto_map")}
    torch.manual_seed(0)
    dense = LlavaModForConditionalGeneration(LlavaModConfig(**values | {"text_config": text_config})).eval()
    dense.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in dense.parameters():  # not the norms: float32 would be too coarse for what comes of them
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return dense if layers is None else different(upcycle(dense, layers=layers, expert_rank=rank))


def embedded(kind):
    model, processor = load_model_and_processor("embedded:tiny-teacher")
    if kind == "sparse":
        model = different(upcycle(model, layers="alternate"))
        add_router_bias(model)
        for bias in router_biases(model):
            bias.copy_(torch.tensor([0.4, 0.0, -0.2, 0.0]))
    elif kind == "merged":
        model = merge_experts(different(upcycle(model, layers="alternate")))
    return model.eval(), processor


SLOW = [
    pytest.param((kind, layers, rank), marks=pytest.mark.slow)
    for kind in ("llama", "qwen2", "qwen3", "gemma3_text")
    for layers in ("alternate", "all")
    for rank in (None, 4)
]
FAST = [("llama", "alternate", None), ("qwen2", "all", 4), ("qwen3", "alternate", 4), ("gemma3_text", "all", None)]
CASES = [
    *FAST,
    "sparse",
    pytest.param("dense", marks=pytest.mark.slow),
    "merged",
    *[case for case in SLOW if case.values[0] not in FAST],
]


def name_of(case):
    return case if isinstance(case, str) else "-".join(map(str, case))


@pytest.fixture(scope="module")
def exported(tokenizer, processor, tmp_path_factory):
    """`exported(case)`: model, processor and the folder, written once."""
    made = {}

    def export(case):
        if case not in made:
            model, its_processor = (
                embedded(case) if isinstance(case, str) else (student_of(tokenizer, *case), processor)
            )
            folder = tmp_path_factory.mktemp("onnx") / "student"
            before = {name: value.clone() for name, value in model.state_dict().items()}
            export_onnx(model, its_processor, folder, dtypes=tuple(DTYPES) if case == "sparse" else ("fp32",))
            assert before.keys() == model.state_dict().keys()  # left unchanged
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
            made[case] = model, its_processor, folder
        return made[case]

    return export


def inputs_of(processor, rows):
    return processor.apply_chat_template(
        [conversation(row) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def torch_answers(model, processor, rows):
    answers = []
    for row in rows:
        inputs = inputs_of(processor, [row])
        tokens = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    assert len(set(map(tuple, answers))) > 2  # or no mistake would show
    return answers


def chosen_experts(model, inputs):
    """`(batch, sequence, layers, k)`, sorted."""
    logits = model(**inputs, output_router_logits=True).router_logits
    layers = [model.model.language_model.layers[index] for index in model.config.moe_layers]
    biases = [getattr(layer.mlp.gate, "e_score_correction_bias", None) for layer in layers]
    scores = [layer.softmax(dim=-1) + (0 if bias is None else bias) for layer, bias in zip(logits, biases, strict=True)]
    chosen = torch.stack([score.topk(model.config.num_experts_per_tok).indices for score in scores], dim=1)
    return chosen.view(*inputs["input_ids"].shape, *chosen.shape[1:]).sort().values


@pytest.mark.parametrize("case", CASES, ids=name_of)
@torch.no_grad()
def test_answers_in_onnxruntime_are_those_of_torch(exported, rows, case):
    model, processor, folder = exported(case)
    answers = torch_answers(model, processor, rows)
    reader = OnnxStudent(folder, threads=1)
    for size in (1, 3):
        for start in range(0, len(rows), size):
            inputs = inputs_of(processor, rows[start : start + size])
            arrays = {name: value.numpy() for name, value in inputs.items()}
            found, choices = reader.generate(**arrays, max_new_tokens=LENGTH)
            expected = answers[start : start + size]
            assert [row[: len(answer)] for row, answer in zip(found.tolist(), expected, strict=True)] == expected
        # of the last rows: with padding, where there are several
        seen = arrays["attention_mask"].astype(bool)
        assert seen.all() == (size == 1)
        assert_same_logits(torch.tensor(reader.logits(**arrays)[seen]), model(**inputs).logits[torch.tensor(seen)])
        if getattr(model.config, "moe_layers", []):
            prompt = torch.tensor(choices[0]).sort().values
            assert torch.equal(prompt[torch.tensor(seen)], chosen_experts(model, inputs)[torch.tensor(seen)])
            assert len(prompt.unique()) > 2
        else:
            assert choices == []


def transformers_js_answers(folder, rows, job_file, **options):
    modules = transformers_js_or_skip()
    rows = [row | {"image": str(row["image"])} for row in rows]
    job_file.write_text(json.dumps({"rows": rows, "max_new_tokens": LENGTH, **options}))
    script = ROOT / "tests/helpers/transformers_js.mjs"
    ran = subprocess.run(["node", script, modules, folder, job_file], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@torch.no_grad()
def test_answers_in_transformers_js_are_those_of_torch(exported, rows, case, tmp_path):
    model, processor, folder = exported(case)
    assert transformers_js_answers(folder, rows, tmp_path / "rows.json") == torch_answers(model, processor, rows)


# at most as large, of float32's files, and as far off, of the largest logit: what was measured, and some room
LIGHTER = {"fp16": (0.6, 5e-3), "q8": (0.4, 0.2), "q4": (0.3, 0.5)}


@pytest.mark.parametrize("dtype", LIGHTER)
@torch.no_grad()
def test_lighter_weights(exported, rows, dtype, tmp_path):
    import onnx

    model, processor, folder = exported("sparse")
    reader, answers = OnnxStudent(folder, dtype=dtype, threads=1), torch_answers(model, processor, rows)
    size, gap = LIGHTER[dtype]
    files = {kind: [folder / f"onnx/{name}{end}.onnx" for name in GRAPHS] for kind, end in DTYPES.items()}
    weigh = {kind: sum(path.stat().st_size for path in paths) for kind, paths in files.items()}
    assert weigh[dtype] < size * weigh["fp32"]

    same, largest, difference = 0, 0.0, 0.0
    for row, answer in zip(rows, answers, strict=True):
        inputs = inputs_of(processor, [row])
        arrays = {name: value.numpy() for name, value in inputs.items()}
        logits = model(**inputs).logits.numpy()
        largest = max(largest, np.abs(logits).max())
        difference = max(difference, np.abs(reader.logits(**arrays) - logits).max())
        same += reader.generate(**arrays, max_new_tokens=LENGTH)[0][0].tolist() == answer
    assert 1e-5 < difference / largest < gap
    assert same >= (20 if dtype == "fp16" else 17)
    again = transformers_js_answers(folder, rows, tmp_path / "rows.json", dtype=dtype)
    assert sum(found == answer for found, answer in zip(again, answers, strict=True)) >= (20 if dtype == "fp16" else 17)

    graph = onnx.load(folder / f"onnx/decoder_model_merged{DTYPES[dtype]}.onnx").graph
    routers = [tensor for tensor in graph.initializer if tensor.name.endswith(".gate.weight")]
    assert len(routers) == 2 and {tensor.data_type for tensor in routers} == {onnx.TensorProto.FLOAT}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    whole = {name for name, kind in kinds.items() if kind != onnx.TensorProto.FLOAT}
    assert whole == {"attention_mask", "position_ids", "num_logits_to_keep", "expert_choices"}


def test_no_weight_is_stored_or_copied_twice(exported):
    """Files are as large as their parameters, and every matrix product's constant is a matrix of the file."""
    import onnx

    model, _, folder = exported("sparse")
    sizes = {name: (folder / f"onnx/{name}.onnx").stat().st_size for name in GRAPHS}
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    table = 4 * model.get_input_embeddings().weight.numel()  # beside the graph of the head that it is tied to
    assert parameters + table < sum(sizes.values()) < parameters + table + 300_000
    graph = onnx.load(folder / "onnx/decoder_model_merged.onnx").graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    experts = [shape for name, shape in shapes.items() if ".experts." in name]
    assert len(experts) == 2 * 4 * len(model.config.moe_layers) and all(len(shape) == 2 for shape in experts)
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert {node.op_type for node in products} == {"MatMul"}
    assert set(shapes) - {name for node in graph.node for name in node.input} == set()


def test_axes_and_names_are_those_that_transformers_js_reads(exported):
    _, _, folder = exported(("gemma3_text", "all", None))
    reader = OnnxStudent(folder, threads=1)
    decoder = reader.sessions["decoder_model_merged"]
    inputs = {value.name: value.shape for value in decoder.get_inputs()}
    cache = {name: shape for name, shape in inputs.items() if name.startswith("past")}
    assert list(cache) == [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert set(map(tuple, cache.values())) == {("batch_size", 2, "past_sequence_length", 16)}
    assert inputs["num_logits_to_keep"] == [] and inputs["inputs_embeds"][0] == "batch_size"
    outputs = [value.name for value in decoder.get_outputs()]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in cache), "expert_choices"]
    vectors = np.zeros((2, 5, 32), "f4")
    for number, kept in ((0, 5), (1, 1), (3, 3)):
        logits = reader.decode(vectors, np.ones((2, 5), int), reader.empty_cache(2), number)[0]["logits"]
        assert logits.shape[:2] == (2, kept)


def test_configs(exported):
    _, _, folder = exported("sparse")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["model_type"] == "llama" and "auto_map" not in config
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert not list(folder.glob("*.py")) and not list(folder.parent.glob("*.unfinished"))
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == [0, 2, 3, 4, 5]


def test_a_graph_of_more_than_two_gigabytes_has_its_weights_beside_it(tokenizer, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_mod_hf.students.onnx_weights.LARGEST", 100_000)
    model = student_of(tokenizer, "llama", None)
    export_onnx(model, processor, tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    names = {path.name.removesuffix("_data") for path in (tmp_path / "student/onnx").glob("*_data")}
    assert config["transformers.js_config"]["use_external_data_format"] == dict.fromkeys(sorted(names), 1)
    assert "decoder_model_merged.onnx" in names
    assert OnnxStudent(tmp_path / "student").logits(np.zeros((1, 3), int), np.ones((1, 3), int)).shape[:2] == (1, 3)


def test_the_command(exported, tmp_path, capsys):
    model, processor, folder = exported("sparse")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "student")
    argv = ["export", "--model", str(tmp_path / "student"), "--output_dir", str(tmp_path / "onnx"), "--form", "onnx"]
    argv += ["--onnx_dtypes", "fp32", "fp16", "q8", "q4"]
    assert main(argv) == 0, capsys.readouterr().err
    files = {path.relative_to(folder) for path in folder.rglob("*")}
    assert {path.relative_to(tmp_path / "onnx") for path in (tmp_path / "onnx").rglob("*")} == files
    graphs = [(path / "onnx/decoder_model_merged.onnx").read_bytes() for path in (folder, tmp_path / "onnx")]
    assert graphs[0] == graphs[1]
    assert main(argv) == 2
    assert "is there already: give a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("dtypes", [[], ["q5"], ["q8", "q8"]])
def test_kinds_of_weights_are_checked(make_student, processor, tmp_path, dtypes):
    with pytest.raises(ValueError, match="give one or more of fp32, fp16, q8, q4, each once"):
        export_onnx(make_student(), processor, tmp_path / "new", dtypes=dtypes)


def test_what_cannot_be_exported_is_refused(exported, make_student, tokenizer, processor, tmp_path, monkeypatch):
    def refused(message, model, its_processor=processor):
        with pytest.raises(ValueError, match=message):
            export_onnx(model, its_processor, tmp_path / "new")
        assert list(tmp_path.iterdir()) == []

    student = make_student()
    refused("in torch.bfloat16: load them in float32", make_student().to(torch.bfloat16))
    refused(
        "The processor is a .*Siglip.*: give the one that the student was saved with",
        student,
        processor.image_processor,
    )
    padded = tiny.make_processor(tokenizer)
    padded.image_processor = LlavaImageProcessorPil(size={"shortest_edge": 64}, crop_size=64)
    refused("The image processor is a LlavaImageProcessor", student, padded)
    student.config.text_config.model_type = "minicpm3"
    refused("is of the family `minicpm3`, and transformers.js loads LLaVAs of llama", student)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    refused(r"of which onnxscript is not installed: run `pip install llava-mod-hf\[onnx\]`", make_student())


def test_families_have_the_names_of_transformers():
    assert set(FAMILIES) <= set(CONFIG_MAPPING)


def test_the_command_line_does_not_wait_for_onnx():
    """Nobody who exports nothing needs the libraries, and no command imports them before it has to."""
    code = "import sys, llava_mod_hf.commands.export; print([n for n in ('onnx', 'onnxruntime') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == "[]"
