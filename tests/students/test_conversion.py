"""Checkpoints of the authors' layout: every weight finds its place, and the student computes what that layout means."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from helpers.authors_layout import (
    END,
    KINDS,
    SPARSE,
    SYSTEM,
    assert_computes_the_layout,
    config_values,
    edit_config,
    moe_fields,
    picture,
    text_shapes,
    vision_shapes,
)
from helpers.models import image_batch, stock_twin
from llava_mod_cli import main
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.conversion import convert_checkpoint, place_weights
from llava_mod_hf.students.conversion_layouts import read_layout
from llava_mod_hf.students.stock_export import empty_model


@pytest.mark.parametrize("moe", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_layout(make_checkpoint, plain_tokenizer, kind, moe):
    folder, values, state = make_checkpoint(kind, moe=moe)
    model, _, prompt = assert_computes_the_layout(folder, kind, values, state, plain_tokenizer)
    assert prompt == f"{SYSTEM} USER: <image>\nwhat? ASSISTANT:"
    assert model.config.moe_layers == ([0, 2] if moe else [])
    if moe:
        assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 2)
        assert model.config.router_aux_loss_coef == 0.02


def test_tied_embeddings_in_one_safetensors_file(make_checkpoint, plain_tokenizer):
    folder, values, state = make_checkpoint("qwen2", moe=SPARSE, tie_word_embeddings=True, safetensors=True)
    model, *_ = assert_computes_the_layout(folder, "qwen2", values, state, plain_tokenizer)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_llava_1_5_with_its_own_names(make_checkpoint, plain_tokenizer):
    folder, values, state = make_checkpoint("llama", lineage="llava")
    values["model_type"] = "llava"
    values["mm_vision_tower"] = values.pop("mm_image_tower")
    values["mm_projector_type"] = values.pop("image_projector_type")
    del values["image_aspect_ratio"]
    (folder / "config.json").write_text(json.dumps(values))
    assert_computes_the_layout(folder, "llama", values, state, plain_tokenizer, lineage="llava", pad=False)


def test_without_its_own_tower_the_named_one_is_loaded(make_checkpoint, plain_tokenizer, tower_folder):
    folder, values, state = make_checkpoint("qwen2", own_tower=False)
    tower = CLIPVisionModel.from_pretrained(tower_folder).state_dict()
    state |= {f"model.image_tower.image_tower.vision_model.{name}": value for name, value in tower.items()}
    assert_computes_the_layout(folder, "qwen2", values, state, plain_tokenizer)


def test_the_dense_ffn_beside_the_experts(make_checkpoint, plain_tokenizer):
    folder, values, state = make_checkpoint("qwen2", moe=moe_fields([1], experts=3, residual=True))
    model, *_ = assert_computes_the_layout(folder, "qwen2", values, state, plain_tokenizer)
    assert model.config.use_residual


def test_tokens_without_a_row_get_the_mean_one(make_checkpoint, plain_tokenizer):
    rows = len(plain_tokenizer)
    folder, values, state = make_checkpoint("phi", vocab_size=rows, moe=SPARSE)
    model, processor, _ = assert_computes_the_layout(folder, "phi", values, state, plain_tokenizer)
    assert model.config.image_token_index == rows == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.text_config.vocab_size == rows + 1
    for name, module in (("lm_head", model.lm_head), ("model.embed_tokens", model.get_input_embeddings())):
        torch.testing.assert_close(module.weight[rows], state[f"{name}.weight"].mean(0))
    assert rows in model.generation_config.suppress_tokens


def test_saved_and_loaded_by_the_command(make_checkpoint, tmp_path, tower_folder, plain_tokenizer):
    folder, *_ = make_checkpoint("stablelm", moe=SPARSE)
    assert main(["convert", "--checkpoint", str(folder), "--output_dir", str(tmp_path / "student")]) == 0
    expected, _ = convert_checkpoint(str(folder))
    model, processor = load_model_and_processor(str(tmp_path / "student"))
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # what follows an answer is what the template writes after it
    assert processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == ["<|endoftext|>"]
    assert str(tower_folder) not in "".join(path.read_text() for path in (tmp_path / "student").glob("*.json"))


# Memory without the pages of the mapped files; in a process of its own, whose allocator has nothing to reuse.
MEMORY = """
import sys, threading
from llava_mod_hf.students.conversion import convert_checkpoint
def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
before, seen, done = own(), [], threading.Event()
def watch():
    while not done.wait(0.002):
        seen.append(own())
