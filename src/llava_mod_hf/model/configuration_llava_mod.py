"""Configuration of the LLaVA-MoD student. Ships to the Hub with every checkpoint."""

import difflib
import inspect
from dataclasses import fields, is_dataclass

import transformers
from transformers import AutoConfig, GenerationConfig, LlavaConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

LOWEST_TRANSFORMERS = "5.0"  # `make test-versions` compares every minor version from this one on


def release(version):
    """Major and minor number."""
    return tuple(int(part) for part in version.split(".")[:2])


if release(transformers.__version__) < release(LOWEST_TRANSFORMERS):
    raise ImportError(
        f"This model is for transformers {LOWEST_TRANSFORMERS} and newer, and {transformers.__version__} is installed: "
        "run `pip install --upgrade transformers`."
    )

MOE_DEFAULTS = {
    "moe_layers": [],
    "num_experts": 4,  # paper, table 1: 4 experts
    "num_experts_per_tok": 2,  # paper, table 1: top-2
    "expert_rank": None,
    "use_residual": False,  # authors' scripts, `use_residual`
    "router_aux_loss_coef": 0.01,  # authors' scripts, `router_aux_loss_coef`
    "router_aux_loss_type": "switch",  # as DeepSpeed computes it for the authors
    "router_z_loss_coef": 0.0,
    "router_bias": False,
    "output_router_logits": False,
}

ROUTER_AUX_LOSS_TYPES = ("switch", "pooled")


def check_router_aux_loss_type(value):
    """
    Raises:
        ValueError: if there is no load-balancing loss of that name.
    """
    if value not in ROUTER_AUX_LOSS_TYPES:
        raise ValueError(f"`router_aux_loss_type` is {value!r}: give {' or '.join(map(repr, ROUTER_AUX_LOSS_TYPES))}.")


AUTO_MAP = {
    "AutoConfig": "configuration_llava_mod.LlavaModConfig",
    "AutoModel": "modeling_llava_mod.LlavaModModel",
    "AutoModelForImageTextToText": "modeling_llava_mod.LlavaModForConditionalGeneration",
}

# What transformers, its Trainer and older versions of both write into a `config.json` beside the declared fields.
WRITTEN_BY_TRANSFORMERS = {
    "model_type", "auto_map", "name_or_path", "torch_dtype", "num_labels", "output_attentions", "attn_implementation",
    "experts_implementation", "quantization_config", "per_layer_config", "tie_last_hidden_states", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class", "custom_pipelines",
    "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "decoder_start_token_id", "finetuning_task",
    "prefix", "pruned_heads", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "torchscript",
    "use_bfloat16", "ignore_index", "vocab_size", "transformers_version", "chunk_size_feed_forward",
}  # fmt: skip


def _text_field(name, dense_value):
    def read(config):
        return getattr(config.text_config, name, dense_value)

    def write(config, value):
        setattr(config.text_config, name, value)

    return property(read, write, doc=f"`{name}` of the text config.")


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


