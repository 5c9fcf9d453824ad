"""Checkpoints of other layouts that cannot be converted are refused by name, and their code does not run."""

import pytest
import torch

from helpers.authors_layout import KINDS, SPARSE, config_values, write_checkpoint
from llava_mod_hf.students.conversion import convert_checkpoint
from llava_mod_hf.students.conversion_layouts import read_layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "moe_llava_qwen"}, "Qwen is the first one"),
        ({"model_type": "moe_llava_minicpm"}, "MiniCPM scales embeddings"),
        ({"model_type": "llava_gemma2"}, "Gemma 2 scales image features"),
        ({"model_type": "llava_mpt"}, "MPT"),
        ({"model_type": "bert"}, "`model_type` 'bert'"),
        ({"mm_image_tower": "drop"}, "names no vision encoder"),
        ({"mm_video_tower": "LanguageBind/Video"}, "has a video encoder"),
        ({"s2": True}, "several scales"),
        ({"image_projector_type": "qformer2_64"}, "adaptor of type 'qformer2_64'"),
        ({"mm_use_im_start_end": True}, "writes tokens around images"),
        ({"image_aspect_ratio": "anyres"}, "`image_aspect_ratio` 'anyres'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "`mm_patch_merge_type` 'spatial_unpad'"),
        ({"mm_vision_select_feature": "cls"}, "vision features 'cls'"),
        ({"lora": {"lora_enable": True}}, "LoRA"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"moe": {**SPARSE, "top_k_experts": 1}}, "one expert, weighted with the router's probability"),
        ({"moe": {**SPARSE, "num_experts": [4, 2]}}, "one number for all layers"),
        ({"moe": {**SPARSE, "moe_layers_idx": None}}, "no `moe_layers_idx`"),
    ],
)
def test_configs_that_cannot_be_converted_are_refused(fields, message):
    values = config_values("qwen2", KINDS["qwen2"], moe=SPARSE) | fields
    with pytest.raises(ValueError, match=message) as caught:
        read_layout({key: value for key, value in values.items() if value != "drop"}, "there")
    assert "there" in str(caught.value)


def test_fields_that_nothing_reads_are_named(caplog):
    read_layout(config_values("qwen2", KINDS["qwen2"]), "there")
    assert not caplog.records
    read_layout(config_values("qwen2", KINDS["qwen2"], attention_sinks=4), "there")
    assert "attention_sinks" in caplog.text


def test_capacity_is_told_about(caplog):
    read_layout(config_values("qwen2", KINDS["qwen2"], moe=SPARSE), "there")
    assert "`eval_capacity_factor` 2.0" in caplog.text


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_that_do_not_fit_are_named(make_checkpoint, tmp_path, plain_tokenizer, shards):
    _, values, state = make_checkpoint("qwen2", moe=SPARSE)
    expert = "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts."
    del state[f"{expert}3.up_proj.weight"], state["model.norm.weight"]
    state[f"{expert}4.up_proj.weight"] = torch.zeros(48, 32)
    state["model.image_newline"] = torch.zeros(32)
    state["lm_head.weight"] = torch.zeros(299, 32)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old versions of transformers stored it
    folder = write_checkpoint(tmp_path / "bad", values, state, plain_tokenizer, shards=shards)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(str(folder))
    unknown, missing, mismatched = str(caught.value).split("; ")
    assert unknown.endswith(f"there is no place for model.image_newline, {expert}4.up_proj.weight")
    assert missing == (
        "it lacks model.language_model.layers.2.mlp.experts.3.up_proj.weight, model.language_model.norm.weight"
    )
    assert mismatched == "other shapes than the config's have lm_head.weight (299, 32) instead of (300, 32)."


def test_a_head_that_is_not_tied_is_refused(make_checkpoint, tmp_path, plain_tokenizer):
    _, values, state = make_checkpoint("qwen2", tie_word_embeddings=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    convert_checkpoint(str(write_checkpoint(tmp_path / "same", values, state, plain_tokenizer)))
    state["lm_head.weight"][7] += 1
    with pytest.raises(ValueError, match="ties the head to the embeddings"):
        convert_checkpoint(str(write_checkpoint(tmp_path / "other", values, state, plain_tokenizer)))


@pytest.mark.parametrize("safetensors", [False, True])
def test_files_that_cannot_be_read_are_named(make_checkpoint, safetensors):
    folder, *_ = make_checkpoint("qwen2", safetensors=safetensors)
    file = sorted(folder.glob("*-00001-of-00002.*"))[0]
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"{file.name}` cannot be read as weights"):
        convert_checkpoint(str(folder))
    file.unlink()
    with pytest.raises(ValueError, match=f"lacks {file.name}"):
        convert_checkpoint(str(folder))
    for index in folder.glob("*.index.json"):
        index.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        convert_checkpoint(str(folder))


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


def test_code_in_a_checkpoint_does_not_run(make_checkpoint, capsys):
    folder, *_ = make_checkpoint("qwen2")
    torch.save({"model.norm.weight": Code()}, next(iter(sorted(folder.glob("*.bin")))))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        convert_checkpoint(str(folder))
    assert "this ran" not in capsys.readouterr().out


def test_other_bad_input(make_checkpoint, tmp_path):
    folder, *_ = make_checkpoint("qwen2")
    with pytest.raises(ValueError, match="has no `config.json`"):
        convert_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="`conversation` is 'chatml': give one of qwen"):
        convert_checkpoint(str(folder), conversation="chatml")
    with pytest.raises(ValueError, match="has no '<|end_of_turn|>'".replace("|", r"\|")):
        convert_checkpoint(str(folder), conversation="openchat")
    for dtype in ("int8", "float3"):
        with pytest.raises(ValueError, match=f"`dtype` is '{dtype}'"):
            convert_checkpoint(str(folder), dtype=dtype)
