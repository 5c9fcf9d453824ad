"""The layout of the authors' checkpoints: names and shapes, tiny ones on disk, and what they compute, in float64."""

import json
import math

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from llava_mod_hf.students.conversion import convert_checkpoint

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


SPARSE = moe_fields([0, 2])


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
