"""The LLaVA-MoD student: a LLaVA with a sparse mixture of experts. Ships to the Hub with every checkpoint."""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoModel, AutoModelForImageTextToText, GenerationMixin, initialization
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_llava_mod import LlavaModConfig


@dataclass
class LlavaModModelOutputWithPast(LlavaModelOutputWithPast):
    """
    Output of [`LlavaModModel`].

    Args:
        router_logits (`tuple[torch.FloatTensor]`, *optional*):
            One `(batch * sequence, num_experts)` float32 tensor per mixture-of-experts layer.
    """

    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class LlavaModCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """
    Output of [`LlavaModForConditionalGeneration`].

    Args:
        aux_loss (`torch.FloatTensor`, *optional*):
            Load-balancing loss as transformers computes it, before its coefficient; with `labels` only.
        router_logits (`tuple[torch.FloatTensor]`, *optional*):
            One `(batch * sequence, num_experts)` float32 tensor per mixture-of-experts layer.
    """

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


class LlavaModTopKRouter(nn.Module):
    """Linear router without bias, run in float32; the chosen gates are renormalised to sum to 1 (paper, eq. 3)."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states):
        # float32 even under autocast: a rounded logit flips the choice of expert
        with torch.autocast(hidden_states.device.type, enabled=False):
            router_logits = F.linear(hidden_states.float(), self.weight.float())  # (tokens, experts)
        top_k_weights, top_k_index = router_logits.softmax(dim=-1).topk(self.top_k, dim=-1)  # (tokens, k)
        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index


@use_experts_implementation
class LlavaModExperts(nn.Module):
    """Gated FFNs as packed tensors: `gate_up_proj (E, 2I, H)`, `down_proj (E, H, I)`."""

    def __init__(self, config, intermediate_size):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, intermediate_size))
        self.act_fn = ACT2FN[getattr(config, "hidden_activation", None) or config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_idx, choice = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token_idx], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            expert_output = expert_output * top_k_weights[token_idx, choice, None]
            output.index_add_(0, token_idx, expert_output.to(output.dtype))
        return output


class LlavaModSparseMoeBlock(nn.Module):
    """Takes the place of a layer's FFN: every token goes through its `num_experts_per_tok` experts, none is dropped."""

    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate = LlavaModTopKRouter(config)
        self.experts = LlavaModExperts(config, intermediate_size)

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (batch * sequence, width)
        _, top_k_weights, top_k_index = self.gate(tokens)
        return self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)


def _gated_ffn_size(mlp, name):
    """Intermediate size of a layer's FFN; refuses one that the experts cannot reproduce."""
    projections = [getattr(mlp, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(projection, nn.Linear) and projection.bias is None for projection in projections):
        raise ValueError(
            f"`{name}` is a {type(mlp).__name__}: mixture-of-experts layers need an FFN made of `gate_proj`, `up_proj` "
            "and `down_proj` without biases, as Llama and Qwen2 have."
        )
    return projections[0].out_features


@functools.cache
def _sparse_text_model_class(text_model_class):
    """
    Subclass of a text model of transformers whose FFNs in `config.moe_layers` are mixtures of experts.

    A class of its own, since transformers keeps what a model can record (`router_logits`) by class: changing the stock
    class would change it for everybody.
    """

    class SparseTextModel(text_model_class):
        _can_record_outputs = {
            **(text_model_class._can_record_outputs or {}),
            "router_logits": OutputRecorder(LlavaModTopKRouter, index=0),
        }

        def __init__(self, config):
            super().__init__(config)
            if not hasattr(self, "layers"):
                raise ValueError(
                    f"{text_model_class.__name__} has no `layers`: mixture-of-experts layers need a language model "
                    "whose FFNs are at `layers[i].mlp`, as those of Llama and Qwen2 are."
                )
            for index in config.moe_layers:
                size = _gated_ffn_size(self.layers[index].mlp, f"language_model.layers.{index}.mlp")
                self.layers[index].mlp = LlavaModSparseMoeBlock(config, size)
            self.post_init()

        @classmethod
        def _can_set_experts_implementation(cls):
            # transformers keeps the answer by class, and here would find the stock class's, which has no experts
            return True

        @torch.no_grad()
        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, LlavaModTopKRouter):
                initialization.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, LlavaModExperts):
                initialization.normal_(module.gate_up_proj, std=self.config.initializer_range)
                initialization.normal_(module.down_proj, std=self.config.initializer_range)

    SparseTextModel.__name__ = SparseTextModel.__qualname__ = f"LlavaMod{text_model_class.__name__}"
    return SparseTextModel