class LlavaModConfig(LlavaConfig):
    """
    Configuration of a LLaVA whose language model has mixture-of-experts layers where `moe_layers` says.

    The mixture-of-experts fields live on the text config, where transformers and TRL read them
    (`config.get_text_config().num_experts`, …); they are accepted and readable here as well, so that there is one
    stored value of each. With `moe_layers=[]` the student is dense and the text config has none of them.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Vision encoder: any with `hidden_states` of shape `(images, tokens, width)`, such as CLIP or SigLIP.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Language model: any text model of transformers with FFNs at `layers[i].mlp` that experts can reproduce.
        moe_layers (`list[int]`, *optional*, defaults to the text config's, else `[]`):
            Indices of the layers whose FFN is a mixture of experts.
        num_experts (`int`, *optional*, defaults to 4):
            Experts of each such layer (paper, table 1).
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Experts that each token is sent to (paper, table 1). With 1 the gate is always 1, and the router learns from
            its aux loss alone: scaling by the probability, as the Switch Transformer does, would not keep the dense
            model's logits when a student is upcycled.
        expert_rank (`int`, *optional*):
            Rank of each expert's difference from the one FFN that they then share; by default experts are whole FFNs.
        use_residual (`bool`, *optional*, defaults to `False`):
            Keep the dense FFN beside the experts, the two weighted by a learned softmax (MoE-LLaVA's `use_residual`).
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the router's load-balancing loss (authors' scripts).
        router_aux_loss_type (`str`, *optional*, defaults to `"switch"`):
            `"switch"`: first choices only, summed over layers, as the authors train. `"pooled"`: all choices, the
            layers pooled, as transformers computes it, and as TRL's trainers do whatever this field says.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the router's z-loss (ST-MoE, eq. 5), summed over layers; the authors have none.
        router_bias (`bool`, *optional*, defaults to `False`):
            Whether each router has a bias per expert, which is added to the probabilities for the choice of experts
            alone, not for the gates (arXiv 2408.15664). Written into the file of those students only that have one.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether `forward` returns the router logits and adds the router's losses.
        kwargs:
            Fields of [`~transformers.LlavaConfig`]; others are kept, with a warning that names them.

    Raises:
        ValueError: if a layer index is out of range or repeated, `num_experts_per_tok` is not between 1 and
            `num_experts`, or a value is of the wrong kind.
    """

    model_type = "llava_mod"
    # How `from_pretrained(distributed_config=…)` shards the experts; the rest is in the language model's own plans.
    # Here, not on the text config, whose plans belong to the family's class and so to all of its models.
    base_model_tp_plan = {
        "language_model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "language_model.layers.*.mlp.experts.down_proj": "rowwise",
        "language_model.layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "language_model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",  # type: ignore[dict-item]
        "language_model.layers.*.mlp.experts.down_proj": "grouped_gemm",  # type: ignore[dict-item]
        "language_model.layers.*.mlp.experts": "ep_dispatch_experts",  # type: ignore[dict-item]
    }

    # Properties, not fields: those would be a second copy, stale as soon as a trainer changes the text config's.
    moe_layers = _text_field("moe_layers", [])
    num_experts = _text_field("num_experts", None)
    num_experts_per_tok = _text_field("num_experts_per_tok", None)
    expert_rank = _text_field("expert_rank", None)
    use_residual = _text_field("use_residual", False)
    router_aux_loss_coef = _text_field("router_aux_loss_coef", 0.0)
    router_aux_loss_type = _text_field("router_aux_loss_type", None)
    router_z_loss_coef = _text_field("router_z_loss_coef", 0.0)
    router_bias = _text_field("router_bias", False)
    output_router_logits = _text_field("output_router_logits", False)

    # Written out, since transformers made configs dataclasses with a `__post_init__` in 5.4 only.
    def __init__(self, **kwargs):
        self._tell_unknown_names(kwargs)
        given = {name: kwargs.pop(name) for name in MOE_DEFAULTS if name in kwargs}
        super().__init__(**kwargs)
        # `save_pretrained` writes the entries of the classes that it saves: `AutoModel` would be missing
        self.auto_map = dict(AUTO_MAP)
        self._set_moe({name: value for name, value in given.items() if value is not None})

    def _set_moe(self, given):
        text_config = self.text_config
        was_sparse = bool(getattr(text_config, "moe_layers", []))
        if not given.get("moe_layers", was_sparse):
            # TRL takes a text config with `output_router_logits` for a mixture of experts: a dense student has none.
            for name in MOE_DEFAULTS if was_sparse else ():
                if hasattr(text_config, name):
                    delattr(text_config, name)
            return
        for name, default in MOE_DEFAULTS.items():
            setattr(text_config, name, given.get(name, getattr(text_config, name, default)))
        self._check_moe()
        text_config.moe_layers = sorted(text_config.moe_layers)
        if not text_config.router_bias:  # what was computed by a student of before is still its own
            del text_config.router_bias

    @classmethod
    def known_fields(cls):
        """Names that the constructor takes and that stand for something, in this class or in transformers."""
        if is_dataclass(LlavaConfig):
            declared = {field.name for field in fields(LlavaConfig)}
        else:
            parents = (parent.__init__ for parent in LlavaConfig.__mro__[:2])
            declared = {name for parent in parents for name in inspect.signature(parent).parameters}
        return declared | set(MOE_DEFAULTS) | set(cls.attribute_map)

    def _tell_unknown_names(self, kwargs):
        """A checkpoint of tomorrow loads today: a field that nothing reads is kept, as in transformers' models."""
        known = self.known_fields()
        passed = known | WRITTEN_BY_TRANSFORMERS | set(GenerationConfig._get_default_generation_params())
        # a name with an underscore is transformers' own, never a user's
        unknown = sorted(name for name in kwargs if name not in passed and not name.startswith("_"))
        if unknown:
            nearest = {name: difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0] for name in unknown}
            logger.warning_once(
                f"{type(self).__name__} keeps fields that it does not read: "
                + ", ".join(f"`{name}` (the nearest that it reads is `{near}`)" for name, near in nearest.items())
            )

    def _check_moe(self):
        layers, num_layers = self.moe_layers, self.text_config.num_hidden_layers
        wanted = {
            "moe_layers": ("a list of integers", isinstance(layers, list | tuple) and all(map(_is_integer, layers))),
            "num_experts": ("an integer", _is_integer(self.num_experts)),
            "num_experts_per_tok": ("an integer", _is_integer(self.num_experts_per_tok)),
            "expert_rank": (
                "an integer of at least 1, or nothing for experts that are whole FFNs",
                self.expert_rank is None or (_is_integer(self.expert_rank) and self.expert_rank >= 1),
            ),
            "use_residual": ("true or false", isinstance(self.use_residual, bool)),
            "router_aux_loss_coef": ("a number", isinstance(self.router_aux_loss_coef, int | float)),
            "router_z_loss_coef": ("a number", isinstance(self.router_z_loss_coef, int | float)),
            "router_bias": ("true or false", isinstance(self.router_bias, bool)),
            "output_router_logits": ("true or false", isinstance(self.output_router_logits, bool)),
        }
        for name, (expected, fits) in wanted.items():
            if not fits:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: give {expected}.")
        check_router_aux_loss_type(self.router_aux_loss_type)
        if len(set(layers)) != len(layers) or min(layers) < 0 or max(layers) >= num_layers:
            raise ValueError(
                f"`moe_layers` is {sorted(layers)}, but the language model has {num_layers} layers: give distinct "
                f"indices from 0 to {num_layers - 1}."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` is {self.num_experts_per_tok} and `num_experts` is {self.num_experts}: each "
                "token can be sent to between 1 and all of the experts."
            )
        if self.num_experts_per_tok == 1 < self.num_experts:
            logger.warning_once(
                "`num_experts_per_tok` is 1: the gate of the one expert is always 1, so the router learns nothing from "
                "the answers, and from its aux loss alone. Give 2 or more to let it learn."
            )


LlavaModConfig.register_for_auto_class()

AutoConfig.register("llava_mod", LlavaModConfig, exist_ok=True)

__all__ = ["LlavaModConfig"]
