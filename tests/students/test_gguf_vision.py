"""Pictures in llama.cpp: it answers as the student does, by encoder and adaptor of the second file."""

import re

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, SiglipImageProcessorPil, SiglipVisionConfig

from helpers import llama_cpp, tiny
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, export_gguf, load_model_and_processor
from llava_mod_hf.data import scene_rows
from llava_mod_hf.students.gguf_vision import check_vision, layers_read

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"image_size": 32, "patch_size": 8}

ENCODERS = {
    "clip": (CLIPVisionConfig, {"vision_feature_layer": -2}),
    "clip, the last layer": (CLIPVisionConfig, {"vision_feature_layer": -1}),
    "clip with gelu": (CLIPVisionConfig, {"vision_feature_layer": 1, "hidden_act": "gelu"}),
    "siglip": (SiglipVisionConfig, {"vision_feature_layer": -1}),
    "siglip, an earlier layer": (SiglipVisionConfig, {"vision_feature_layer": -2}),
}


def processors(kind, size, resize=None):
    if kind is CLIPVisionConfig:
        return CLIPImageProcessorPil(size={"shortest_edge": resize or size}, crop_size={"height": size, "width": size})
    return SiglipImageProcessorPil(size={"height": resize or size, "width": resize or size})


def make(tokenizer, name, **fields):
    """A random sparse student behind that encoder, and its processor."""
    kind, of_encoder = ENCODERS[name]
    fields = of_encoder | fields
    text = tiny.make_student(tokenizer).config.text_config.to_dict()
    values = {part: fields.pop(part) for part in list(fields) if part.startswith(("vision_f", "proj", "multi"))}
    clip = kind is CLIPVisionConfig
    values.setdefault("vision_feature_select_strategy", "default" if clip else "full")
    resize = fields.pop("resize", None)
    vision = kind(**SIZES | fields)
    config = LlavaModConfig(vision_config=vision, text_config=text, image_token_index=2, image_seq_length=16, **values)
    generator = torch.Generator().manual_seed(0)
    student = LlavaModForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.25, generator=generator)
    processor = tiny.make_processor(tokenizer, image_size=32, patch_size=8)
    processor.image_processor = processors(kind, 32, resize)
    processor.num_additional_image_tokens = int(clip)
    processor.vision_feature_select_strategy = values["vision_feature_select_strategy"]
    return student, processor


def pictures():
    """Square ones, some to be made smaller or larger."""
    generator = torch.Generator().manual_seed(0)
    for size in (32, 32, 57, 100, 20):
        cells = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
        yield Image.fromarray(cells.numpy()).resize((size, size), Image.Resampling.BILINEAR)


@torch.no_grad()
def compare(student, processor, rows, answers):
    """The largest difference of a probability, and how many different answers there were; they have to be equal."""
    gaps, words = [], set()
    for (prompt, picture), (tokens, probabilities) in zip(rows, answers, strict=True):
        inputs = processor(text=prompt, images=[picture], return_tensors="pt")
        expected = student.generate(**inputs, max_new_tokens=len(tokens), do_sample=False)
        assert expected[0, inputs["input_ids"].shape[1] :].tolist() == tokens, prompt
        logits = student(**inputs).logits[0, -1].double()
        gaps.append((logits.softmax(-1) - torch.tensor(probabilities, dtype=torch.float64)).abs().max().item())
        words.add(tuple(tokens))
    return max(gaps), len(words)


@pytest.mark.parametrize("name", ENCODERS)
def test_llama_cpp_sees_what_the_student_sees(tokenizer, tmp_path, name):
    llama_cpp.package()
    student, processor = make(tokenizer, name)
    files = export_gguf(student, processor, tmp_path, gguf_type="f32")
    rows = [(f"<|user|><image>{text}<|assistant|>", picture) for picture in pictures() for text in ("what?", "is it?")]
    gap, different = compare(student, processor, rows, llama_cpp.picture_answers(files, rows, tmp_path, steps=4))
    assert different > 5
    assert gap < 5e-4


def test_llama_cpp_answers_to_scenes_as_the_teacher_does(tmp_path):
    llama_cpp.package()
    model, processor = load_model_and_processor("embedded:scenes-teacher")
    files = export_gguf(model.eval(), processor, tmp_path, gguf_type="f32")
    kinds = ("presence", "count", "color", "describe")
    rows = [
        (f"<|user|><image>{row['prompt'][0]['content']}<|assistant|>", row["images"][0])
        for kind in kinds
        for row in scene_rows.load(kind, "test").select(range(5))
    ]
    gap, different = compare(model, processor, rows, llama_cpp.picture_answers(files, rows, tmp_path))
    assert different >= 10
    assert gap < 5e-4


def test_types_of_the_encoder(tokenizer, tmp_path):
    gguf = llama_cpp.package()
    student, processor = make(tokenizer, "clip")
    for gguf_type, expected in (("f16", "F16"), ("q4_0", "Q8_0")):
        _, path = export_gguf(student, processor, tmp_path / gguf_type, gguf_type=gguf_type)
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        kept = {"v.patch_embd.weight", "v.position_embd.weight"}
        assert {types.pop(name) for name in kept} == {"F32"}
        assert {kind for name, kind in types.items() if name.endswith(".weight") and "ln" not in name} == {expected}
        assert not [
            name for name in types if name.startswith(("v.blk.2", "v.post_ln"))
        ]  # behind the layer that is read


def test_what_comes_behind_the_layer_is_found_out(tokenizer):
    assert layers_read(make(tokenizer, "clip")[0]) == (2, False)
    assert layers_read(make(tokenizer, "clip with gelu")[0]) == (1, False)
    assert layers_read(make(tokenizer, "siglip")[0])[0] == 3


def test_what_releases_of_llama_cpp_do_to_clip_is_said(tokenizer, caplog):
    check_vision(*make(tokenizer, "siglip"))
    assert not caplog.messages
    check_vision(*make(tokenizer, "clip"))
    assert "github.com/ggml-org/llama.cpp/pull/25844" in caplog.messages[0]


REFUSED = [
    ("clip", {"vision_feature_select_strategy": "full"}, "reads the features `full`"),
    ("siglip", {"vision_feature_select_strategy": "default"}, "reads the features `default`"),
    ("clip", {"vision_feature_layer": [-2, -1]}, "several layers of its encoder, [-2, -1]"),
    ("clip", {"hidden_act": "silu"}, "the activation silu in its encoder"),
    ("clip", {"projector_hidden_act": "silu"}, "the activation silu in its adaptor"),
    ("clip", {"multimodal_projector_bias": False}, "an adaptor without biases"),
    ("clip", {"intermediate_size": 64}, "as wide as its FFNs"),
    ("clip", {"resize": 48}, "to [32, 48] for an encoder of 32"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_an_encoder_that_llama_cpp_would_compute_otherwise_is_refused(tokenizer, name, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_vision(*make(tokenizer, name, **fields))


def test_other_encoders_and_filters_are_refused(tokenizer):
    student, processor = make(tokenizer, "siglip")
    processor.image_processor.resample = Image.Resampling.BILINEAR
    with pytest.raises(ValueError, match="another filter than the bicubic one"):
        check_vision(student, processor)
    student.config.vision_config.model_type = "dinov2"
    with pytest.raises(ValueError, match="the encoder dinov2"):
        check_vision(student, processor)