class LlavaModPreTrainedModel(LlavaPreTrainedModel):
    config_class = LlavaModConfig
    config: LlavaModConfig

    @classmethod
    def _can_set_experts_implementation(cls):
        # transformers keeps the answer by class, and `LlavaModModel` would find that of the stock `LlavaModel`
        return True


class LlavaModModel(LlavaModPreTrainedModel, LlavaModel):
    """
    Vision encoder → two-layer GELU adaptor → language model with mixture-of-experts layers, without the head.

    Image features and placeholder tokens are [`~transformers.LlavaModel`]'s.
    """

    def __init__(self, config: LlavaModConfig):
        LlavaModPreTrainedModel.__init__(self, config)
        text_config = config.get_text_config()
        # `from_pretrained(experts_implementation=…)` sets it on every sub-config; a tower without experts refuses it
        vision_config = config.vision_config
        vision_config._experts_implementation = None  # type: ignore[union-attr]
        self.vision_tower = AutoModel.from_config(vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        if config.moe_layers:
            text_model_class = _sparse_text_model_class(MODEL_MAPPING[type(text_config)])
            self.language_model = text_model_class._from_config(text_config)
        else:
            self.language_model = AutoModel.from_config(text_config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        **kwargs,
    ):
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Token ids, one `<image>` placeholder per image feature. This or `inputs_embeds`.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`, *optional*):
                The images of the whole batch, in the order of their placeholders.
            attention_mask, position_ids, past_key_values, inputs_embeds, kwargs:
                As in the language model.
            vision_feature_layer, vision_feature_select_strategy:
                Override the config's.

        Returns:
            [`LlavaModModelOutputWithPast`].

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, or if the number of placeholders
                differs from the number of image features.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if pixel_values is not None:
            image_features = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
            ).pooler_output
            image_features = torch.cat(image_features).to(inputs_embeds.device, inputs_embeds.dtype)
            image_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            router_logits=outputs.get("router_logits"),
        )


class LlavaModForConditionalGeneration(LlavaModPreTrainedModel, GenerationMixin):
    """[`LlavaModModel`] with a language-modelling head: the student that is trained, published and loaded."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaModConfig):
        super().__init__(config)
        self.model = LlavaModModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_image_features(self, pixel_values, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        labels=None,
        logits_to_keep=0,
        output_router_logits=None,
        **kwargs,
    ):
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Unshifted labels, −100 ignored; with them the loss is returned.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions to project, as in transformers: the last `n` (0: all), indices, or a boolean
                `(batch, sequence)` mask, with which `logits` has shape `(positions, vocabulary)`.
            output_router_logits (`bool`, *optional*, defaults to the config's):
                Return `router_logits`, and with `labels` also `aux_loss`, weighted and added to the loss.

        The other arguments are those of [`LlavaModModel`].

        Returns:
            [`LlavaModCausalLMOutputWithPast`].
        """
        text_config = self.config.text_config
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
            if output_router_logits and outputs.router_logits is not None:
                aux_loss = load_balancing_loss_func(
                    outputs.router_logits, text_config.num_experts, text_config.num_experts_per_tok, attention_mask
                )
                loss = loss + text_config.router_aux_loss_coef * aux_loss
        return LlavaModCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


LlavaModModel.register_for_auto_class("AutoModel")
LlavaModForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
AutoModel.register(LlavaModConfig, LlavaModModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaModConfig, LlavaModForConditionalGeneration, exist_ok=True)

__all__ = ["LlavaModForConditionalGeneration", "LlavaModModel", "LlavaModPreTrainedModel"]
