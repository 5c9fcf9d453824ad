"""The mixture of experts that takes the place of a dense FFN. Ships to the Hub with every checkpoint."""

import copy
import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization
from transformers.activations import ACT2FN
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import moe, use_experts_implementation
from transformers.utils import logging

from .configuration_llava_mod import check_router_aux_loss_type

logger = logging.get_logger(__name__)


class FFNLayout(NamedTuple):
    """
    How a family's FFN is made: `second(act(first(x)))`, or, gated, `second(act(gate) * up)` of `gate, up = first(x)`.

    Args:
        first (`tuple[str, ...]`): the linear layers that are stacked in the experts' first matrix, in this order.
        second (`str`): the linear layer that leads back.
        gated (`bool`): whether the first matrix holds a gate above the values that it multiplies.
    """

    first: tuple[str, ...]
    second: str
    gated: bool


LAYOUTS = (
    FFNLayout(("gate_proj", "up_proj"), "down_proj", gated=True),  # Llama, Qwen2, Gemma2, StableLM, OLMo2, …
    FFNLayout(("gate_up_proj",), "down_proj", gated=True),  # Phi-3
    FFNLayout(("fc1",), "fc2", gated=False),  # Phi
)


def read_ffn(mlp, name):
    """
    The layout of a dense FFN, its size, its activation, and whether it has biases.

    Args:
        mlp (`nn.Module`): one of a language model of transformers.
        name (`str`): where it is, for the message.

    Returns:
        `tuple[FFNLayout, int, nn.Module, bool]`.

    Raises:
        ValueError: if it is made of other parts than `LAYOUTS` knows, so that experts could not reproduce it.
    """
    children = dict(mlp.named_children())
    for layout in LAYOUTS:
        linear = [children.get(part) for part in (*layout.first, layout.second)]
        others = [child for part, child in children.items() if part not in (*layout.first, layout.second)]
        if (
            all(isinstance(part, nn.Linear) for part in linear)
            and len({part.bias is None for part in linear}) == 1
            and len(others) == 1  # the activation
            and not list(others[0].parameters())
            and sum(1 for _ in mlp.parameters()) == sum(1 for part in linear for _ in part.parameters())
        ):
            return layout, linear[-1].in_features, others[0], linear[-1].bias is not None
    raise ValueError(
        f"`{name}` is a {type(mlp).__name__}, made of {', '.join(children) or 'no parts'}: experts can take the place "
        f"of {' or '.join('/'.join((*layout.first, layout.second)) for layout in LAYOUTS)} around one activation."
    )


def _check_served(config, layout, act_fn, biased, name):
    """vLLM computes experts itself: SiLU, a gate and no biases, whatever they are, and by these names in the file."""
    if config._attn_implementation == "vllm" and (
        layout != LAYOUTS[0] or biased or not isinstance(act_fn, type(ACT2FN["silu"]))
    ):
        raise ValueError(
            f"vLLM's transformers backend computes experts of {'/'.join((*LAYOUTS[0].first, LAYOUTS[0].second))} with "
            f"SiLU and without biases, and those of `{name}` are of {'/'.join((*layout.first, layout.second))} with "
            f"{type(act_fn).__name__} and {'with' if biased else 'without'} biases: serve what `llava-mod export "
            "--form uniform` makes of the student, which is dense, or use transformers."
        )


def _grouped_mm_where_aligned(self, hidden_states, top_k_index, top_k_weights):
    """`grouped_mm` reads rows that start at multiples of 16 bytes; other widths go through the loop over experts."""
    if hasattr(self.down_proj, "qdata"):  # quantised by torchao, which has no grouped product
        return type(self).loop_over_experts(self, hidden_states, top_k_index, top_k_weights)
    widths = (self.down_proj.shape[1], self.down_proj.shape[2])
    if any(width * self.down_proj.element_size() % 16 for width in widths):
        logger.warning_once(
            f"`grouped_mm` needs widths that are multiples of {16 // self.down_proj.element_size()} "
            f"in {self.down_proj.dtype}, and the experts have {widths[0]} and {widths[1]}: using the `eager` ones."
        )
        return type(self).loop_over_experts(self, hidden_states, top_k_index, top_k_weights)
    return moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)


