"""
What vLLM's transformers backend reads of a student, clause by clause and without vLLM.

Each test is one clause. The students are saved and read back, as a server has them; docs/deployment.md names vLLM's
version.
"""

import contextlib
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from torch import fx, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, Qwen2Config, Qwen2ForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

from helpers.build_cases import ENCODERS, LANGUAGE_MODEL, save
from helpers.models import FAMILIES, assert_same_logits, make_dense, moe_blocks
from helpers.vllm_stand_in import Served
from llava_mod_hf import build_student, upcycle
from llava_mod_hf.fingerprints import processor_parts
from llava_mod_hf.model.modeling_llava_mod import logit_transform
from llava_mod_hf.students.conversion import _vision
from llava_mod_hf.students.router_bias import add_router_bias, router_biases
from llava_mod_hf.students.vision_layout import vision_config_of

# encoder, and what `upcycle` is told; CLIP's students have a language model whose head is not tied
CASES = {
    "clip-dense": ("clip", None),
    "clip-sparse": ("clip", {}),
    "siglip-dense": ("siglip", None),
    "siglip-sparse": ("siglip", {}),
    "siglip-residual": ("siglip", {"use_residual": True}),
    "siglip-top-1": ("siglip", {"num_experts_per_tok": 1}),
    "clip-low-rank": ("clip", {"expert_rank": 3}),
    "siglip-router-bias": ("siglip", {}),
}
SIZES = {"square": (64, 64), "wide": (90, 30), "tall": (30, 90), "large": (700, 400), "one pixel": (1, 1)}


def picture(size):
    return Image.effect_noise(size, 80).convert("RGB")


@pytest.fixture(scope="module", autouse=True)
def own_classes():
    """What loads with a student's code stays in transformers' tables: the package's classes are put back."""
    known = (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    tables = [mapping._extra_content for mapping in known]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("clip", "siglip")}
    return {name: save(folder, ENCODERS[name][0](), ENCODERS[name][1]) for name, folder in folders.items()}


@pytest.fixture(scope="module", params=CASES)
def student(request, towers, tokenizer, tmp_path_factory):
    """A saved student of the case: `folder`, and the `model` and `processor` that were saved."""
    tower, experts = CASES[request.param]
    torch.manual_seed(0)
    language_model = {"language_model": LANGUAGE_MODEL}
    if tower == "clip":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.3)
        language_model = {"language_model": Qwen2ForCausalLM(config), "tokenizer": tokenizer}
    model, processor = build_student(towers[tower], **language_model)
    if experts is not None:
        model = upcycle(model, layers="alternate", num_experts=4, **experts)
        with torch.no_grad():
            for block in moe_blocks(model):
                for parameter in (*block.experts.parameters(), *block.gate.parameters()):
                    parameter.normal_(std=0.3)
            if "bias" in request.param:
                add_router_bias(model)
                for bias in router_biases(model):
                    bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return SimpleNamespace(
        folder=folder, model=model.eval(), sparse=experts is not None, low_rank="low" in request.param
    )


@pytest.fixture(scope="module")
def processor(student):
    return AutoProcessor.from_pretrained(student.folder)


@pytest.fixture(scope="module")
def served(student):
    return Served(student.folder)


# The class


def test_the_class_is_found_and_says_that_it_takes_another_attention(student):
    config = AutoConfig.from_pretrained(student.folder)
    assert not hasattr(transformers, config.architectures[0])  # so vLLM looks at `auto_map`
    name = next(name for name in config.auto_map if name.startswith("AutoModel"))
    assert name == "AutoModel"  # it takes the first, and the one without a head is the one that it wraps
    assert list(config.auto_map).index("AutoConfig") < list(config.auto_map).index("AutoModel")
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], student.folder)
    assert model_class.is_backend_compatible()
    assert model_class._supports_attention_backend


def test_decoder_and_encoder_are_found_and_their_classes_last(student):
    config = AutoConfig.from_pretrained(student.folder)
    with torch.device("meta"):
        first, second = AutoModel.from_config(config), AutoModel.from_config(config)
    # vLLM decorates the class that it finds in one model for the next one that it makes
    assert type(first.get_decoder()) is type(second.get_decoder())
    assert first.get_decoder() is first.language_model
    assert first.get_encoder(modality="image") is first.vision_tower
    assert type(first.vision_tower) not in (type(first), type(first.language_model))
    dynamic = {"input_ids", "inputs_embeds", "position_ids"}
    assert dynamic <= set(inspect.signature(type(first.get_decoder()).forward).parameters)


