"""Students with weights of 8 or 4 bits, packed experts included; see `docs/quantisation.md`."""

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from llava_mod_hf.loading import load_whole, resolve
from llava_mod_hf.model.moe_llava_mod import LlavaModExperts

# The matrices of the decoder layers. Not the router, a thousandth of the size, whose rounding flips the choice of
# expert; not the encoder, the adaptor, the embeddings and the head.
LINEAR = r"re:.*language_model\.layers\..*\.(\w+_proj|fc1|fc2|dense)\.weight"

EXPERTS = r"re:.*language_model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|up_proj|down_proj)"

KEPT = ["vision_tower", "multi_modal_projector", "lm_head", "coefficient"]

BLOCK = 64  # values of a row that share a scale in NF4

NEEDS = {8: "torchao", 4: "bitsandbytes"}


def quantization_config(bits=8):
    """
    What `from_pretrained(…, quantization_config=…)` takes to load a student with lighter decoder layers.

    Args:
        bits (`int`, *optional*, defaults to 8):
            8: torchao's int8, one scale per row, dense layers and packed experts, on a CPU or a GPU; can be saved.
            4: bitsandbytes' NF4 for the dense layers alone: [`load_quantised`] packs the experts as well.

    Raises:
        ValueError: if `bits` is neither, or its library is not installed.
    """
    if bits not in NEEDS:
        raise ValueError(f"`bits` is {bits!r}: give 8 (torchao) or 4 (bitsandbytes).")
    try:
        if bits == 4:
            import bitsandbytes  # noqa: F401 (transformers would look for it only when it loads)

            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype="bfloat16",
                llm_int8_skip_modules=[*KEPT, *(f"model.{part}" for part in KEPT)],
            )
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError(
            f"Weights of {bits} bits need {NEEDS[bits]}: install it with `pip install llava-mod-hf[quantization]`."
        ) from error
    config = Int8WeightOnlyConfig(version=2)  # version 1 does not take three dimensions
    return TorchAoConfig(FqnToConfig({LINEAR: config, EXPERTS: config}))


def load_quantised(name, *, bits=8, dtype="bfloat16", trust_remote_code=False, **kwargs):
    """
    A student with lighter decoder layers, experts included.

    Args:
        name (`str`): Hub name, folder or `embedded:…` name of a student in full precision.
        bits (`int`, *optional*, defaults to 8): as for [`quantization_config`]; with 4 it is for inference only, and
            cannot be saved.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): of what is not quantised, and of the arithmetic.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
        kwargs: further arguments of `from_pretrained`, such as `device_map`.

    Returns:
        `PreTrainedModel`.
    """
    config = quantization_config(bits)
    if bits == 4:
        config.bnb_4bit_compute_dtype = getattr(torch, dtype)
    model = load_whole(
        AutoModelForImageTextToText,
        resolve(str(name)),
        quantization_config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    if bits == 4:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for module in model.modules():
            if type(module).__name__ == LlavaModExperts.__name__:  # of this package, or of the checkpoint's code
                for packed in ("down_proj", module.first):
                    _check_blocks(module.get_parameter(packed), packed)
                    replace_parameter_4bit(module, packed, quant_type="nf4", blocksize=BLOCK)
    return model


def _check_blocks(parameter, name):
    # bitsandbytes' kernel for the CPU takes the scales of other rows for a block that ends in the next row
    if parameter.shape[-1] % BLOCK:
        raise ValueError(
            f"The experts' `{name}` has rows of {parameter.shape[-1]} values: 4 bits need a multiple of {BLOCK}, "
            "8 bits do not."
        )


def bytes_in_memory(model):
    """Bytes of a model's parameters as they are held, with the scales of quantised ones, tied ones once."""
    tensors = []
    for parameter in model.parameters():
        parts = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
        tensors += [getattr(parameter, part) for part in parts] or [parameter]
    for module in model.modules():
        # bitsandbytes keeps the scales beside the weight of a layer, or in the parametrization of a packed tensor
        state = getattr(getattr(module, "weight", None), "quant_state", None) or getattr(module, "quant_state", None)
        tensors += [] if state is None else [state.absmax, state.code]
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
