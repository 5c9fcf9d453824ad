"""
What vLLM's transformers backend does to the folder of a student, in plain torch.

`docs/deployment.md` says of which version. The rules are vLLM's: which modules it replaces, which names of the file it
puts where, and how it calls what is left. The layers that take their places are the simplest that compute the same.
"""

import re

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModel

EXPERT_WEIGHT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")


class Attention:
    """A layer's attention, which vLLM keeps outside the model, with its cache; `calls` counts how often it ran."""

    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, value, scaling):
        self.calls += 1
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def vllm_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """The function behind `_attn_implementation="vllm"`: one row of tokens, and flat output."""
    output = attention_instances[module.layer_idx](query, key, value, scaling)  # (1, heads, tokens, head size)
    return output.transpose(1, 2).reshape(query.shape[-2], -1), None


AttentionInterface.register("vllm", vllm_attention)


class FusedExperts(nn.Module):
    """Takes the place of `experts`: SiLU and a gate, whatever the experts had; routed by those that call it."""

    def __init__(self, num_experts, hidden_size, intermediate_size):
        super().__init__()
        shape = (num_experts, intermediate_size, hidden_size)
        self.gate_proj, self.up_proj = (
            nn.Parameter(torch.full(shape, torch.nan)),
            nn.Parameter(torch.full(shape, torch.nan)),
        )
        self.down_proj = nn.Parameter(torch.full((num_experts, hidden_size, intermediate_size), torch.nan))

    def forward(self, hidden_states, topk_ids, topk_weights, **kwargs):
        gates = hidden_states.new_zeros(len(hidden_states), len(self.down_proj)).scatter(1, topk_ids, topk_weights)
        inner = F.silu(torch.einsum("th,eih->tei", hidden_states, self.gate_proj))
        inner = inner * torch.einsum("th,eih->tei", hidden_states, self.up_proj)
        return torch.einsum("tei,ehi,te->th", inner, self.down_proj, gates)


def _is_replaced(name, module):
    parameters = list(module.parameters())
    packed = bool(parameters) and all(parameter.ndim == 3 for parameter in parameters)
    return name == "experts" and (isinstance(module, nn.ModuleList) or packed)


class Served(nn.Module):
    """
    A student as vLLM holds it.

    Args:
        folder (`Path`): of a saved student.

    Attributes:
        model (`PreTrainedModel`): of the config's `AutoModel`, its attention and experts replaced.
        unexpected (`set[str]`), missing (`set[str]`): weights of the file without a place, and places without weights.
    """

    def __init__(self, folder):
        super().__init__()
        self.config = AutoConfig.from_pretrained(folder)
        text_config = self.config.get_text_config()
        text_config._attn_implementation = "vllm"
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(self.config, dtype=torch.float32).eval()
        self.fused = {}
        for prefix, parent in list(self.model.named_modules(prefix="model")):
            for name, child in list(parent.named_children()):
                if _is_replaced(name, child):
                    self.fused[f"{prefix}.{name}"] = parent.experts = FusedExperts(
                        text_config.num_experts, text_config.hidden_size, text_config.intermediate_size
                    )
        self.tied = text_config.tie_word_embeddings or self.config.tie_word_embeddings
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.attention_instances = {layer: Attention() for layer in range(text_config.num_hidden_layers)}
        self._load(
            {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        )

    @torch.no_grad()
    def _load(self, weights):
        # parameters, and since its loader takes them the buffers that are saved
        places = self.state_dict(keep_vars=True)
        self.unexpected, self.missing = set(), set(places)
        for name, tensor in weights.items():
            found = EXPERT_WEIGHT.fullmatch(name)
            if found and found["experts"] in self.fused:
                place = f"{found['experts']}.{found['part']}"
                places[place][int(found["index"])] = tensor
            elif name in places:
                place = name
                parent, _, attribute = name.rpartition(".")
                is_parameter = isinstance(places[name], nn.Parameter)
                setattr(self.get_submodule(parent), attribute, nn.Parameter(tensor) if is_parameter else tensor)
            else:
                self.unexpected.add(name)
                continue
            self.missing.discard(place)
        if self.tied:
            self.lm_head.weight = self.model.get_input_embeddings().weight
            self.missing.discard("lm_head.weight")

    @torch.no_grad()
    def forward(self, input_ids, pixel_values, placeholders):
        """
        Logits `(tokens, vocabulary)` of one prompt.

        Args:
            input_ids (`torch.LongTensor` of shape `(tokens,)`): with the placeholders.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`).
            placeholders (`list[tuple[int, int]]`): first token and number of tokens of every image.
        """
        inputs_embeds = self.model.get_input_embeddings()(input_ids)
        features = self.model.get_image_features(pixel_values).pooler_output
        for (start, length), image in zip(placeholders, features, strict=True):
            inputs_embeds[start : start + length] = image
        outputs = self.model(
            input_ids=None,
            inputs_embeds=inputs_embeds[None],
            use_cache=False,
            position_ids=torch.arange(len(input_ids))[None],
            attention_instances=self.attention_instances,
            return_dict=False,
        )
        return self.lm_head(outputs[0][0])
