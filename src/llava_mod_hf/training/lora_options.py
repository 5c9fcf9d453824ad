"""Options of low-rank adapters, apart from what makes them, so that `--help` need not import that."""

import dataclasses
from dataclasses import dataclass, field

# word → the parts of `train_modules` that hold what it names
TARGETS = {
    "attention": ("language_model",),
    "ffn": ("language_model", "ffn"),
    "experts": ("language_model", "ffn"),
    "router": ("language_model", "ffn"),
}

ALL = "all"

OF_PARAMETERS = ("experts", "router")  # which peft adapts as parameters, not as modules


@dataclass
class LoraOptions:
    """
    A low-rank adapter in place of the weights themselves; the names and defaults are those of [`~trl.ModelConfig`].

    Args:
        use_peft (`bool`, *optional*, defaults to `False`): train an adapter, and save it alone.
        lora_target (`list[str]`, *optional*):
            What of the language model is adapted, of `attention`, `ffn` (of dense layers), `experts`, `router`, or
            `all`, the default: of these what the student has.
        lora_r (`int`, *optional*, defaults to 16): rank, of each expert too.
        lora_alpha (`int`, *optional*, defaults to 32): the adapter counts `lora_alpha / lora_r` times.
        lora_dropout (`float`, *optional*, defaults to 0.0): TRL's default is 0.05; experts and routers allow none.
        lora_target_modules (`list[str]`, *optional*), lora_target_parameters (`list[str]`, *optional*):
            What is adapted in peft's own words, in place of `lora_target`.
        lora_modules_to_save (`list[str]`, *optional*):
            Modules that are trained as a whole and saved with the adapter; by default the adaptor, unless
            `train_modules` leaves it out.
        use_rslora (`bool`, *optional*, defaults to `False`), use_dora (`bool`, *optional*, defaults to `False`):
            Variants of LoRA; DoRA has none of experts and routers.
    """

    use_peft: bool = False
    lora_target: list[str] | None = field(default=None)
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = field(default=None)
    lora_target_parameters: list[str] | None = field(default=None)
    lora_modules_to_save: list[str] | None = field(default=None)
    use_rslora: bool = False
    use_dora: bool = False


def check_lora(options):
    """
    Raises:
        ValueError: if an option does nothing without `use_peft` or beside another one, a value is none that peft takes,
            or `lora_target` names what there is not, or what `train_modules` does not train.
    """
    values = {item.name: getattr(options, item.name) for item in dataclasses.fields(LoraOptions)}
    for item in dataclasses.fields(LoraOptions):
        if not options.use_peft and values[item.name] != item.default:
            raise ValueError(
                f"`{item.name}` is {values[item.name]!r}, which does nothing without `use_peft`: give that too, or "
                "neither."
            )
    if options.lora_r < 1 or options.lora_alpha <= 0 or not 0 <= options.lora_dropout < 1:
        raise ValueError(
            f"`lora_r` is {options.lora_r}, `lora_alpha` {options.lora_alpha} and `lora_dropout` "
            f"{options.lora_dropout}: give a rank and an alpha above 0, and a share from 0 to 1."
        )
    words = _as_list(options.lora_target)
    if options.lora_target is not None and (not words or any(word not in (*TARGETS, ALL) for word in words)):
        raise ValueError(f"`lora_target` is {options.lora_target!r}: give some of {', '.join(TARGETS)}, or `{ALL}`.")
    own = options.lora_target_modules or options.lora_target_parameters
    if words and own:
        raise ValueError(
            f"`lora_target` is {options.lora_target!r} beside {own!r} in peft's own words: give one of the two."
        )
    check_parameters(options, [word for word in words if word in OF_PARAMETERS] or options.lora_target_parameters)
    if options.train_modules is None:
        return
    for word in words:
        if word != ALL and not set(TARGETS[word]) & set(options.train_modules):
            raise ValueError(
                f"`lora_target` names `{word}`, and `train_modules` is {options.train_modules!r}: add "
                f"{' or '.join(TARGETS[word])} there, or leave it out here."
            )


def check_parameters(options, named):
    """
    Raises:
        ValueError: if parameters are adapted by what peft has for modules alone.
    """
    refused = {"lora_dropout": options.lora_dropout, "use_dora": options.use_dora}
    for name, value in refused.items():
        if named and value:
            raise ValueError(
                f"`{name}` is {value!r}, which peft does not have for parameters such as {', '.join(named)}: leave it "
                "out, or give `lora_target: [attention, ffn]`."
            )


def targets(options):
    """The words of `lora_target`, and whether all of them have to be there."""
    words = _as_list(options.lora_target) or [ALL]
    return (list(TARGETS), False) if ALL in words else (words, True)


def _as_list(value):
    return [] if value is None else [value] if isinstance(value, str) else list(value)