# `experts_implementation="grouped_mm"` and others: since 5.4 transformers lets a class bring its own
HAS_IMPLEMENTATIONS = "experts_interface" in inspect.signature(use_experts_implementation).parameters


def _with_implementations(experts_class):
    if not HAS_IMPLEMENTATIONS:
        return experts_class
    functions = moe.ExpertsInterface()
    functions["grouped_mm"] = _grouped_mm_where_aligned
    return use_experts_implementation(experts_interface=functions)(experts_class)


def choose_experts(router_logits, top_k, bias=None):
    """
    The experts that tokens are sent to, and their probabilities.

    Args:
        router_logits (`torch.FloatTensor` of shape `(tokens, experts)`).
        top_k (`int`): experts of a token.
        bias (`torch.FloatTensor` of shape `(experts,)`, *optional*):
            Added to the probabilities for the choice alone (Loss-Free Balancing, arXiv 2408.15664, eq. 3).

    Returns:
        `tuple[torch.FloatTensor, torch.LongTensor]`: of shape `(tokens, top_k)`, the first choice first.
    """
    probabilities = router_logits.softmax(dim=-1)
    if bias is None:
        return probabilities.topk(top_k, dim=-1)
    chosen = (probabilities + bias.to(probabilities)).topk(top_k, dim=-1).indices
    return probabilities.gather(-1, chosen), chosen


class LlavaModTopKRouter(nn.Module):
    """
    Linear router without bias, run in float32; the chosen gates are renormalised to sum to 1 (paper, eq. 3).

    With `config.router_bias` a buffer, named as in transformers' DeepSeek-V3, is added for the choice of experts; no
    gradient reaches it.
    """

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if getattr(config, "router_bias", False) else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden_states):
        # float32 even under autocast: a rounded logit flips the choice of expert
        with torch.autocast(hidden_states.device.type, enabled=False):
            router_logits = F.linear(hidden_states.float(), self.weight.float())  # (tokens, experts)
        top_k_weights, top_k_index = choose_experts(router_logits, self.top_k, self.e_score_correction_bias)
        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index