def test_plans_name_the_linear_layers_of_the_decoder(served):
    plan = served.model.tp_plan
    layers = {name: part for name, part in served.model.get_decoder().named_modules() if isinstance(part, nn.Linear)}
    # what stands beside the experts is computed whole by every process
    layers = {name: part for name, part in layers.items() if not re.search("coefficient|residual_mlp|shared", name)}
    assert layers
    for name in layers:
        styles = [style for rule, style in plan.items() if re.match(rule, f"language_model.{name}")]
        assert styles[:1] == ["rowwise" if re.search("o_proj|down_proj", name) else "colwise"]
    assert served.model.supports_pp_plan
    stages = [served.model.get_submodule(name) for name in served.model._pp_plan]
    assert [isinstance(stage, nn.ModuleList) for stage in stages] == [False, True, False]


# The config


def test_the_config_tells_what_the_server_sizes_its_layers_by(student):
    config = AutoConfig.from_pretrained(student.folder)
    text_config = config.get_text_config()
    assert config != text_config  # so it is a multimodal one
    assert text_config.vocab_size == student.model.get_input_embeddings().num_embeddings
    head, embeddings = student.model.lm_head.weight, student.model.get_input_embeddings().weight
    # vLLM ties the head if either says so
    assert text_config.tie_word_embeddings == config.tie_word_embeddings == (head.data_ptr() == embeddings.data_ptr())
    names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    counts = [getattr(text_config, name) for name in names if getattr(text_config, name, None) is not None]
    assert counts == ([4] if student.sparse else [])
    for block in moe_blocks(student.model):
        assert block.gate.top_k == text_config.num_experts_per_tok
        assert not hasattr(text_config, "moe_intermediate_size")
        if not student.low_rank:
            assert tuple(block.experts.down_proj.shape[1:]) == (text_config.hidden_size, text_config.intermediate_size)


# The weights


def test_every_weight_has_a_place_and_every_place_a_weight(student, served):
    assert served.unexpected == served.missing == set()
    # packed experts are vLLM's then; low-rank ones, whose FFN they share is no packed one, stay the model's
    assert len(served.fused) == (2 if student.sparse and not student.low_rank else 0)


def test_transformers_renames_no_weight_of_the_file(student, served):
    names = list(student.model.state_dict())
    for rule in get_model_conversion_mapping(served.model):
        if isinstance(rule, WeightRenaming):  # vLLM applies these, and none of the others
            assert [rule.rename_source_key(name)[0] for name in names] == names


# The forward pass


def placeholders(processor, size, text="what is here? <image> and here?"):
    """A prompt's tensors, and where its placeholders are."""
    inputs = processor(text=text, images=[picture(size)], return_tensors="pt")
    (places,) = (inputs["input_ids"] == processor.image_token_id).nonzero(as_tuple=True)[1:]
    return inputs, [(places[0].item(), len(places))]


def test_with_the_servers_attention_and_experts_the_logits_are_the_same(student, served, processor):
    inputs, places = placeholders(processor, SIZES["wide"])
    logits = served(inputs["input_ids"][0], inputs["pixel_values"], places)
    assert [attention.calls for attention in served.attention_instances.values()] == [1, 1, 1]
    with torch.no_grad():
        assert_same_logits(logits, student.model(**inputs).logits[0])


def test_experts_are_called_by_position_with_the_gates_of_the_router(student, served, processor):
    calls = []
    hooks = [experts.register_forward_pre_hook(lambda _, args: calls.append(args)) for experts in served.fused.values()]
    inputs, places = placeholders(processor, SIZES["tall"])
    served(inputs["input_ids"][0], inputs["pixel_values"], places)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(served.fused)
    top_k = served.config.num_experts_per_tok
    for hidden_states, index, weights in calls:
        assert hidden_states.shape == (inputs["input_ids"].shape[1], served.config.text_config.hidden_size)
        assert index.shape == weights.shape == (len(hidden_states), top_k)
        assert index.dtype == torch.int64
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))


def test_the_server_leaves_the_routing_to_the_router(student):
    """
    vLLM would route by itself if it saw `topk(softmax(linear))` in a router whose state is `weight` alone: with one
    expert a token its gate is then not 1.
    """
    for block in moe_blocks(student.model):
        if list(block.gate.state_dict()) != ["weight"]:
            assert list(block.gate.state_dict()) == ["weight", "e_score_correction_bias"]
            continue
        tracer = fx.Tracer()
        with contextlib.suppress(Exception):  # the graph up to there is what vLLM looks at
            tracer.trace(block.gate)
        assert not [node for node in tracer.graph.nodes if "topk" in str(node.target)]


@pytest.mark.slow
def test_the_decoder_compiles_into_one_graph(served, student, processor):
    decoder = served.model.get_decoder()
    inputs, places = placeholders(processor, SIZES["square"])
    expected = served(inputs["input_ids"][0], inputs["pixel_values"], places)
    decoder.forward = torch.compile(decoder.forward, backend="eager", fullgraph=True)
    try:
        torch.testing.assert_close(served(inputs["input_ids"][0], inputs["pixel_values"], places), expected)
    finally:
        del decoder.forward


