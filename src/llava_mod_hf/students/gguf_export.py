"""A student as GGUF files for llama.cpp, whose graphs compute just what it does."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from llava_mod_hf.model.modeling_llava_mod import logit_transform
from llava_mod_hf.students.gguf_tokenizer import add_tokenizer
from llava_mod_hf.students.gguf_vision import add_vision, check_vision
from llava_mod_hf.students.router_bias import BIAS, has_router_bias
from llava_mod_hf.students.stock_export import expert_weights

FILES = ("model.gguf", "mmproj.gguf")

# Name of a type → what the file says of itself.
GGUF_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}


class Architecture(NamedTuple):
    """
    A graph of llama.cpp (`src/models/*.cpp`).

    Args:
        name (`str`): by which the file asks for it.
        permuted (`bool`): whether it rotates neighbouring pairs, so that the rows of Q and K have another order there.
        rope_factors (`bool`): whether it reads a factor for each frequency, as Llama 3's scaling needs.
        biases (`frozenset[str]`): the biases of a decoder layer that it adds.
    """

    name: str
    permuted: bool
    rope_factors: bool
    biases: frozenset


QKV = frozenset(f"self_attn.{part}_proj" for part in "qkv")

# The graph `llama` is the one that takes experts with gates that sum to 1 and no shared expert, and adds the biases
# that it finds: Qwen2's, too. llama.cpp's `qwen2moe` would load a student and compute something else.
LLAMA = Architecture("llama", True, True, QKV | {"self_attn.o_proj"})
LLAMA_DENSE = LLAMA._replace(biases=LLAMA.biases | {f"mlp.{part}_proj" for part in ("gate", "up", "down")})

# Family → its graph as a dense model, and as a mixture of experts.
FAMILIES = {
    "llama": (LLAMA_DENSE, LLAMA),
    "mistral": (LLAMA_DENSE, LLAMA),
    "qwen2": (Architecture("qwen2", False, False, QKV), LLAMA),
    "qwen3": (Architecture("qwen3", False, False, frozenset()), Architecture("qwen3moe", False, False, frozenset())),
}


def check_gguf(folder, gguf_type):
    """
    What can be known before a student is loaded.

    Returns:
        `tuple[module, list[Path]]`: the package gguf, and the files to be written.

    Raises:
        ValueError: if gguf is not installed, weights cannot be written as that type, or a file is there already.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "GGUF files need the package gguf: install it with `pip install llava-mod-hf[gguf]`."
        ) from error
    if gguf_type not in GGUF_TYPES:
        raise ValueError(f"`gguf_type` is {gguf_type!r}: give one of {', '.join(GGUF_TYPES)}.")
    paths = [Path(folder) / name for name in FILES]
    for path in paths:
        if path.exists():
            raise ValueError(f"`{path}` is there already: give another folder, or remove it.")
    return gguf, paths


@torch.no_grad()
def export_gguf(model, processor, folder, *, gguf_type="f16"):
    """
    Writes `model.gguf`, the language model with its tokenizer and chat template, and `mmproj.gguf`, what makes
    embeddings of a picture for it.

    | student | graph of llama.cpp |
    |---|---|
    | Llama, Mistral, sparse or dense; Qwen2, sparse | `llama` |
    | Qwen2, dense | `qwen2` |
    | Qwen3 | `qwen3moe`, dense `qwen3` |
    | CLIP, SigLIP | LLaVA's |

    The language models' graphs have experts in every layer or in none: a layer with a dense FFN is written as experts
    that are all that FFN, and a router of zeros, whose gates sum to 1.

    Args:
        model (`LlavaModForConditionalGeneration` or `LlavaForConditionalGeneration`): sparse, dense or merged.
        processor (`ProcessorMixin`): the student's.
        folder (`str` or `Path`): where the files go.
        gguf_type (`str`, *optional*, defaults to `"f16"`):
            Type of the matrices, one of `GGUF_TYPES`. Vectors, routers, and what the encoder makes of pixels, are
            float32. Of `q8_0` and `q4_0`, blocks of 32 values of a row, matrices with other rows are `f16`, and of
            `q4_0` the embeddings, the head and the encoder are `q8_0`.

    Returns:
        `list[Path]`: of the files.

    Raises:
        ValueError: if gguf is not installed, a file is there already, or llama.cpp has no graph that computes the same.
    """
    gguf, paths = check_gguf(folder, gguf_type)
    text = model.config.text_config
    architecture = find_architecture(model)
    check_vision(model, processor)
    language = _Writer(gguf, paths[0], architecture.name, gguf_type)
    add_sizes(language.writer, text, model.get_input_embeddings().weight.shape[0])
    add_tokenizer(language.writer, gguf, processor, model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name.upper()], text.num_hidden_layers)
    for name, tensor in language_tensors(model, architecture):
        language.add(_gguf_name(names, name), tensor)
    language.finish()
    vision = _Writer(gguf, paths[1], "clip", {"q4_0": "q8_0"}.get(gguf_type, gguf_type))
    add_vision(vision, model, processor)
    vision.finish()
    return paths


