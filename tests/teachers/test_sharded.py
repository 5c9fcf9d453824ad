"""What is spread over processes, in one: DeepSpeed's and FSDP2's marks on models and parameters."""

import json

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from helpers.models import make_dense
from llava_mod_hf.losses.rows import Head
from llava_mod_hf.teachers import sharded


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_whole_head_is_the_parameters_themselves(with_bias):
    weight, bias = torch.nn.Parameter(torch.rand(5, 3)), torch.nn.Parameter(torch.rand(5)) if with_bias else None
    head = sharded.whole_head(Head(weight, bias, None, 1.0), slice(4))
    assert head.weight.data_ptr() == weight.data_ptr()
    assert head.weight.shape == (4, 3)
    assert (head.bias is None) == (bias is None)


def test_a_model_is_saved_with_its_own_code_and_class(tmp_path):
    model = make_dense("llama")
    own = type(model)
    model.__class__ = type(f"FSDP{own.__name__}", (FSDPModule, own), {})  # as `fully_shard` does
    wrapped = type(model)
    with sharded.of_its_own_class(model):
        model.save_pretrained(tmp_path)
    assert type(model) is wrapped
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"]["AutoModelForImageTextToText"] == f"modeling_llava_mod.{own.__name__}"
    assert (tmp_path / "modeling_llava_mod.py").is_file()
    with pytest.raises(KeyError), sharded.of_its_own_class(model):
        raise KeyError
    assert type(model) is wrapped
