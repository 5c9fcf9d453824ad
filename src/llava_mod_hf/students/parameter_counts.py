"""How many parameters a student has, and how many of them a token passes."""

from typing import NamedTuple

from llava_mod_hf.model.moe_llava_mod import LlavaModTopKRouter

PARTS = ("vision", "adaptor", "embeddings", "attention", "ffn", "experts", "router", "norms", "head")


class Count(NamedTuple):
    """Parameters, and those active for a token, which passes `num_experts_per_tok` experts of each layer."""

    total: int
    active: int


def _parts_of_layer(layer):
    """The parameters of a decoder layer by part, the inner ones first; what is left of it are the norms."""
    mlp = getattr(layer, "mlp", None)
    for module in [] if mlp is None else mlp.modules():
        # without what is below it: the FFN that low-rank experts share, which every token passes
        own = list(module.parameters(recurse=False))
        if hasattr(module, "num_experts") and any(parameter.ndim == 3 for parameter in own):
            yield "experts", own  # packed tensors, the expert first: ours, and those of transformers' own families
        elif isinstance(module, LlavaModTopKRouter) or (hasattr(module, "num_experts") and own):
            yield "router", own
        elif hasattr(module, "coefficient"):  # weighs the experts against the dense FFN kept beside them
            yield "router", module.coefficient.parameters()
    if mlp is not None:
        yield "ffn", mlp.parameters()
    if hasattr(layer, "self_attn"):
        yield "attention", layer.self_attn.parameters()


def parameter_parts(model):
    """
    Parameters of a student or a stock LLaVA by part, tied weights once; a model on the meta device will do.

    Args:
        model (`PreTrainedModel`): a LLaVA of this package or of transformers, or another vision-language model.

    Returns:
        `dict[str, Count]`: `vision`, `adaptor`, `embeddings`, `attention`, `ffn` (dense FFNs, also those kept beside
        experts or shared by them), `experts`, `router`, `norms` (whatever else the language model has) and `head` (0
        if it is tied to the embeddings). The counts add up to those of the model.
    """
    llava = model.base_model
    language_model = llava.language_model
    groups = [
        ("vision", _parameters(llava, "vision_tower", "visual")),  # a teacher may be Qwen-VL, whose adaptor is inside
        ("adaptor", _parameters(llava, "multi_modal_projector")),
        ("embeddings", language_model.get_input_embeddings().parameters()),
        *(group for layer in getattr(language_model, "layers", []) for group in _parts_of_layer(layer)),
        ("norms", language_model.parameters()),
        ("head", model.parameters()),
    ]
    text_config = model.config.get_text_config()
    totals, idle, seen = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0), set()
    for part, parameters in groups:
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                totals[part] += parameter.numel()
                if part == "experts":
                    unused = text_config.num_experts - text_config.num_experts_per_tok
                    idle[part] += parameter.numel() // text_config.num_experts * unused
    return {part: Count(totals[part], totals[part] - idle[part]) for part in PARTS}


def _parameters(model, *names):
    """Parameters of the first part that a model has, none without any."""
    part = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    return [] if part is None else part.parameters()


def _sum(counts):
    return Count(*(sum(values) for values in zip(*counts, strict=True)))


def count_parameters(model):
    """
    Parameters of a student or a stock LLaVA, vision tower, embeddings and routers included, tied weights once.

    Returns:
        [`Count`]: all, and those active for a token, which passes `num_experts_per_tok` experts of each layer.
    """
    return _sum(parameter_parts(model).values())


def student_parameters(model):
    """[`count_parameters`] of the language model and the adaptor, without the vision tower."""
    return _sum(count for part, count in parameter_parts(model).items() if part != "vision")
