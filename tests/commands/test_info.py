"""Parameters by part against counts by hand, and `llava-mod info` on models, recipes, folders and names."""

import json

import pytest
from huggingface_hub import constants
from transformers import CLIPConfig, CLIPVisionConfig, Qwen2Config, Qwen3MoeConfig

from llava_mod_cli import main
from llava_mod_hf import LlavaModConfig
from llava_mod_hf.commands import info
from llava_mod_hf.commands.arguments import UpcycleArguments
from llava_mod_hf.commands.info import load_config, student_info
from llava_mod_hf.students import parameter_counts

# The published config.json of each: openai/clip-vit-large-patch14-336 and Qwen's.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
PUBLISHED = {  # hidden, intermediate, layers, heads, key-value heads, tied, context
    "Qwen2-0.5B": (896, 4864, 24, 14, 2, True, 131072),
    "Qwen2-1.5B": (1536, 8960, 28, 12, 2, True, 131072),
    "Qwen1.5-1.8B": (2048, 5504, 24, 16, 16, False, 32768),
}
VOCABULARY, EXPERTS, CHOSEN = 151936, 4, 2


def linear(rows, columns, bias=True):
    return rows * columns + rows * bias


def clip_by_hand(hidden, ffn, layers, image, patch):
    """Patches and CLS with their positions, the norm before the layers, the layers, the norm after them."""
    patches = (image // patch) ** 2
    embeddings = hidden * 3 * patch * patch + hidden + (patches + 1) * hidden
    layer = 4 * linear(hidden, hidden) + linear(ffn, hidden) + linear(hidden, ffn) + 2 * 2 * hidden
    return embeddings + layers * layer + 2 * 2 * hidden


def student_by_hand(hidden, ffn, layers, heads, key_value_heads, tied):
    """Each part of a student with 4 experts in every second layer: (total, active)."""
    key_value = hidden // heads * key_value_heads
    attention = linear(hidden, hidden) + 2 * linear(key_value, hidden) + linear(hidden, hidden, bias=False)
    one_ffn, sparse = 3 * hidden * ffn, (layers + 1) // 2
    counts = {
        "vision": clip_by_hand(1024, 4096, 24, 336, 14),
        "adaptor": linear(hidden, 1024) + linear(hidden, hidden),
        "embeddings": VOCABULARY * hidden,
        "attention": layers * attention,
        "ffn": (layers - sparse) * one_ffn,
        "router": sparse * EXPERTS * hidden,
        "norms": layers * 2 * hidden + hidden,
        "head": 0 if tied else VOCABULARY * hidden,
    }
    parts = {part: {"total": count, "active": count} for part, count in counts.items()}
    parts["experts"] = {"total": sparse * EXPERTS * one_ffn, "active": sparse * CHOSEN * one_ffn}
    return parts


@pytest.fixture
def published(tmp_path):
    """`published("Qwen2-0.5B")`: folders with nothing but the `config.json` of CLIP and of that language model."""

    def write(name):
        hidden, ffn, layers, heads, key_value_heads, tied, context = PUBLISHED[name]
        CLIPConfig(vision_config=CLIP_L_336, projection_dim=768).save_pretrained(tmp_path / "clip")
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            tie_word_embeddings=tied,
            max_position_embeddings=context,
        ).save_pretrained(tmp_path / name)
        return ["--vision_tower", str(tmp_path / "clip"), "--language_model", str(tmp_path / name)]

    return write