@_with_implementations
class LlavaModExperts(nn.Module):
    """
    Whole FFNs as packed tensors, named as transformers' expert kernels read them: `gate_up_proj (E, 2I, H)`, or
    without a gate `up_proj (E, I, H)`, and `down_proj (E, H, I)`; biases are `…_bias (E, rows)`.
    """

    def __init__(self, config, mlp, name="mlp"):
        super().__init__()
        self.num_experts = config.num_experts
        self.layout, size, self.act_fn, biased = read_ffn(mlp, name)
        _check_served(config, self.layout, self.act_fn, biased, name)
        self.first = "gate_up_proj" if self.layout.gated else "up_proj"
        rows = {self.first: size * (1 + self.layout.gated), "down_proj": config.hidden_size}
        columns = {self.first: config.hidden_size, "down_proj": size}
        for packed in rows:
            self.register_parameter(
                packed, nn.Parameter(torch.empty(config.num_experts, rows[packed], columns[packed]))
            )
            if biased:
                self.register_parameter(f"{packed}_bias", nn.Parameter(torch.empty(config.num_experts, rows[packed])))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.loop_over_experts(hidden_states, top_k_index, top_k_weights)

    def loop_over_experts(self, hidden_states, top_k_index, top_k_weights):
        first, first_bias = getattr(self, self.first), getattr(self, f"{self.first}_bias", None)
        down_bias = getattr(self, "down_proj_bias", None)
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_idx, choice = torch.where(top_k_index == expert)
            inner = F.linear(hidden_states[token_idx], first[expert], first_bias[expert] if self.has_bias else None)
            if self.has_gate:
                gate, up = inner.chunk(2, dim=-1)
                inner = self.act_fn(gate) * up
            else:
                inner = self.act_fn(inner)
            expert_output = F.linear(inner, self.down_proj[expert], down_bias[expert] if self.has_bias else None)
            expert_output = expert_output * top_k_weights[token_idx, choice, None]
            output.index_add_(0, token_idx, expert_output.to(output.dtype))
        return output

    def sources(self, mlp_prefix=""):
        """Packed name → names of a dense FFN's parameters that are stacked in it."""
        sources = {self.first: self.layout.first, "down_proj": (self.layout.second,)}
        weights = {packed: [f"{mlp_prefix}{part}.weight" for part in parts] for packed, parts in sources.items()}
        biases = {f"{packed}_bias": [f"{mlp_prefix}{part}.bias" for part in parts] for packed, parts in sources.items()}
        return weights | biases if self.has_bias else weights

    def file_conversions(self):
        """In the saved file each expert has its own tensors, named as the family's FFN names them."""
        return [
            WeightConverter(
                source_patterns=[f".experts.*.{part}" for part in parts],
                target_patterns=f".experts.{packed}",
                operations=[MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(parts) > 1 else [])],
            )
            for packed, parts in self.sources().items()
        ]

    # The Trainer resumes from the saved file by `load_state_dict`, without the conversions of `from_pretrained`: the
    # experts would be left out, with nothing but a warning.
    def _load_from_state_dict(self, state_dict, prefix, *args):
        for packed, parts in self.sources(prefix + "{}.").items():
            names = [[part.format(expert) for expert in range(self.num_experts)] for part in parts]
            if all(name in state_dict for row in names for name in row):
                stacks = [torch.stack([state_dict.pop(name) for name in row]) for row in names]
                state_dict[prefix + packed] = torch.cat(stacks, dim=1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LlavaModLowRankExperts(nn.Module):
    """
    Experts that share one dense FFN, `shared`, and differ from it by matrices of rank `config.expert_rank`:

        W_e = W + B_e A_e,   A_e (rank, columns), B_e (rows, rank)

    for both matrices of the FFN (a gate counts as rows of the first). B_e starts at 0, so every expert starts as the
    dense FFN. The shared matrices are applied once per token, whatever the number of experts it is sent to.
    """

    def __init__(self, config, mlp, name="mlp"):
        super().__init__()
        self.num_experts = config.num_experts
        self.layout, size, self.act_fn, _ = read_ffn(mlp, name)
        self.shared = mlp
        shape = (config.num_experts, config.expert_rank)
        self.up_a = nn.Parameter(torch.empty(*shape, config.hidden_size))
        self.up_b = nn.Parameter(torch.empty(config.num_experts, size * (1 + self.layout.gated), config.expert_rank))
        self.down_a = nn.Parameter(torch.empty(*shape, size))
        self.down_b = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_rank))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        shared = [self.shared.get_submodule(part)(hidden_states) for part in self.layout.first]
        shared_inner = shared[0].new_zeros(hidden_states.shape[0], self.down_a.shape[-1])  # (tokens, I)
        output = shared[0].new_zeros(hidden_states.shape)
        for expert in range(self.num_experts):
            token_idx, choice = torch.where(top_k_index == expert)
            low_rank = F.linear(hidden_states[token_idx], self.up_a[expert])  # (tokens, rank)
            # into the copies that the choice of tokens makes: these are the wide tensors, and most of the time
            inner = [
                part[token_idx].addmm_(low_rank.to(part.dtype), up_b.to(part.dtype).T)
                for part, up_b in zip(shared, self.up_b[expert].chunk(len(shared)), strict=True)
            ]
            if self.layout.gated:
                gate, up = inner if len(inner) > 1 else inner[0].chunk(2, dim=-1)
                inner = self.act_fn(gate) * up
            else:
                inner = self.act_fn(inner[0])
            inner = inner * top_k_weights[token_idx, choice, None]
            difference = F.linear(F.linear(inner, self.down_a[expert]), self.down_b[expert])
            shared_inner.index_add_(0, token_idx, inner.to(shared_inner.dtype))
            output.index_add_(0, token_idx, difference.to(output.dtype))
        # linear, and the gates of a token sum to 1: the shared second matrix and its bias are applied to the sum
        return (output + self.shared.get_submodule(self.layout.second)(shared_inner)).to(hidden_states.dtype)


