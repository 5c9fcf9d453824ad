"""Checkpoints of the authors' layout: every weight finds its place, and the student computes what that layout means."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from helpers.models import image_batch, stock_twin
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.cli import main
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.conversion import convert_checkpoint, place_weights
from llava_mod_hf.students.conversion_layouts import read_layout
from llava_mod_hf.students.stock_export import empty_model

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
TOWER = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=8,
)
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "qwen2": {**TINY, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"},
    "llama": {**TINY, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
    "stablelm": {
        **TINY,
        "num_key_value_heads": 4,
        "norm_eps": 1e-5,
        "rope_pct": 0.5,
        "rope_theta": 10000,
        "use_qkv_bias": True,
        "hidden_act": "silu",
    },
    "phi": {**TINY, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 1e4, "hidden_act": "gelu_new"},
}
END = {"qwen2": "<|endoftext|>", "llama": "</s>", "stablelm": "<|endoftext|>", "phi": "<|endoftext|>"}


# The layout, as its repository's modules name their parameters


def ffn_shapes(kind, prefix, width, size):
    if kind == "phi":
        shapes = {"fc1.weight": (size, width), "fc1.bias": (size,), "fc2.weight": (width, size), "fc2.bias": (width,)}
    else:
        shapes = {"gate_proj.weight": (size, width), "up_proj.weight": (size, width), "down_proj.weight": (width, size)}
    return {prefix + name: shape for name, shape in shapes.items()}


def text_shapes(kind, values):
    width, size, heads = (values[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    key_width = width // heads * values.get("num_key_value_heads", heads)
    bias = {"qwen2": "qkv", "qwen1_5": "qkv", "stablelm": "qkv", "phi": "qkvd", "llama": ""}[kind]
    norms = {"phi": ["input_layernorm"]}.get(kind, ["input_layernorm", "post_attention_layernorm"])
    final = "final_layernorm" if kind == "phi" else "norm"
    suffixes = ["weight", "bias"] if kind in ("phi", "stablelm") else ["weight"]
    moe = values.get("moe") or {"moe_layers_idx": []}
    shapes = {"model.embed_tokens.weight": (values["vocab_size"], width)}
    for layer in range(values["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        for name, rows in (("q_proj", width), ("k_proj", key_width), ("v_proj", key_width)):
            shapes[f"{start}self_attn.{name}.weight"] = (rows, width)
            if name[0] in bias:
                shapes[f"{start}self_attn.{name}.bias"] = (rows,)
        output = "dense" if kind == "phi" else "o_proj"
        shapes[f"{start}self_attn.{output}.weight"] = (width, width)
        if "d" in bias:
            shapes[f"{start}self_attn.{output}.bias"] = (width,)
        shapes |= {f"{start}{norm}.{suffix}": (width,) for norm in norms for suffix in suffixes}
        if layer not in moe["moe_layers_idx"]:
            shapes |= ffn_shapes(kind, f"{start}mlp.", width, size)
            continue
        experts = moe["num_experts"][0]
        shapes[f"{start}mlp.deepspeed_moe.gate.wg.weight"] = (experts, width)
        for expert in range(experts):
            prefix = f"{start}mlp.deepspeed_moe.experts.deepspeed_experts.{expert}."
            shapes |= ffn_shapes(kind, prefix, width, size)
        if moe["use_residual"]:
            shapes |= ffn_shapes(kind, f"{start}mlp.mlp.", width, size)
            shapes |= {f"{start}mlp.coefficient.weight": (2, width), f"{start}mlp.coefficient.bias": (2,)}
    shapes |= {f"model.{final}.{suffix}": (width,) for suffix in suffixes}
    if not values.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (values["vocab_size"], width)
    return shapes


def vision_shapes(values, text_width, *, lineage="moe"):
    """Of CLIP and of the adaptor; LLaVA-1.5's own names with `lineage="llava"`."""
    width, size = values["hidden_size"], values["intermediate_size"]
    patch, tokens = values["patch_size"], (values["image_size"] // values["patch_size"]) ** 2 + 1
    tower = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (tokens, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(values["num_hidden_layers"]):
        start = f"encoder.layers.{layer}."
        norms += [f"{start}layer_norm1", f"{start}layer_norm2"]
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            tower |= {f"{start}self_attn.{name}.weight": (width, width), f"{start}self_attn.{name}.bias": (width,)}
        tower |= {f"{start}mlp.fc1.weight": (size, width), f"{start}mlp.fc1.bias": (size,)}
        tower |= {f"{start}mlp.fc2.weight": (width, size), f"{start}mlp.fc2.bias": (width,)}
    tower |= {f"{norm}.{suffix}": (width,) for norm in norms for suffix in ("weight", "bias")}
    prefix = {"moe": "model.image_tower.image_tower.", "llava": "model.vision_tower.vision_tower."}[lineage]
    adaptor = {"moe": "model.mm_projector.image_spatial_proj.", "llava": "model.mm_projector."}[lineage]
    return {f"{prefix}vision_model.{name}": shape for name, shape in tower.items()} | {
        f"{adaptor}0.weight": (text_width, width),
        f"{adaptor}0.bias": (text_width,),
        f"{adaptor}2.weight": (text_width, text_width),
        f"{adaptor}2.bias": (text_width,),
    }


def moe_fields(layers, *, experts=4, top_k=2, residual=False):
    return {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": layers,
        "num_experts": [experts] * len(layers),
        "top_k_experts": top_k,
        "ep_size": 1,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "use_residual": residual,
        "router_aux_loss_coef": 0.02,
        "train_modules": ["wg"],
    }


def config_values(kind, sizes, *, moe=None, tower="openai/clip-vit-large-patch14-336", **extra):
    values = {
        "model_type": f"{'moe_' if moe else ''}llava_{kind}",
        "architectures": ["LLaVAMoDForCausalLM"],
        "mm_image_tower": str(tower),
        "image_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 16,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "lora": {},
        **sizes,
        **extra,
    }
    return values | ({"moe": moe} if moe else {})


# What that layout computes, in float64, from its own names


def linear(state, name, x):
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state, name, x, eps):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def norm(state, name, x, eps):
    if f"{name}.bias" in state:
        return layer_norm(state, name, x, eps)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]


