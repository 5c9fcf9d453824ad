"""What accelerate's FSDP2 wraps of a student."""

import functools

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin

from llava_mod_hf import load_model_and_processor, upcycle


@functools.cache
def siglip_student():
    model, _ = load_model_and_processor("embedded:tiny-teacher")
    return model


@pytest.mark.parametrize("grow", [lambda model: model, upcycle], ids=["dense", "sparse"])
def test_every_layer_that_is_to_be_wrapped_is_in_the_model(grow):
    model = grow(siglip_student())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)  # raises where a class of the list is not there
    assert {"SiglipEncoderLayer", "LlamaDecoderLayer"} <= set(model._no_split_modules)
