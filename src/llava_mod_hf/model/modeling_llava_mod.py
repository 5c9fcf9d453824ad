# lines: the files that ship are three, flat, and named in every checkpoint; a fourth would be one more to lose
"""The LLaVA-MoD student: a LLaVA with a sparse mixture of experts. Ships to the Hub with every checkpoint."""

import functools
import inspect
import re
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_llava_mod import LlavaModConfig, release
from .moe_llava_mod import (
    HAS_IMPLEMENTATIONS,
    LlavaModSparseMoeBlock,
    LlavaModTopKRouter,
    init_moe_weights,
    router_losses,
)

try:
    from transformers.utils.output_capturing import OutputRecorder
except ImportError:  # before transformers 5.2
    from transformers.utils.generic import OutputRecorder  # type: ignore[attr-defined, no-redef]


# Of transformers' oldest output classes, which name the cache as the language model's output does; what a LLaVA adds is
# our own, since the fields of the stock LLaVA's outputs change from release to release.
@dataclass
class LlavaModModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`LlavaModModel`].

    Args:
        image_hidden_states (`torch.FloatTensor`, *optional*):
            What the adaptor made of the images, `(images, features, width)` of the batch in a row.
        router_logits (`tuple[torch.FloatTensor]`, *optional*):
            One `(batch * sequence, num_experts)` float32 tensor per mixture-of-experts layer.
    """

    image_hidden_states: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class LlavaModCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`LlavaModForConditionalGeneration`].

    Args:
        image_hidden_states, router_logits:
            As in [`LlavaModModelOutputWithPast`].
        aux_loss (`torch.FloatTensor`, *optional*):
            Load-balancing loss of the config's `router_aux_loss_type`, before its coefficient; with `labels` only.
    """

    image_hidden_states: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


RELEASE = release(transformers.__version__)