class LlavaModSparseMoeBlock(nn.Module):
    """
    Takes the place of a layer's FFN: every token goes through its `num_experts_per_tok` experts, none is dropped.

    With `use_residual` the dense FFN stays beside the experts, and a learned softmax over two values weighs the two,
    as DeepSpeed's residual mixture of experts does (arXiv 2201.05596): exact as long as all are the dense FFN.

    Args:
        config (`PreTrainedConfig`): text config with the mixture-of-experts fields.
        mlp (`nn.Module`): the dense FFN, whose shape and activation the experts have.
        name (`str`, *optional*): where it is, for messages.
    """

    def __init__(self, config, mlp, name="mlp"):
        super().__init__()
        self.gate = LlavaModTopKRouter(config)
        experts_class = LlavaModExperts if config.expert_rank is None else LlavaModLowRankExperts
        self.experts = experts_class(config, mlp, name)
        if config.expert_rank is None:
            # the decorator sets these, by class, after `__init__`; here they are the family's
            self.experts.has_gate = self.experts.layout.gated
            self.experts.has_bias = "down_proj_bias" in self.experts._parameters
        if config.use_residual:
            self.residual_mlp = copy.deepcopy(mlp)  # low-rank experts share `mlp` itself
            self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (batch * sequence, width)
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights)
        if hasattr(self, "coefficient"):
            weights = self.coefficient(tokens).softmax(dim=-1)  # (tokens, 2)
            output = output * weights[:, :1] + self.residual_mlp(tokens) * weights[:, 1:]
        return output.view_as(hidden_states)


@torch.no_grad()
def init_moe_weights(module, std):
    """The part of a text model's `_init_weights` that is about routers and experts."""
    if isinstance(module, LlavaModTopKRouter):
        initialization.normal_(module.weight, std=std)
        if module.e_score_correction_bias is not None:
            initialization.zeros_(module.e_score_correction_bias)
    elif isinstance(module, LlavaModExperts):
        for name, parameter in module.named_parameters():
            if name.endswith("_bias"):
                initialization.zeros_(parameter)
            else:
                initialization.normal_(parameter, std=std)
    elif isinstance(module, LlavaModLowRankExperts):
        for part in (module.up_a, module.down_a):
            initialization.normal_(part, std=std)
        for part in (module.up_b, module.down_b):
            initialization.zeros_(part)


def _load_balancing(router_logits, top_k, weights):
    """
    E · Σ_e f_e P_e over the rows of all the given layers (Switch Transformer, eq. 4 to 6): f_e is how often expert e is
    among the first `top_k`, P_e its mean probability.
    """
    num_experts = router_logits[0].shape[-1]
    choices = probability = torch.zeros(num_experts, device=weights.device)
    for logits in router_logits:
        probabilities = logits.softmax(dim=-1)  # (rows, experts)
        chosen = probabilities.topk(top_k, dim=-1).indices.reshape(-1)
        choices = choices + torch.zeros_like(choices).scatter_add_(0, chosen, weights.repeat_interleave(top_k))
        probability = probability + (probabilities.float() * weights[:, None]).sum(dim=0)
    rows = len(router_logits) * weights.sum()
    return num_experts * torch.sum((choices / rows) * (probability / rows))


def router_losses(router_logits, text_config, attention_mask=None):
    """
    The router's load-balancing loss, of the kind that the config names, and its z-loss; both before their coefficients.

    Args:
        router_logits (`tuple[torch.FloatTensor]`): per layer `(batch * sequence, num_experts)`.
        text_config (`PreTrainedConfig`): with `router_aux_loss_type` and `num_experts_per_tok`.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): padding, which does not count.

    Returns:
        `tuple[torch.FloatTensor, torch.FloatTensor]`: two scalars.

    Raises:
        ValueError: if there is no loss of that type.
    """
    check_router_aux_loss_type(text_config.router_aux_loss_type)
    router_logits = tuple(logits.to(router_logits[0].device) for logits in router_logits)
    weights = torch.ones(len(router_logits[0]), device=router_logits[0].device)  # (batch * sequence)
    if attention_mask is not None:
        weights = attention_mask.reshape(-1).to(weights)
    if text_config.router_aux_loss_type == "pooled":
        aux = _load_balancing(router_logits, text_config.num_experts_per_tok, weights)
    else:
        aux = sum(_load_balancing((logits,), 1, weights) for logits in router_logits)
    z = sum((logits.logsumexp(dim=-1) ** 2 * weights).sum() / weights.sum() for logits in router_logits)
    return aux, z