def test_features_come_as_one_entry_per_picture(student, served, processor):
    pictures = [picture(SIZES[name]) for name in ("square", "wide", "tall")]
    inputs = processor(text="<image>" * 3, images=pictures, return_tensors="pt")
    features = list(served.model.get_image_features(inputs["pixel_values"]).pooler_output)
    count = processor._get_num_multimodal_tokens(image_sizes=[(1, 1)])["num_image_tokens"]
    assert [tuple(entry.shape) for entry in features] == [(*count, served.config.text_config.hidden_size)] * 3


# The processor


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_tokens_that_are_counted_are_the_tokens_that_are_made(student, processor, size):
    counted = processor._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])] * 2)  # height first
    made = processor(
        text="<image> and <image>",
        images=[picture(size)] * 2,
        return_text_replacement_offsets=True,  # transformers 5.15 and newer
        return_mm_token_type_ids=True,  # before
        return_tensors="pt",
    )
    offsets = made.pop("text_replacement_offsets")[0]
    assert [entry["type"] for entry in offsets] == ["image", "image"]
    encoded = [processor.tokenizer.encode(entry["replacement"], add_special_tokens=False) for entry in offsets]
    assert [len(tokens) for tokens in encoded] == counted["num_image_tokens"]
    assert {token for tokens in encoded for token in tokens} == {processor.image_token_id}
    assert made["mm_token_type_ids"].eq(1).sum() == sum(counted["num_image_tokens"])
    assert sum(counted["num_image_tokens"]) == 2 * student.model.config.image_seq_length
    # everything but the words is cut into as many rows as there are pictures
    fields = set(made) - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    assert fields == {"pixel_values"}
    assert len(made["pixel_values"]) == sum(counted["num_image_patches"])


def test_a_picture_of_any_size_has_the_tokens_that_memory_is_measured_with(processor):
    sizes = [(10_000, 10_000)]
    size = processor.image_processor.size
    if size.get("height"):
        sizes.append((size["height"], size["width"]))
    assert len(set(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])) == 1


def test_the_processor_names_its_placeholder_and_no_other_kind_of_input(student, processor):
    assert processor.tokenizer.encode(processor.image_token, add_special_tokens=False) == [processor.image_token_id]
    assert processor.image_token_id == student.model.config.image_token_index
    for other in ("video_processor", "audio_processor", "feature_extractor"):
        assert getattr(processor, other, None) is None


# What is mended for it


def test_the_size_that_is_told_changes_no_pixel_and_no_fingerprint(towers, tokenizer):
    _, processor = build_student(towers["siglip"], LANGUAGE_MODEL)
    plain = ENCODERS["siglip"][1]
    assert plain.crop_size is None and processor.image_processor.crop_size == {"height": 64, "width": 64}
    image = picture((90, 30))
    assert torch.equal(
        *(
            torch.as_tensor(p(images=image, return_tensors="pt")["pixel_values"])
            for p in (plain, processor.image_processor)
        )
    )
    before = processor_parts(processor)
    processor.image_processor.crop_size = None
    assert processor_parts(processor) == before
    processor.image_processor.do_center_crop = True  # then it is what is cropped
    prints = []
    for side in (32, 64):
        processor.image_processor.crop_size = {"height": side, "width": side}
        prints.append(processor_parts(processor)["image_processor"])
    assert len({*prints, before["image_processor"]}) == 3


def test_a_converted_siglip_that_pads_keeps_its_size(towers):
    """LLaVA's own image processor crops at 224 unless it is told a size."""
    layout = SimpleNamespace(feature_layer=-1, select_strategy="full", pad_to_square=True)
    config = vision_config_of(AutoConfig.from_pretrained(towers["siglip"]))
    image_processor, _ = _vision(config, towers["siglip"], layout)
    assert image_processor(images=picture((90, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_the_server_would_compute_otherwise_are_refused(family, tmp_path):
    student = upcycle(make_dense(family), layers="all")
    student.save_pretrained(tmp_path)
    if family not in ("gemma2", "gemma3_text", "phi", "phi3"):
        served = Served(tmp_path)
        assert served.unexpected == served.missing == set()
        return
    with pytest.raises(ValueError, match="vLLM's transformers backend computes experts of gate_proj/up_proj/down_proj"):
        Served(tmp_path)
    AutoModel.from_pretrained(tmp_path)  # elsewhere they are no trouble


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "granite"])
def test_what_follows_the_head_is_read_by_its_name(family):
    text_config = make_dense(family).config.text_config
    by_name = getattr(text_config, "logit_scale", 1.0), getattr(text_config, "final_logit_softcapping", None)
    assert logit_transform(text_config) == by_name