def rotate(x, rotated, theta):
    """The first `rotated` dimensions of each head: `x (heads, tokens, width)`."""
    half = rotated // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[..., :half], x[..., half:rotated]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotated:]], dim=-1)


def attention(state, prefix, x, heads, key_heads, *, output, rotary=None, causal=True):
    q, k, v = (linear(state, f"{prefix}.{name}_proj", x) for name in "qkv")
    q = q.unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, tokens, width of a head)
    k, v = (part.unflatten(-1, (key_heads, -1)).transpose(0, 1) for part in (k, v))
    if rotary:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    k, v = (part.repeat_interleave(heads // key_heads, dim=0) for part in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return linear(state, f"{prefix}.{output}", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def dense_ffn(kind, state, prefix, x):
    if kind == "phi":
        return linear(state, f"{prefix}fc2", F.gelu(linear(state, f"{prefix}fc1", x), approximate="tanh"))
    gate, up = (linear(state, f"{prefix}{name}_proj", x) for name in ("gate", "up"))
    return linear(state, f"{prefix}down_proj", gate * gate.sigmoid() * up)


def ffn(kind, state, prefix, x):
    """DeepSpeed's: the best expert, the best of the others, their probabilities over their sum; nothing dropped."""
    if f"{prefix}deepspeed_moe.gate.wg.weight" not in state:
        return dense_ffn(kind, state, prefix, x)
    probabilities = (x @ state[f"{prefix}deepspeed_moe.gate.wg.weight"].T).softmax(-1)
    rows = []
    for token, gates in zip(x, probabilities, strict=True):
        first = int(gates.argmax())
        second = int(gates.masked_fill(torch.arange(len(gates)) == first, -1).argmax())
        total = gates[first] + gates[second]
        rows.append(
            sum(
                gates[expert]
                / total
                * dense_ffn(kind, state, f"{prefix}deepspeed_moe.experts.deepspeed_experts.{expert}.", token)
                for expert in (first, second)
            )
        )
    output = torch.stack(rows)
    if f"{prefix}coefficient.weight" in state:
        share = linear(state, f"{prefix}coefficient", x).softmax(-1)
        output = output * share[:, :1] + dense_ffn(kind, state, f"{prefix}mlp.", x) * share[:, 1:]
    return output


def reference_image_features(state, pixels, lineage="moe"):
    root = {"moe": "model.image_tower.image_tower.", "llava": "model.vision_tower.vision_tower."}[lineage]
    tower = {name.removeprefix(f"{root}vision_model."): value for name, value in state.items()}
    patches = F.conv2d(pixels[None], tower["embeddings.patch_embedding.weight"], stride=TOWER["patch_size"])
    x = torch.cat([tower["embeddings.class_embedding"][None], patches[0].flatten(1).T])
    x = layer_norm(tower, "pre_layrnorm", x + tower["embeddings.position_embedding.weight"], 1e-5)
    for layer in range(TOWER["num_hidden_layers"] - 1):  # the output of the last but one
        start, heads = f"encoder.layers.{layer}.", TOWER["num_attention_heads"]
        h = layer_norm(tower, f"{start}layer_norm1", x, 1e-5)
        x = x + attention(tower, f"{start}self_attn", h, heads, heads, output="out_proj", causal=False)
        h = linear(tower, f"{start}mlp.fc1", layer_norm(tower, f"{start}layer_norm2", x, 1e-5))
        x = x + linear(tower, f"{start}mlp.fc2", h * (1.702 * h).sigmoid())
    name = {"moe": "model.mm_projector.image_spatial_proj.", "llava": "model.mm_projector."}[lineage]
    return linear(state, f"{name}2", F.gelu(linear(state, f"{name}0", x[1:])))


def reference_logits(kind, values, state, chunks, pixels, lineage="moe"):
    """Logits after `chunks[0]`, the image, and `chunks[1]`."""
    state = {name: value.double() for name, value in state.items()}
    embeddings = state["model.embed_tokens.weight"]
    image = reference_image_features(state, pixels.double(), lineage)
    x = torch.cat([embeddings[chunks[0]], image, embeddings[chunks[1]]])
    heads = values["num_attention_heads"]
    eps = next(values[name] for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if name in values)
    share = values.get("rope_pct", values.get("partial_rotary_factor", 1))
    rotary = (int(share * values["hidden_size"] // heads), float(values.get("rope_theta", 10000)))
    key_heads = values.get("num_key_value_heads", heads)
    for layer in range(values["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        h = norm(state, f"{start}input_layernorm", x, eps)
        output = "dense" if kind == "phi" else "o_proj"
        mixed = attention(state, f"{start}self_attn", h, heads, key_heads, output=output, rotary=rotary)
        if kind == "phi":
            x = x + mixed + ffn(kind, state, f"{start}mlp.", h)
        else:
            x = x + mixed
            x = x + ffn(kind, state, f"{start}mlp.", norm(state, f"{start}post_attention_layernorm", x, eps))
    x = norm(state, "model.final_layernorm" if kind == "phi" else "model.norm", x, eps)
    return x @ state.get("lm_head.weight", embeddings).T


def reference_pixels(image, pad):
    """Pad with the mean colour (or cut out the centre), resize, normalise: as the repositories' `process_images`."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    width, height = image.size
    if pad:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    scale = TOWER["image_size"] / min(image.size)
    image = image.resize([int(edge * scale) for edge in image.size], Image.Resampling.BICUBIC)
    left, top = ((edge - TOWER["image_size"]) // 2 for edge in image.size)
    image = image.crop((left, top, left + TOWER["image_size"], top + TOWER["image_size"]))
    return torch.tensor((np.asarray(image) / 255 - mean) / std).permute(2, 0, 1)


# Checkpoints


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_tokenizer():
    tokens = ["<pad>", "<|endoftext|>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|endoftext|>", additional_special_tokens=["</s>"]
    )


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.2 * torch.randn(shape, generator=generator)
        scale = 1.0 if "wg" in name or "embed_tokens" in name else 2 / math.sqrt(shape[-1])
        return scale * torch.randn(shape, generator=generator)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def write_checkpoint(folder, values, state, tokenizer, *, shards=2, safetensors=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(folder)
    names, weight_map = sorted(state), {}
    for index in range(shards):
        stem = "model" if safetensors else "pytorch_model"
        file = f"{stem}-{index + 1:05}-of-{shards:05}.{'safetensors' if safetensors else 'bin'}"
        part = {name: state[name] for name in names[index::shards]}
        if safetensors:
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = "model.safetensors.index.json" if safetensors else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def make_checkpoint(tmp_path, tower_folder, plain_tokenizer):
    """`make_checkpoint("phi", moe=…)`: folder, config and weights of a tiny checkpoint of that layout."""

    def make(kind, *, moe=None, lineage="moe", own_tower=True, shards=2, safetensors=False, **extra):
        sizes = {"vocab_size": 300, **KINDS[kind], **extra}
        values = config_values(kind, sizes, moe=moe, tower=tower_folder)
        shapes = text_shapes(kind, values) | vision_shapes(TOWER, values["hidden_size"], lineage=lineage)
        if not own_tower:
            shapes = {name: shape for name, shape in shapes.items() if "_tower." not in name}
        state = random_state(shapes)
        folder = write_checkpoint(
            tmp_path / "checkpoint", values, state, plain_tokenizer, shards=shards, safetensors=safetensors
        )
        return folder, values, state

    return make


def edit_config(folder, **fields):
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))


def picture(width=40, height=20):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def assert_computes_the_layout(folder, kind, values, state, tokenizer, *, lineage="moe", pad=True):
    model, processor = convert_checkpoint(str(folder))
    image = picture()
    message = {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    before, after = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (f"{SYSTEM} USER: ", "\nwhat? ASSISTANT:")
    )
    expected = reference_logits(kind, values, state, (before, after), reference_pixels(image, pad), lineage)
    logits = model(**inputs).logits[0].double()
    assert expected.abs().max() > 1
    torch.testing.assert_close(
        logits[:, : expected.shape[1]], expected, rtol=0, atol=2e-5 * expected.abs().max().item()
    )
    return model, processor, prompt


SPARSE = moe_fields([0, 2])


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
    assert model.generation_config.suppress_tokens == [rows]


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


# What does not fit


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "moe_llava_qwen"}, "Qwen is the first one"),
        ({"model_type": "moe_llava_minicpm"}, "MiniCPM scales embeddings"),
        ({"model_type": "llava_gemma2"}, "Gemma 2 scales image features"),
        ({"model_type": "llava_mpt"}, "MPT"),
        ({"model_type": "bert"}, "`model_type` 'bert'"),
        ({"mm_image_tower": "drop"}, "names no vision encoder"),
        ({"mm_video_tower": "LanguageBind/Video"}, "has a video encoder"),
        ({"s2": True}, "several scales"),
        ({"image_projector_type": "qformer2_64"}, "adaptor of type 'qformer2_64'"),
        ({"mm_use_im_start_end": True}, "writes tokens around images"),
        ({"image_aspect_ratio": "anyres"}, "`image_aspect_ratio` 'anyres'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "`mm_patch_merge_type` 'spatial_unpad'"),
        ({"mm_vision_select_feature": "cls"}, "vision features 'cls'"),
        ({"lora": {"lora_enable": True}}, "LoRA"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"moe": {**SPARSE, "top_k_experts": 1}}, "one expert, weighted with the router's probability"),
        ({"moe": {**SPARSE, "num_experts": [4, 2]}}, "one number for all layers"),
        ({"moe": {**SPARSE, "moe_layers_idx": None}}, "no `moe_layers_idx`"),
    ],
)
def test_configs_that_cannot_be_converted_are_refused(fields, message):
    values = config_values("qwen2", KINDS["qwen2"], moe=SPARSE) | fields
    with pytest.raises(ValueError, match=message) as caught:
        read_layout({key: value for key, value in values.items() if value != "drop"}, "there")
    assert "there" in str(caught.value)


def test_fields_that_nothing_reads_are_named(caplog):
    read_layout(config_values("qwen2", KINDS["qwen2"]), "there")
    assert not caplog.records
    read_layout(config_values("qwen2", KINDS["qwen2"], attention_sinks=4), "there")
    assert "attention_sinks" in caplog.text


def test_capacity_is_told_about(caplog):
    read_layout(config_values("qwen2", KINDS["qwen2"], moe=SPARSE), "there")
    assert "`eval_capacity_factor` 2.0" in caplog.text


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_that_do_not_fit_are_named(make_checkpoint, tmp_path, plain_tokenizer, shards):
    _, values, state = make_checkpoint("qwen2", moe=SPARSE)
    expert = "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts."
    del state[f"{expert}3.up_proj.weight"], state["model.norm.weight"]
    state[f"{expert}4.up_proj.weight"] = torch.zeros(48, 32)
    state["model.image_newline"] = torch.zeros(32)
    state["lm_head.weight"] = torch.zeros(299, 32)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old versions of transformers stored it
    folder = write_checkpoint(tmp_path / "bad", values, state, plain_tokenizer, shards=shards)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(str(folder))
    unknown, missing, mismatched = str(caught.value).split("; ")
    assert unknown.endswith(f"there is no place for model.image_newline, {expert}4.up_proj.weight")
    assert missing == (
        "it lacks model.language_model.layers.2.mlp.experts.3.up_proj.weight, model.language_model.norm.weight"
    )
    assert mismatched == "other shapes than the config's have lm_head.weight (299, 32) instead of (300, 32)."


def test_a_head_that_is_not_tied_is_refused(make_checkpoint, tmp_path, plain_tokenizer):
    _, values, state = make_checkpoint("qwen2", tie_word_embeddings=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    convert_checkpoint(str(write_checkpoint(tmp_path / "same", values, state, plain_tokenizer)))
    state["lm_head.weight"][7] += 1
    with pytest.raises(ValueError, match="ties the head to the embeddings"):
        convert_checkpoint(str(write_checkpoint(tmp_path / "other", values, state, plain_tokenizer)))


@pytest.mark.parametrize("safetensors", [False, True])
def test_files_that_cannot_be_read_are_named(make_checkpoint, safetensors):
    folder, *_ = make_checkpoint("qwen2", safetensors=safetensors)
    file = sorted(folder.glob("*-00001-of-00002.*"))[0]
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"{file.name}` cannot be read as weights"):
        convert_checkpoint(str(folder))
    file.unlink()
    with pytest.raises(ValueError, match=f"lacks {file.name}"):
        convert_checkpoint(str(folder))
    for index in folder.glob("*.index.json"):
        index.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        convert_checkpoint(str(folder))


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


def test_code_in_a_checkpoint_does_not_run(make_checkpoint, capsys):
    folder, *_ = make_checkpoint("qwen2")
    torch.save({"model.norm.weight": Code()}, next(iter(sorted(folder.glob("*.bin")))))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        convert_checkpoint(str(folder))
    assert "this ran" not in capsys.readouterr().out


def test_other_bad_input(make_checkpoint, tmp_path):
    folder, *_ = make_checkpoint("qwen2")
    with pytest.raises(ValueError, match="has no `config.json`"):
        convert_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="`conversation` is 'chatml': give one of qwen"):
        convert_checkpoint(str(folder), conversation="chatml")
    with pytest.raises(ValueError, match="has no '<|end_of_turn|>'".replace("|", r"\|")):
        convert_checkpoint(str(folder), conversation="openchat")
    for dtype in ("int8", "float3"):
        with pytest.raises(ValueError, match=f"`dtype` is '{dtype}'"):
            convert_checkpoint(str(folder), dtype=dtype)


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