class _Writer:
    """A GGUF file, which has its name when it is whole."""

    def __init__(self, gguf, path, architecture, gguf_type):
        self.gguf, self.path, self.gguf_type = gguf, path, gguf_type
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = path.with_name(path.name + ".part")
        self.writer = gguf.GGUFWriter(self.partial, architecture)
        self.writer.add_file_type(gguf.LlamaFileType[GGUF_TYPES[gguf_type]])
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def add(self, name, tensor):
        """Adds a tensor, matrices in the type that is asked for as far as it can hold them."""
        gguf, gguf_type = self.gguf, self.gguf_type
        tensor = tensor.detach().float().cpu().contiguous().numpy()
        if gguf_type == "q4_0" and name in ("token_embd.weight", "output.weight"):
            gguf_type = "q8_0"
        if gguf_type.startswith("q") and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
            gguf_type = "f16"
        if tensor.ndim < 2 or name.startswith(("v.patch_embd", "v.position_embd")) or "ffn_gate_inp" in name:
            gguf_type = "f32"
        kind = gguf.GGMLQuantizationType[gguf_type.upper()]
        self.writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)

    def finish(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        os.replace(self.partial, self.path)


def find_architecture(model):
    """
    The graph of llama.cpp that computes what the model's language model does.

    Raises:
        ValueError: if there is none.
    """
    text = model.config.text_config
    kind, layers = text.model_type, getattr(model.config, "moe_layers", [])
    dense, sparse = FAMILIES.get(kind, (None, None))
    architecture = sparse if layers else dense
    language_model = model.model.language_model
    types = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None)
    slides = window and (kind == "mistral" or types != {"full_attention"}) and window < text.max_position_embeddings
    scale, cap = logit_transform(text)
    reasons = {
        f"is of the family {kind}": architecture is None,
        "keeps the dense FFN beside its experts (`use_residual`)": getattr(model.config, "use_residual", False),
        f"has sliding attention over {window} tokens": slides,
        f"has the activation {getattr(text, 'hidden_act', None)}": getattr(text, "hidden_act", None) != "silu",
        "scales or caps its logits after the head": scale != 1.0 or cap is not None,
        "has a bias in its head": getattr(model.lm_head, "bias", None) is not None,
        "chooses experts by a bias of its routers (`router_bias_update`)": has_router_bias(model),
    }
    if architecture is not None:
        biases = {name for name in language_model.state_dict() if name.endswith("bias") and not name.endswith(BIAS)}
        biases = {name.removesuffix(".bias") for name in biases}
        extra = sorted(name for name in biases if name.split(".", 2)[-1] not in architecture.biases)
        reasons[f"has biases, such as that of `{extra[0] if extra else ''}`,"] = bool(extra)
        rope = language_model.rotary_emb
        changed = (rope_factors(rope, text) - 1).abs().max() > 1e-6
        reasons[f"scales its rotary embedding ({rope.rope_type})"] = (
            rope.rope_type in ("dynamic", "longrope")
            or rope.attention_scaling != 1
            or len(rope.inv_freq) * 2 != head_dim(text)
            or (changed and not architecture.rope_factors)
        )
        width = text.num_attention_heads * head_dim(text)
        reasons["has heads that are wider or narrower than the model together"] = (
            architecture.name == "qwen2" and width != text.hidden_size
        )
    for reason, found in reasons.items():
        if found:
            raise ValueError(
                f"The student {reason}, which llama.cpp has no graph for that computes the same: use transformers, or "
                "give a student of " + ", ".join(FAMILIES) + "."
            )
    return architecture


def head_dim(text):
    """Width of an attention head."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def rope_factors(rope, text):
    """By what each frequency is divided, compared with those of `rope_theta` alone: `(head_dim / 2,)`."""
    plain = text.rope_parameters["rope_theta"] ** (
        torch.arange(len(rope.inv_freq), dtype=torch.float64) * 2 / head_dim(text)
    )
    return 1 / (plain * rope.inv_freq.double().cpu())


def add_sizes(writer, text, vocab_size):
    """Writes what a graph has to know beside the tensors."""
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_dim(text))
    writer.add_value_length(head_dim(text))
    writer.add_rope_dimension_count(head_dim(text))
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    if getattr(text, "moe_layers", []):
        writer.add_expert_count(text.num_experts)
        writer.add_expert_used_count(text.num_experts_per_tok)
        writer.add_expert_feed_forward_length(text.intermediate_size)


def language_tensors(model, architecture):
    """Yields `(name in transformers, tensor)` of the language model, with experts in all layers or in none."""
    text, sparse = model.config.text_config, getattr(model.config, "moe_layers", [])
    language_model = model.model.language_model
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    for name, tensor in language_model.state_dict().items():
        part = name.split(".")[-2]
        if sparse and ".mlp." in name:
            continue
        if architecture.permuted and part in heads:
            tensor = permute(tensor, heads[part])
        yield f"model.{name}", tensor
    for index, layer in enumerate(language_model.layers if sparse else []):
        prefix = f"model.layers.{index}.mlp."
        if index in sparse:
            weights, router = expert_weights(layer.mlp.experts), layer.mlp.gate.weight
        else:
            weights = {
                name: value.expand(text.num_experts, *value.shape) for name, value in layer.mlp.state_dict().items()
            }
            router = model.lm_head.weight.new_zeros(text.num_experts, text.hidden_size)
        yield f"{prefix}gate.weight", router
        yield from ((f"{prefix}experts.{name}", value) for name, value in weights.items())
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        yield "lm_head.weight", model.lm_head.weight
    factors = rope_factors(language_model.rotary_emb, text)
    if (factors - 1).abs().max() > 1e-6:
        yield "rope_freqs.weight", factors.float()


def permute(tensor, heads):
    """Rows of each head from halves, `(x0, x1, …, y0, y1, …)`, to neighbouring pairs, `(x0, y0, x1, y1, …)`."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # (heads, halves, head_dim / 2, …)
    return halves.transpose(1, 2).reshape(tensor.shape)


def _gguf_name(names, name):
    if name == "rope_freqs.weight":
        return name
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"The student has the tensor `{name}`, which llama.cpp has no name for: use transformers.")
    return found