thread = threading.Thread(target=watch)
thread.start()
converted = convert_checkpoint(sys.argv[1])
done.set()
thread.join()
print(max(*seen, own()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.slow
def test_the_weights_are_never_twice_in_memory(make_checkpoint):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 4000}
    folder, _, state = make_checkpoint("qwen2", moe=moe_fields([0, 1, 2], experts=8), **sizes)
    size = sum(value.nbytes for value in state.values())
    process = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert 0.9 * size < int(process.stdout.split()[-1]) < 1.3 * size


# Prompts


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_prompts_are_those_of_the_layout(make_checkpoint, kind):
    _, processor = convert_checkpoint(str(make_checkpoint(kind)[0]))
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    end = END[kind]
    rounds = f"USER: <image><image>\nWhich? ASSISTANT: Both.{end}USER: Sure? ASSISTANT: Yes.{end}"
    assert processor.apply_chat_template(messages) == f"{SYSTEM} {rounds}"
    prompt = processor.apply_chat_template(messages[:3], add_generation_prompt=True)
    assert f"{SYSTEM} {rounds}" == f"{prompt} Yes.{end}"
    system = [{"role": "system", "content": "Be brief."}, *messages[2:]]
    assert processor.apply_chat_template(system) == f"Be brief. USER: Sure? ASSISTANT: Yes.{end}"


def test_the_template_marks_what_the_assistant_says(make_checkpoint):
    _, processor = convert_checkpoint(str(make_checkpoint("qwen2")[0]))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens = processor.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [id for id, mask in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mask]
    assert processor.tokenizer.decode(said) == " b<|endoftext|>"


def test_every_option_has_its_effect(make_checkpoint, tmp_path, tower_folder, plain_tokenizer):
    folder, *_ = make_checkpoint("qwen2", own_tower=False)
    edit_config(folder, mm_image_tower=str(tmp_path / "gone"))
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    other = PreTrainedTokenizerFast(tokenizer_object=plain_tokenizer.backend_tokenizer, eos_token="</s>", pad_token="q")
    other.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="/gone` could not be loaded"):
        convert_checkpoint(str(folder))

    model, processor = convert_checkpoint(str(folder), vision_tower=str(tower_folder), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "<|endoftext|>" in processor.chat_template
    model, processor = convert_checkpoint(str(folder), vision_tower=str(tower_folder), conversation="v1")
    assert "</s>" in processor.chat_template
    ends = processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert ends == ["</s>", "<|endoftext|>"]
    model, processor = convert_checkpoint(
        str(folder),
        vision_tower=str(tower_folder),
        chat_template_path=str(template),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    assert processor.chat_template == processor.tokenizer.chat_template == template.read_text()
    assert processor.tokenizer.eos_token == "</s>"
    assert processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == ["</s>"]


def test_the_first_token_of_the_encoder_can_be_kept(make_checkpoint):
    folder, *_ = make_checkpoint("qwen2")
    edit_config(folder, mm_vision_select_feature="cls_patch", mm_vision_select_layer=-1)
    model, processor = convert_checkpoint(str(folder))
    inputs = processor(text="<image>", images=picture(), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 5  # 4 patches and one more
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    assert model.config.vision_feature_layer == -1


@pytest.mark.parametrize("text_model_type", ["llama", "gemma2", "phi"])
def test_stock_llava(make_student, processor, tmp_path, text_model_type):
    dense = make_student(moe_layers=[], text_model_type=text_model_type)
    values = {name: value for name, value in dense.config.to_dict().items() if name not in ("model_type", "auto_map")}
    stock = LlavaForConditionalGeneration(LlavaConfig(**values)).eval()
    torch.manual_seed(0)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # logits that a softcap would change
    stock.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, found = convert_checkpoint(str(tmp_path))
    assert isinstance(model, LlavaModForConditionalGeneration)
    assert found.chat_template == processor.chat_template
    inputs = image_batch(processor, ["is there a red circle?"])
    with torch.no_grad():
        expected = stock(**inputs).logits
        assert expected.abs().max() > 5
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)


def test_stock_llava_brings_its_own_parts(make_student, processor, tmp_path):
    stock_twin(make_student(moe_layers=[])).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    model, found = convert_checkpoint(str(tmp_path), chat_template_path=str(template), dtype="bfloat16")
    assert found.chat_template == "{{ messages }}"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="brings its own parts: leave out conversation"):
        convert_checkpoint(str(tmp_path), conversation="v1")
    state = load_file(tmp_path / "model.safetensors")
    missing = next(name for name in state if name.endswith("layers.1.mlp.up_proj.weight"))
    del state[missing]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit its config: missing .*layers\.1\.mlp\.up_proj\.weight"):
        convert_checkpoint(str(tmp_path))
    edit_config(tmp_path, model_type="llava_next")
    with pytest.raises(ValueError, match="`model_type` 'llava_next': of stock models give a `llava`"):
        convert_checkpoint(str(tmp_path))


# Real sizes

CLIP_L_336 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
REAL = {
    "qwen2-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, {"tie_word_embeddings": True}),
    "qwen2-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, {"tie_word_embeddings": True}),
    "qwen1.5-1.8b": ("qwen1_5", 2048, 5504, 24, 16, 16, 151936, {}),
    "vicuna-7b": ("llama", 4096, 11008, 32, 32, 32, 32000, {}),
    "stablelm-2-1.6b": ("stablelm", 2048, 5632, 24, 32, 32, 100352, {"rope_pct": 0.25, "use_qkv_bias": True}),
    "phi-2": ("phi", 2560, 10240, 32, 32, 32, 51200, {"partial_rotary_factor": 0.4}),
}


def real_values(name, sparse):
    kind, width, size, layers, heads, key_heads, vocabulary, extra = REAL[name]
    sizes = dict(
        hidden_size=width,
        intermediate_size=size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
    )
    return config_values(kind, sizes, moe=moe_fields(list(range(0, layers, 2))) if sparse else None, **extra)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", REAL)
def test_every_weight_of_the_real_sizes_has_a_place(name, sparse):
    values = real_values(name, sparse)
    layout = read_layout(values, name)
    text_config = CONFIG_MAPPING[layout.family.text_model_type](**layout.text_config)
    config = LlavaModConfig(vision_config=CLIPVisionConfig(**CLIP_L_336), text_config=text_config)
    with torch.device("meta"):
        model = empty_model(LlavaModForConditionalGeneration, config)
    shapes = text_shapes(REAL[name][0], values) | vision_shapes(CLIP_L_336, values["hidden_size"])
    slots = place_weights(model, shapes, layout)
    assert slots.keys() == shapes.keys()
    numbers = sum(math.prod(shape) for shape in shapes.values())
    biases = sum(value.numel() for key, value in model.named_parameters() if key == "lm_head.bias")
    assert numbers == sum(parameter.numel() for parameter in model.parameters()) - biases
