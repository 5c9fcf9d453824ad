"""The configuration: one stored value of each mixture-of-experts field, checked."""

import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from llava_mod_hf import LlavaModConfig
from llava_mod_hf.model import configuration_llava_mod as config_module

SPARSE = {
    "moe_layers": [2, 0],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "expert_rank": 2,
    "use_residual": True,
    "router_aux_loss_coef": 0.25,
    "router_aux_loss_type": "pooled",
    "router_z_loss_coef": 0.125,
    "output_router_logits": True,
}
MOE_FIELDS = tuple(SPARSE)


def make_config(**values):
    return LlavaModConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2},
        text_config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3},
        **values,
    )


def moe_values(config):
    return {name: getattr(config, name) for name in MOE_FIELDS}


def test_moe_fields_are_stored_once_on_the_text_config(tmp_path):
    config = make_config(**SPARSE)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())

    expected = SPARSE | {"moe_layers": [0, 2]}
    assert {name: stored["text_config"][name] for name in MOE_FIELDS} == expected
    assert not set(MOE_FIELDS) & set(stored)
    assert moe_values(config) == expected
    assert all(name not in vars(config) for name in MOE_FIELDS)


@pytest.mark.parametrize(("name", "value"), [("router_aux_loss_coef", 0.5), ("output_router_logits", False)])
def test_what_a_trainer_sets_on_the_text_config_is_what_everybody_reads(tmp_path, name, value):
    config = make_config(**SPARSE)
    setattr(config.get_text_config(), name, value)
    config.save_pretrained(tmp_path)
    for read in (config, LlavaModConfig.from_pretrained(tmp_path)):
        assert getattr(read, name) == getattr(read.get_text_config(), name) == value


def test_setting_a_field_on_top_sets_it_on_the_text_config():
    config = make_config(**SPARSE)
    config.router_aux_loss_coef = 0.125
    assert config.get_text_config().router_aux_loss_coef == 0.125


def test_defaults_are_the_papers():
    config = make_config(moe_layers=[0])
    assert (config.num_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == (4, 2, 0.01)
    assert config.output_router_logits is False
    assert (config.router_aux_loss_type, config.router_z_loss_coef) == ("switch", 0.0)
    assert (config.expert_rank, config.use_residual) == (None, False)


def test_a_dense_students_text_config_is_that_of_its_family():
    config = make_config()
    # TRL takes a text config with `output_router_logits` for a mixture of experts
    assert not any(hasattr(config.get_text_config(), name) for name in MOE_FIELDS)
    assert config.text_config.to_dict() == LlamaConfig(hidden_size=32, num_hidden_layers=3).to_dict()
    assert moe_values(config) == {
        "moe_layers": [],
        "num_experts": None,
        "num_experts_per_tok": None,
        "expert_rank": None,
        "use_residual": False,
        "router_aux_loss_coef": 0.0,
        "router_aux_loss_type": None,
        "router_z_loss_coef": 0.0,
        "output_router_logits": False,
    }


def test_a_sparse_students_text_config_can_be_made_dense():
    config = LlavaModConfig(text_config=make_config(**SPARSE).text_config, moe_layers=[])
    assert config.moe_layers == []
    assert not any(hasattr(config.get_text_config(), name) for name in MOE_FIELDS)


@pytest.mark.parametrize("values", [{}, SPARSE], ids=["dense", "sparse"])
def test_round_trips(tmp_path, values):
    config = make_config(vision_feature_layer=-1, image_token_index=7, **values)
    config.save_pretrained(tmp_path)
    for loaded in (
        LlavaModConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        LlavaModConfig.from_dict(config.to_dict()),
    ):
        assert type(loaded) is LlavaModConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert moe_values(loaded) == moe_values(config)
        assert loaded.image_token_index == 7


def test_loading_can_override_a_field(tmp_path):
    make_config(**SPARSE).save_pretrained(tmp_path)
    assert LlavaModConfig.from_pretrained(tmp_path, output_router_logits=False).output_router_logits is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moe_layers": [0, 3]}, r"`moe_layers` is \[0, 3\].* 3 layers.* 0 to 2"),
        ({"moe_layers": [-1]}, r"`moe_layers` is \[-1\].* 0 to 2"),
        ({"moe_layers": [1, 0, 1]}, r"`moe_layers` is \[0, 1, 1\].*distinct"),
        ({"moe_layers": [0], "num_experts_per_tok": 5}, "`num_experts_per_tok` is 5 and `num_experts` is 4"),
        ({"moe_layers": [0], "num_experts": 1}, "`num_experts_per_tok` is 2 and `num_experts` is 1"),
        ({"moe_layers": [0], "num_experts_per_tok": 0}, "`num_experts_per_tok` is 0"),
        ({"moe_layers": [0], "expert_rank": 0}, "`expert_rank` is 0: give an integer of at least 1, or nothing"),
        ({"moe_layers": [0], "num_experts": "4"}, "`num_experts` is '4': give an integer"),
        ({"moe_layers": [0], "num_experts_per_tok": True}, "`num_experts_per_tok` is True: give an integer"),
        ({"moe_layers": "alternate"}, "`moe_layers` is 'alternate': give a list of integers"),
        ({"moe_layers": [0], "use_residual": "no"}, "`use_residual` is 'no': give true or false"),
        ({"moe_layers": [0], "router_aux_loss_coef": "0.1"}, "`router_aux_loss_coef` is '0.1': give a number"),
        ({"moe_layers": [0], "router_z_loss_coef": [1]}, r"`router_z_loss_coef` is \[1\]: give a number"),
        ({"moe_layers": [0], "router_aux_loss_type": "mean"}, "`router_aux_loss_type` is 'mean': give 'switch' or"),
        ({"moe_layers": [0], "output_router_logits": 1}, "`output_router_logits` is 1: give true or false"),
    ],
)
def test_impossible_experts_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make_config(**values)


