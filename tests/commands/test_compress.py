"""`llava-mod compress`: fewer experts by their load, lighter weights, a note in the folder, and what the card says."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from helpers.retyped import retyped
from llava_mod_cli import main
from llava_mod_hf import load_model_and_processor
from llava_mod_hf.publishing.card import render_card
from llava_mod_hf.publishing.provenance import gather_facts

LOADS = {"0": [0.1, 0.4, 0.3, 0.2], "2": [0.45, 0.05, 0.1, 0.4]}


@pytest.fixture(scope="module")
def student(make_student, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    retyped(make_student, "llama", moe_layers=[0, 2]).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "results.json"
    path.write_text(json.dumps({"expert_load": LOADS}))
    return path


def compress(model, output_dir, **options):
    options = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return main(["compress", "--model", str(model), "--output_dir", str(output_dir), *options])


def steps_of(folder):
    return json.loads((folder / "compression.json").read_text())["steps"]


def card_of(folder):
    facts = gather_facts(folder, "you/student")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return render_card(facts, model.config).text


def test_fewer_experts_in_half_precision(student, results, tmp_path):
    assert compress(student, tmp_path / "out", num_experts=2, results=results, dtype="bfloat16") == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert (model.config.num_experts, model.dtype) == (2, torch.bfloat16)
    (step,) = steps_of(tmp_path / "out")
    assert step["experts"]["kept"] == {"0": [1, 2], "2": [0, 3]}
    whole = sum(parameter.nbytes for parameter in AutoModelForImageTextToText.from_pretrained(student).parameters())
    now = sum(parameter.nbytes for parameter in model.parameters())
    assert (step["megabytes_before"], step["megabytes"]) == (round(whole / 1e6, 3), round(now / 1e6, 3))
    card = card_of(tmp_path / "out")
    assert (
        f"from {step['megabytes_before']} to {step['megabytes']} MB of weights: of 4 experts in a layer the 2" in card
    )
    assert "(70 % or more of the routers' choices), the others were dropped; bfloat16 weights; the vocabulary" in card


def test_the_second_time_is_added_to_the_note(student, results, tmp_path):
    assert compress(student, tmp_path / "once", num_experts=3, results=results, how="merge") == 0
    assert compress(tmp_path / "once", tmp_path / "twice", dtype="float16") == 0
    first, second = steps_of(tmp_path / "twice")
    assert first == steps_of(tmp_path / "once")[0]
    assert (first["experts"]["how"], second["dtype"], "experts" in second) == ("merge", "float16", False)
    assert "the others were merged into them" in card_of(tmp_path / "twice")
    assert "Once more it was made smaller" in card_of(tmp_path / "twice")


def test_weights_of_8_bits_load_again(student, results, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed: `make test-quantisation` installs it")
    assert compress(student, tmp_path / "out", num_experts=3, results=results, bits=8) == 0
    model, _ = load_model_and_processor(str(tmp_path / "out"))
    assert model.model.language_model.layers[0].mlp.experts.down_proj.qdata.dtype == torch.int8
    assert model.get_input_embeddings().weight.dtype == torch.float32
    (step,) = steps_of(tmp_path / "out")
    assert step["megabytes"] < 0.8 * step["megabytes_before"]
    assert "weights of 8 bits in the decoder layers, for which torchao is needed" in card_of(tmp_path / "out")


REFUSED = [
    ({}, "Nothing is to be made smaller"),
    ({"num_experts": 2}, "give both, the second from `llava-mod evaluate`"),
    ({"dtype": "bfloat16", "results": "results.json"}, "give both, the second from `llava-mod evaluate`"),
    ({"dtype": "bfloat16", "how": "drop"}, "all experts remain"),
    ({"dtype": "int4"}, "give one of float32, bfloat16, float16"),
    ({"bits": 4}, "by `load_quantised`, or in a file for llama.cpp"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_makes_no_sense_is_one_sentence(student, tmp_path, capsys, options, message):
    assert compress(student, tmp_path / "out", **options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_load_in_the_results_nothing_is_dropped(student, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"student": {}}))
    assert compress(student, tmp_path / "out", num_experts=2, results=tmp_path / "results.json") == 2
    assert "`loads` is of the layers []" in capsys.readouterr().err


def test_a_damaged_note_is_said(student, tmp_path, capsys):
    (student / "compression.json").write_text("{")
    try:
        assert compress(student, tmp_path / "out", dtype="float16") == 2
        assert "is no JSON" in capsys.readouterr().err
    finally:
        (student / "compression.json").unlink()