def run_json(capsys, *argv):
    assert main(["info", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_students_by_hand(name, published, capsys):
    found = run_json(capsys, *published(name), "--moe_layers", "alternate")
    *shape, context = PUBLISHED[name]
    expected = student_by_hand(*shape)
    assert found["parts"] == expected
    assert found["params_total"] == sum(count["total"] for count in expected.values())
    assert found["params_active"] == sum(count["active"] for count in expected.values())
    assert found["moe_layers"] == list(range(0, shape[2], 2))
    assert (found["num_experts"], found["num_experts_per_tok"]) == (EXPERTS, CHOSEN)
    assert (found["image_tokens"], found["context_length"]) == (576, context)


def test_more_experts_and_choices(published, capsys):
    parts = published("Qwen2-0.5B")
    four = run_json(capsys, *parts, "--moe_layers", "alternate")
    eight = run_json(capsys, *parts, "--moe_layers", "alternate", "--num_experts", "8", "--num_experts_per_tok", "1")
    low_rank = run_json(capsys, *parts, "--moe_layers", "alternate", "--expert_rank", "8")
    dense = run_json(capsys, *parts)
    assert low_rank["parts"]["experts"]["total"] < four["parts"]["experts"]["total"] / 2
    assert eight["parts"]["experts"]["total"] == 2 * four["parts"]["experts"]["total"]
    assert eight["parts"]["experts"]["active"] == four["parts"]["experts"]["active"] // 2
    assert (dense["moe_layers"], dense["num_experts"], dense["parts"]["experts"]["total"]) == ([], None, 0)
    assert dense["params_active"] == dense["params_total"]


def test_table(capsys):
    parts = ["--vision_tower", "embedded:tiny-teacher", "--language_model", "embedded:tiny-student-lm"]
    assert main(["info", *parts, "--moe_layers", "all"]) == 0
    shown = capsys.readouterr().out
    found = run_json(capsys, *parts, "--moe_layers", "all")
    for part, count in found["parts"].items():
        (row,) = (line for line in shown.splitlines() if f" {part} " in line)
        assert f" {count['total']:,} " in row and f" {count['active']:,} " in row
    (row,) = (line for line in shown.splitlines() if " all " in line)
    assert f" {found['params_total']:,} " in row and f" {found['params_active']:,} " in row
    assert "experts: 4, top-2, in layers 0, 1, 2\n" in shown
    assert "context: 512 tokens, of which an image takes 64\n" in shown


def test_a_sparse_student_is_not_upcycled(make_student):
    with pytest.raises(ValueError, match=r"The model is sparse already, in layers \[0, 2\]: leave `moe_layers` out"):
        student_info(make_student().config, UpcycleArguments(moe_layers=["all"]))


@pytest.mark.parametrize("moe_layers", [(), (0, 2)])
def test_saved_student(make_student, tmp_path, capsys, moe_layers):
    student = make_student(moe_layers=moe_layers)
    student.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # no weight is read
    found = run_json(capsys, str(tmp_path))
    assert (found["params_total"], found["params_active"]) == parameter_counts.count_parameters(student)
    assert found["params_total"] == student.num_parameters()
    assert found["moe_layers"] == list(moe_layers)


def test_low_rank_and_residual_experts(make_student):
    config = make_student(moe_layers=()).config.to_dict()
    config = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")}
    hidden, ffn, layers, rank = 32, 64, 3, 4

    def parts(**fields):
        return student_info(LlavaModConfig(**config, moe_layers=[0, 2], **fields))["parts"]

    plain, low_rank, residual = parts(), parts(expert_rank=rank), parts(use_residual=True)
    one_ffn = 3 * hidden * ffn
    difference = rank * (hidden + 2 * ffn) + rank * (ffn + hidden)  # gate and up share one of rank r
    assert plain["ffn"]["active"] == (layers - 2) * one_ffn
    assert low_rank["ffn"]["active"] == layers * one_ffn  # every token passes the shared FFN
    assert low_rank["experts"] == {"total": 2 * 4 * difference, "active": 2 * 2 * difference}
    assert residual["ffn"]["total"] == layers * one_ffn
    assert residual["experts"] == plain["experts"]
    assert residual["router"]["total"] == plain["router"]["total"] + 2 * (2 * hidden + 2)


def test_stock_sparse_families_are_counted_alike():
    """A student exported to a family of transformers with experts of its own."""
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=1,
    )
    parts = student_info(LlavaModConfig(vision_config=vision, text_config=text))["parts"]
    assert parts["experts"] == {"total": 2 * 4 * 3 * 32 * 16, "active": 2 * 3 * 32 * 16}
    assert parts["router"]["total"] == 2 * 4 * 32


@pytest.mark.parametrize("target", ["3_mimic_sparse.yaml", "4_prefer.yaml"])
def test_recipe_of_a_later_stage(capsys, target):
    """Its student does not exist yet: parts and experts are in the recipes before it."""
    parts = ["--vision_tower", "embedded:tiny-teacher", "--language_model", "embedded:tiny-student-lm"]
    expected = run_json(capsys, *parts, "--moe_layers", "alternate")
    found = run_json(capsys, f"recipes/tiny/{target}")
    assert found == expected | {"name": f"recipes/tiny/{target}"}
    assert run_json(capsys, f"recipes/tiny/{target}", "--moe_layers", "all")["moe_layers"] == [0, 1, 2]
    assert run_json(capsys, "recipes/tiny/2_mimic_dense.yaml")["moe_layers"] == []


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "Give either a model or a recipe, or `--vision_tower` and `--language_model`."),
        (["--vision_tower", "embedded:tiny-teacher"], "Give either a model or a recipe"),
        (["embedded:tiny-teacher", "--language_model", "embedded:tiny-student-lm"], "Give either a model or a recipe"),
        (["embedded:tiny-student-lm"], "is of type `llama`, not a LLaVA"),
        (["nobody/none"], "The model `nobody/none` could not be loaded: "),
        (["none.yaml"], "The recipe `none.yaml` does not exist"),
        (["embedded:tiny-teacher", "--moe_layers", "99"], "but the language model has 3 layers"),
        (["recipes/tiny/3_mimic_sparse.yaml", "--moe_layers", "first"], "`layers` is 'first': give one of alternate"),
    ],
)
def test_bad_input_is_one_sentence(capsys, monkeypatch, argv, sentence):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["info", *argv]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("llava-mod info: ") and error.count("\n") == 1 and error.rstrip()[-1] == "."


def test_recipe_without_a_student(tmp_path):
    (tmp_path / "recipe.yaml").write_text("teacher: embedded:tiny-teacher\n")
    with pytest.raises(ValueError, match="names no `student`, nor a `vision_tower` and a `language_model`"):
        info.run(UpcycleArguments(), info.InfoCommand(model=str(tmp_path / "recipe.yaml")))


def test_nothing_is_allocated(published):
    argv = published("Qwen2-1.5B")
    config = load_config(vision_tower=argv[1], language_model=argv[3])
    assert config.image_seq_length == 576
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "`key: value` lines, and is empty"),
        ("- a\n", "holds a list"),
        ("student: [a, b]\n", r"has `student: \['a', 'b'\]`: give a name"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, text, told):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        info.run(UpcycleArguments(), info.InfoCommand(model=str(tmp_path / "recipe.yaml")))


def test_a_broken_recipe_beside_it_does_not_matter(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("")
    (tmp_path / "b.yaml").write_text("student: embedded:tiny-teacher\n")
    assert run_json(capsys, str(tmp_path / "b.yaml"))["moe_layers"] == []


def test_recipes_in_a_circle_end(tmp_path):
    (tmp_path / "a.yaml").write_text("student: b\noutput_dir: a\n")
    (tmp_path / "b.yaml").write_text("student: a\noutput_dir: b\n")
    with pytest.raises((ValueError, OSError)):
        info.run(UpcycleArguments(), info.InfoCommand(model=str(tmp_path / "a.yaml")))
