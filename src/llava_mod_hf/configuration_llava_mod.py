"""Configuration of the LLaVA-MoD student. Ships to the Hub with every checkpoint."""

from transformers import AutoConfig, LlavaConfig

MOE_DEFAULTS = {
    "moe_layers": [],
    "num_experts": 4,  # paper, table 1: 4 experts
    "num_experts_per_tok": 2,  # paper, table 1: top-2
    "router_aux_loss_coef": 0.01,  # authors' scripts, `router_aux_loss_coef`
    "output_router_logits": False,
}

AUTO_MAP = {
    "AutoConfig": "configuration_llava_mod.LlavaModConfig",
    "AutoModel": "modeling_llava_mod.LlavaModModel",
    "AutoModelForImageTextToText": "modeling_llava_mod.LlavaModForConditionalGeneration",
}


def _text_field(name, dense_value):
    def read(config):
        return getattr(config.text_config, name, dense_value)

    def write(config, value):
        setattr(config.text_config, name, value)

    return property(read, write, doc=f"`{name}` of the text config.")


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
            Language model: any text model of transformers with gated FFNs at `layers[i].mlp`.
        moe_layers (`list[int]`, *optional*, defaults to the text config's, else `[]`):
            Indices of the layers whose FFN is a mixture of experts.
        num_experts (`int`, *optional*, defaults to 4):
            Experts of each such layer (paper, table 1).
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Experts that each token is sent to (paper, table 1).
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the router's load-balancing loss (authors' scripts).
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether `forward` returns the router logits and adds the load-balancing loss.
        kwargs:
            Fields of [`~transformers.LlavaConfig`].

    Raises:
        ValueError: if a layer index is out of range or repeated, or if `num_experts_per_tok` is not between 1 and
            `num_experts`.
    """

    model_type = "llava_mod"

    # Properties, not fields: those would be a second copy, stale as soon as a trainer changes the text config's.
    moe_layers = _text_field("moe_layers", [])
    num_experts = _text_field("num_experts", None)
    num_experts_per_tok = _text_field("num_experts_per_tok", None)
    router_aux_loss_coef = _text_field("router_aux_loss_coef", 0.0)
    output_router_logits = _text_field("output_router_logits", False)

    def __post_init__(self, **kwargs):
        given = {name: kwargs.pop(name) for name in MOE_DEFAULTS if kwargs.get(name) is not None}
        super().__post_init__(**kwargs)
        # `save_pretrained` writes the entries of the classes that it saves: `AutoModel` would be missing
        self.auto_map = dict(AUTO_MAP)
        text_config = self.text_config
        was_sparse = bool(getattr(text_config, "moe_layers", []))
        if not given.get("moe_layers", was_sparse):
            # TRL takes a text config with `output_router_logits` for a mixture of experts: a dense student has none.
            for name in MOE_DEFAULTS if was_sparse else ():
                delattr(text_config, name)
            return
        for name, default in MOE_DEFAULTS.items():
            setattr(text_config, name, given.get(name, getattr(text_config, name, default)))
        text_config.moe_layers = sorted(text_config.moe_layers)
        self._check_moe()

    def _check_moe(self):
        layers, num_layers = self.moe_layers, self.text_config.num_hidden_layers
        if len(set(layers)) != len(layers) or layers[0] < 0 or layers[-1] >= num_layers:
            raise ValueError(
                f"`moe_layers` is {layers}, but the language model has {num_layers} layers: give distinct indices from "
                f"0 to {num_layers - 1}."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` is {self.num_experts_per_tok} and `num_experts` is {self.num_experts}: each "
                "token can be sent to between 1 and all of the experts."
            )


LlavaModConfig.register_for_auto_class()
AutoConfig.register("llava_mod", LlavaModConfig, exist_ok=True)

__all__ = ["LlavaModConfig"]