# transformers 5.24 renames the argument and the output
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def rows_to_project(hidden_states, logits_to_keep):
    """
    The hidden states whose logits are wanted, as transformers reads `logits_to_keep`.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence, width)`).
        logits_to_keep (`int` or `torch.Tensor`):
            The last `n` positions (0: all), indices of positions (`(kept,)` for all rows, `(batch, kept)` for each), or
            a boolean `(batch, sequence)` mask.

    Returns:
        `torch.Tensor` of shape `(batch, kept, width)`, or with a mask `(kept, width)`.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


def logit_transform(text_config):
    """
    What a family's causal language model does to its logits after the head, by the fields that TRL reads as well.

        logits = cap · tanh(scale · head(hidden) / cap)

    Args:
        text_config (`PreTrainedConfig`): of a language model.

    Returns:
        `tuple[float, float | None]`: scale (1 for most), and cap (`None` for most; Gemma 2 has 30).
    """
    scale = getattr(text_config, "logit_scale", None)  # Cohere
    if scale is None and getattr(text_config, "logits_scaling", None) is not None:
        scale = 1 / text_config.logits_scaling  # Granite
    return 1.0 if scale is None else scale, getattr(text_config, "final_logit_softcapping", None)


def project(hidden_states, head, text_config):
    """Logits of `hidden_states`, as [`logit_transform`] says."""
    scale, cap = logit_transform(text_config)
    logits = head(hidden_states)
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def family_head(text_config):
    """
    The output head of a family's own causal language model, newly initialised.

    The family's model is built without layers and with few tokens, and asked for logits: what it does after the last
    layer has to be what [`project`] does.

    Args:
        text_config (`PreTrainedConfig`): of a text model of transformers.

    Returns:
        `nn.Linear`: from `hidden_size` to `vocab_size`, with a bias if the family's has one.

    Raises:
        ValueError: if the family has no causal language model, or one that does something unknown after the last layer.
    """
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has no causal language model for `{text_config.model_type}`: a student needs one."
        )
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    # a new config: implementations of attention and experts were chosen for the whole student
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # which are not among so few
    small = {"num_hidden_layers": 0, "layer_types": [], "vocab_size": 8, **no_tokens}
    try:
        config = type(text_config).from_dict({**text_config.to_dict(), **small})
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            family = causal_class._from_config(config, dtype=torch.float32).eval()
            for parameter in family.parameters():
                parameter.normal_()
            inputs = torch.randn(1, 2, config.hidden_size, dtype=torch.float32)
            expected = family(inputs_embeds=inputs).logits
            head = family.get_output_embeddings()
            found = project(family.base_model(inputs_embeds=inputs).last_hidden_state, head, config)
    except Exception as error:
        raise ValueError(
            f"The head of {causal_class.__name__} could not be read, so no student can have its logits: {error}"
        ) from error
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"{causal_class.__name__} changes its logits after `lm_head` in a way that is not known here: a student "
            "would not compute what it does."
        )
    return nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=head.bias is not None)


def _check_vision_tower(tower):
    """LLaVA's image features are of towers that need nothing but pixels."""
    needed = [
        name
        for name, parameter in inspect.signature(tower.forward).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if needed != ["pixel_values"] and needed:
        raise ValueError(
            f"The vision encoder {type(tower).__name__} needs {', '.join(needed)}: take one that needs `pixel_values` "
            "alone, as CLIP, SigLIP and SigLIP 2 at a fixed resolution do."
        )


@functools.cache
def _sparse_text_model_class(text_model_class, low_rank):
    """
    Subclass of a text model of transformers whose FFNs in `config.moe_layers` are mixtures of experts.

    A class of its own, since transformers keeps what a model can record (`router_logits`) by class: changing the stock
    class would change it for everybody. Low-rank experts have another, since how a file names the experts is kept by
    the class's name.
    """

    class SparseTextModel(text_model_class):
        _can_record_outputs = {
            **(text_model_class._can_record_outputs or {}),
            "router_logits": OutputRecorder(LlavaModTopKRouter, index=0),
        }

        def __init__(self, config):
            super().__init__(config)
            if not hasattr(self, "layers") or not hasattr(self.layers[0], "mlp"):
                raise ValueError(
                    f"{text_model_class.__name__} has no `layers[i].mlp`: mixture-of-experts layers need a language "
                    "model whose FFNs are there, as those of Llama and Qwen2 are."
                )
            for index in config.moe_layers:
                layer = self.layers[index]
                layer.mlp = LlavaModSparseMoeBlock(config, layer.mlp, f"language_model.layers.{index}.mlp")
            self.file_conversions = getattr(layer.mlp.experts, "file_conversions", list)()
            self.post_init()

        @classmethod
        def _can_set_experts_implementation(cls):
            # transformers keeps the answer by class, and here would find the stock class's, which has no experts
            return HAS_IMPLEMENTATIONS

        @torch.no_grad()
        def _init_weights(self, module):
            super()._init_weights(module)
            init_moe_weights(module, self.config.initializer_range)

    name = f"LlavaMod{'LowRank' if low_rank else ''}{text_model_class.__name__}"
    SparseTextModel.__name__ = SparseTextModel.__qualname__ = name
    return SparseTextModel


def _register_file_names(language_model, vision_tower):
    """How the names in a file become the model's: by class, or by type before 5.10, which may miss what a class has."""
    conversions = list(getattr(language_model, "file_conversions", []))
    if RELEASE >= (5, 10):
        if conversions:
            register_checkpoint_conversion_mapping(type(language_model).__name__, conversions, overwrite=True)
        return
    if hasattr(vision_tower, "vision_model"):  # the parts of an encoder lie a level deeper before 5.6 than in the file
        # the dot is not escaped, since a model that is saved takes the pattern for the name
        conversions.append(WeightRenaming("vision_tower.(?!vision_model)", "vision_tower.vision_model."))
    register_checkpoint_conversion_mapping("llava_mod", conversions, overwrite=True)


class LlavaModPreTrainedModel(LlavaPreTrainedModel):
    config_class = LlavaModConfig
    config: LlavaModConfig

    # accelerate's FSDP2 wants every one of these in the model, and SigLIP's list names layers of its text half too.
    def post_init(self):
        super().post_init()
        here = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in self._no_split_modules or () if name in here]

    # The plans of a family and of the experts name parts of dense and of sparse layers: a student may have one kind.
    def init_parallel_plans(self):
        super().init_parallel_plans()
        names = [name for name, _ in (*self.named_parameters(), *self.named_modules())]
        for plan in ("_tp_plan", "_ep_plan"):
            rules = getattr(self, plan, None) or {}
            patterns = {rule: re.escape(rule).replace(r"\*", r"\d+") + r"(\.weight|\.bias)?" for rule in rules}
            used = {rule for rule in rules if any(re.fullmatch(patterns[rule], name) for name in names)}
            setattr(self, plan, {rule: how for rule, how in rules.items() if rule in used})

    @classmethod
    def _can_set_experts_implementation(cls):
        # transformers keeps the answer by class, and `LlavaModModel` would find that of the stock `LlavaModel`
        return HAS_IMPLEMENTATIONS

    # In custom code transformers passes by modules without parameters of their own, in case they were loaded; but some
    # towers draw their linear layers from there, as CLIP's attention does. What is drawn here keeps what was loaded.
    @classmethod
    def is_custom_code(cls):
        return False

    # Once it has marked a tied head, transformers 5.3 takes it for one that the file had, and leaves it at random.
    def mark_tied_weights_as_initialized(self, *args, **kwargs):
        infos = [info for info in (*args, *kwargs.values()) if hasattr(info, "missing_keys")]
        tied = [info.missing_keys & self.all_tied_weights_keys.keys() for info in infos]
        super().mark_tied_weights_as_initialized(*args, **kwargs)
        for info, names in zip(infos, tied, strict=True):
            info.missing_keys |= names


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
        _check_vision_tower(self.vision_tower)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        if config.moe_layers:
            low_rank = config.expert_rank is not None
            text_model_class = _sparse_text_model_class(MODEL_MAPPING[type(text_config)], low_rank)
            self.language_model = text_model_class._from_config(text_config)
        else:
            self.language_model = AutoModel.from_config(text_config)
        _register_file_names(self.language_model, self.vision_tower)
        self.post_init()

    def _check_checkpointing(self, kwargs):
        checkpoint = getattr(self.language_model, "_gradient_checkpointing_func", None)
        reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
        # the flag of the modules, since what a model calls it is renamed in transformers 6
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.language_model.modules())
        active = checkpointed and self.training and torch.is_grad_enabled()
        if reentrant and active and kwargs.get("output_router_logits"):
            raise ValueError(
                "Reentrant gradient checkpointing runs the routers without a gradient, so the router's losses would "
                "train nothing: give `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        **kwargs,
    ) -> LlavaModModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Token ids, one `<image>` placeholder per image feature. This or `inputs_embeds`.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`, *optional*):
                The images of the whole batch, in the order of their placeholders.
            attention_mask, position_ids, inputs_embeds, kwargs:
                As in the language model; the cache of a prefix, too, by the name that it has there.
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

        self._check_checkpointing(kwargs)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            router_logits=outputs.get("router_logits"),
            **{CACHE: outputs.get(CACHE)},
        )


class LlavaModForConditionalGeneration(LlavaModPreTrainedModel, GenerationMixin):
    """[`LlavaModModel`] with a language-modelling head: the student that is trained, published and loaded."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaModConfig):
        super().__init__(config)
        self.model = LlavaModModel(config)
        text_config = config.get_text_config()
        self.lm_head = family_head(text_config)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_image_features(self, pixel_values, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)

    # Not every version of transformers leaves out the pictures of tokens that the cache holds already.
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        token_ids, cache = inputs.get("input_ids"), inputs.get(CACHE)
        if token_ids is not None and cache is not None and cache.get_seq_length():
            # not by the placeholder alone: a model may answer with one
            seen = token_ids.shape[1] == 1 or not (token_ids == self.config.image_token_index).any()
            inputs["pixel_values"] = None if seen else inputs.get("pixel_values")
        return inputs

    # parameters: the names by which transformers' `generate` and trainers give them
    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        labels=None,
        logits_to_keep=0,
        output_router_logits=None,
        **kwargs,
    ) -> LlavaModCausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Unshifted labels, −100 ignored; with them the loss is returned.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions to project, as in transformers: the last `n` (0: all), indices, or a boolean
                `(batch, sequence)` mask, with which `logits` has shape `(positions, vocabulary)`.
            output_router_logits (`bool`, *optional*, defaults to the config's):
                Return `router_logits`, and with `labels` also `aux_loss`; it and the z-loss are weighted and added to
                the loss.

        The other arguments are those of [`LlavaModModel`].

        Returns:
            [`LlavaModCausalLMOutputWithPast`].
        """
        text_config: Any = self.config.text_config
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = project(rows_to_project(outputs.last_hidden_state, logits_to_keep), self.lm_head, text_config)

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
            if output_router_logits and outputs.router_logits is not None:
                aux_loss, z_loss = router_losses(outputs.router_logits, text_config, attention_mask)
                loss = loss + text_config.router_aux_loss_coef * aux_loss + text_config.router_z_loss_coef * z_loss
        return LlavaModCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits if output_router_logits else None,
            **{CACHE: outputs.get(CACHE)},
        )


LlavaModModel.register_for_auto_class("AutoModel")

LlavaModForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

AutoModel.register(LlavaModConfig, LlavaModModel, exist_ok=True)

AutoModelForImageTextToText.register(LlavaModConfig, LlavaModForConditionalGeneration, exist_ok=True)

__all__ = ["LlavaModForConditionalGeneration", "LlavaModModel", "LlavaModPreTrainedModel"]