def test_auto_map_names_all_three_classes(tmp_path):
    make_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_llava_mod.LlavaModConfig",
        "AutoModel": "modeling_llava_mod.LlavaModModel",
        "AutoModelForImageTextToText": "modeling_llava_mod.LlavaModForConditionalGeneration",
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("num_expert", "num_experts"),
        ("moe_layer", "moe_layers"),
        ("vision_feature_layers", "vision_feature_layer"),
        ("router_aux_coef", "router_aux_loss_coef"),
    ],
)
def test_an_unknown_field_is_kept_with_a_warning_of_the_nearest_name(tmp_path, caplog, name, nearest):
    message = f"keeps fields that it does not read: `{name}` (the nearest that it reads is `{nearest}`)"
    config_module.logger.warning_once.cache_clear()
    make_config(**SPARSE, **{name: 17}).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert getattr(read, name) == json.loads((tmp_path / "config.json").read_text())[name] == 17
    assert moe_values(read) == SPARSE | {"moe_layers": [0, 2]}
    assert caplog.text.count(message) == 1


def test_what_transformers_writes_passes(tmp_path, caplog):
    config = make_config(**SPARSE)
    # as its Trainer, its quantizers and its older versions do
    config.pad_token_id, config.use_cache, config.dtype = 0, False, "bfloat16"
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {"pad_token_id", "dtype", "auto_map", "transformers_version"} <= set(stored)
    older = {"torch_dtype": "float16", "tie_encoder_decoder": False, "max_length": 20, "_commit_hash": "0", "top_k": 50}
    quantised = {"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}
    (tmp_path / "config.json").write_text(json.dumps({**stored, **older, **quantised}))
    loaded = LlavaModConfig.from_pretrained(tmp_path)
    assert "does not read" not in caplog.text
    assert (loaded.pad_token_id, loaded.dtype) == (0, torch.bfloat16)
    assert loaded.quantization_config["quant_method"] == "torchao"
    assert moe_values(loaded) == moe_values(config)


def test_a_checkpoint_of_before_the_newer_fields_has_their_defaults(tmp_path):
    make_config(moe_layers=[0]).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for name in ("expert_rank", "use_residual", "router_aux_loss_type", "router_z_loss_coef"):
        stored["text_config"].pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert moe_values(LlavaModConfig.from_pretrained(tmp_path)) == moe_values(make_config(moe_layers=[0]))


def test_one_expert_a_token_leaves_the_router_its_aux_loss_and_is_told(make_student, caplog):
    config_module.logger.warning_once.cache_clear()
    config = make_config(moe_layers=[0], num_experts=4, num_experts_per_tok=1)
    assert caplog.text.count("the router learns nothing from the answers") == 1
    caplog.clear()
    make_config(moe_layers=[0], num_experts=4, num_experts_per_tok=2)
    make_config(moe_layers=[0], num_experts=1, num_experts_per_tok=1)
    assert not caplog.text

    gradients = {}
    for top_k in (1, 2):
        student = make_student(moe_layers=[0])
        gate = student.model.language_model.layers[0].mlp.gate
        gate.top_k = top_k
        student(input_ids=torch.arange(5, 15)[None]).logits.square().sum().backward()
        gradients[top_k] = gate.weight.grad.norm().item()
    assert gradients[1] < 1e-5 * gradients[2], (gradients, config)
