"""The recipes of published students: each parses, and each README's commands train small models of the same classes."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig

import llava_mod_cli
from helpers.published_models import PUBLISHED, published_config, save_small, without_video
from helpers.rlaif_v import write_rlaif_v
from llava_mod_cli import main
from llava_mod_hf import recipes

ROOT = Path(__file__).parents[1]
RECIPES = ["qwen2-0.5b", "qwen2-1.5b", "qwen3-0.6b"]
ON_ONE_GPU = "qwen2-1.5b-24gb"  # with adapters, which other commands merge between the stages
STAGES = {"1_adapt": "adapt", "2_mimic_dense": "mimic", "3_mimic_sparse": "mimic", "4_prefer": "prefer"}
DATA = {
    "1_adapt": "captions.json",
    "2_mimic_dense": "conversations.json",
    "3_mimic_sparse": "conversations.json",
    "4_prefer": "rlaif-v.parquet",
}
ACCELERATE = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
LAUNCHER = ["-m", "llava_mod_cli"]
# What a machine for tests lacks: a GPU and time
SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "use_cpu": True,
}
WORDS = ["a red circle.", "two blue squares and a dog.", "no, there is none.", "is there a dog?", "describe it."]


def commands(recipe):
    """The launch commands of a README, split into accelerate's part and that of `llava-mod`."""
    text = (ROOT / "recipes" / recipe / "README.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = {}
    for line in blocks.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["accelerate", "launch"]:
            end = next(i for i in range(len(words)) if words[i : i + 2] == LAUNCHER)
            argv = words[end + 2 :]
            found[Path(argv[argv.index("--config") + 1]).stem] = (words[:end], argv)
    return found


def parse(command, argv):
    return recipes.parse(llava_mod_cli.commands()[command].groups(), argv)


# What recipes say


@pytest.mark.parametrize(("recipe", "stage"), itertools.product([*RECIPES, ON_ONE_GPU], STAGES))
def test_a_recipe_parses_and_its_values_arrive(recipe, stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = f"recipes/{recipe}/{stage}.yaml"
    values = yaml.safe_load(Path(path).read_text())
    groups = parse(STAGES[stage], ["--config", path, "--use_cpu", "true"])
    assert values.pop("report_to") == "none"  # which the trainer's options turn into an empty list
    for name, value in values.items():
        found = next(getattr(group, name) for group in groups if hasattr(group, name))
        if name == "datasets":
            found = [{key: getattr(entry, key) for key in given} for entry, given in zip(found, value, strict=True)]
        assert found == value, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_readme_launches_every_stage_in_order(recipe):
    launched = commands(recipe)
    assert list(launched) == list(STAGES)
    for stage, (launcher, argv) in launched.items():
        assert argv[:3] == [STAGES[stage], "--config", f"recipes/{recipe}/{stage}.yaml"]
        assert launcher[2] == "--config_file"
        assert (ROOT / launcher[3]).is_file()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_readmes_caches_are_made_of_the_stages_own_options(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes" / recipe / "README.md").read_text()
    lines = [shlex.split(line) for line in re.findall(r"^llava-mod cache-.*$", text, re.MULTILINE)]
    assert [words[3] for words in lines] == [f"recipes/{recipe}/{stage}.yaml" for stage in list(STAGES)[1:3]]
    for words in lines:
        groups = parse(words[1], [*words[2:], "--use_cpu", "true"])
        teacher = yaml.safe_load(Path(words[3]).read_text())["teacher"]
        (distill,) = [group for group in groups if hasattr(group, "teacher_cache")]
        assert (distill.teacher, distill.teacher_cache) == (teacher, words[words.index("--teacher_cache") + 1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_stage_goes_on_where_the_last_one_saved(recipe):
    values = [yaml.safe_load((ROOT / "recipes" / recipe / f"{stage}.yaml").read_text()) for stage in STAGES]
    assert [later["student"] for later in values[1:]] == [earlier["output_dir"] for earlier in values[:-1]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_batches_are_the_papers_on_the_machine_of_the_readme(recipe):
    launched = commands(recipe)
    for stage, expected in zip(STAGES, (512, 256, 256, 256), strict=True):
        processes = load_config_from_file(str(ROOT / launched[stage][0][3])).num_processes
        values = yaml.safe_load((ROOT / "recipes" / recipe / f"{stage}.yaml").read_text())
        batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
        assert batch * processes == expected


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_configs(name):
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == ACCELERATE[name]
    assert config.mixed_precision == "bf16"
    assert config.num_processes == (1 if name == "single_gpu" else 8)
    if name == "fsdp2":
        # with it only the first process would read a teacher's weights
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.mark.parametrize(("recipe", "options"), [*((name, []) for name in RECIPES), (ON_ONE_GPU, ["--processes", "1"])])
def test_the_memory_in_the_readme_is_what_its_command_prints(recipe, options, tmp_path, capsys):
    values = yaml.safe_load((ROOT / "recipes" / recipe / "1_adapt.yaml").read_text())
    teacher = yaml.safe_load((ROOT / "recipes" / recipe / "2_mimic_dense.yaml").read_text())["teacher"]
    for name in (values["vision_tower"], values["language_model"], teacher):
        published_config(name).save_pretrained(tmp_path / name)
    assert main(["memory", str(ROOT / "recipes" / recipe), "--models", str(tmp_path), *options]) == 0
    readme = (ROOT / "recipes" / recipe / "README.md").read_text()
    command = " ".join(["llava-mod memory", f"recipes/{recipe}", *options])
    assert f"```bash\n{command}\n```\n\n{capsys.readouterr().out}" in readme


# What recipes may not say


@pytest.fixture
def refusal(tmp_path):
    """What is said of a recipe's text, or of the command line of `mimic`."""

    def parsed(*argv, text="output_dir: a\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        argv = [str(tmp_path / "recipe.yaml") if word == "RECIPE" else word for word in argv]
        with pytest.raises(ValueError) as error:
            parse("mimic", argv or ["--config", str(tmp_path / "recipe.yaml")])
        return str(error.value)

    return parsed


@pytest.mark.parametrize(
    "line",
    [
        "max_steps: 2.7",
        "max_steps: true",
        "dataset_name: [a, b]",
        "dataset_name: 5",
        "student: null",
        "learning_rate: [0.1]",
        "bf16: 2",
        "save_strategy: no",
        "moe_layers: {a: 1}",
        "num_experts: null",
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(refusal, line):
    name = line.partition(":")[0]
    said = refusal(text=f"{line}\n")
    assert f"has `{name}: " in said and "which is of another kind than" in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nlearning_rate: 0.1\nseed: 2\n", "has the key `seed` twice"),
        ("", "must hold `key: value` lines, and is empty"),
        ("- a\n", "and holds a list"),
    ],
)
def test_a_recipe_that_is_none_is_refused(refusal, text, told):
    assert told in refusal(text=text)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--config"], "`--config` stands without a file"),
        (["--config", "--max_steps", "1"], "The recipe `--max_steps` does not exist"),
        (["--config", "RECIPE", "--dataset_name", "a", "--dataset_name", "b"], "`--dataset_name` stands twice"),
        (["--config", "RECIPE", "--output-dir", "a", "--output_dir=b"], "`--output_dir` stands twice"),
        (["--config", "RECIPE", "--moe_layers", "0", "--moe_layers", "2"], "`--moe_layers` stands twice"),
        (["--config", "RECIPE", "--config=RECIPE"], "`--config` stands twice"),
    ],
)
def test_what_stands_twice_or_for_nothing_on_the_command_line_is_refused(refusal, argv, told):
    assert told in refusal(*argv)


# Two steps of every stage


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows as they are published: LLaVA's JSON with a folder of images, and RLAIF-V's Parquet."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    for index, size in enumerate([(40, 30), (20, 50), (64, 64)]):
        Image.new("RGB", size, ("red", "green", "blue")[index]).save(root / "images" / f"{index}.jpg")
    rows = [conversation(index) for index in range(6)]
    (root / "conversations.json").write_text(json.dumps(rows))
    (root / "captions.json").write_text(json.dumps([row for row in rows if "image" in row]))  # all have one
    pictures = [{"bytes": (root / "images" / f"{i}.jpg").read_bytes(), "path": f"{i}.jpg"} for i in range(3)]
    pairs = ((pictures[i % 3], WORDS[3 + i % 2], WORDS[i % 3], WORDS[(i + 1) % 3]) for i in range(4))
    write_rlaif_v(root / "rlaif-v.parquet", pairs)
    return root


def conversation(index):
    """With one turn, with two, or about no image."""
    turns = [
        {"from": "human", "value": f"<image>\n{WORDS[3]}" if index % 2 else f"{WORDS[4]}\n<image>"},
        {"from": "gpt", "value": WORDS[index % 3]},
    ]
    if index % 3 == 1:
        turns += [{"from": "human", "value": WORDS[4]}, {"from": "gpt", "value": WORDS[1]}]
    row = {"id": index if index % 2 else f"row-{index}", "image": f"{index % 3}.jpg", "conversations": turns}
    if index % 3 == 2:
        turns[0]["value"] = WORDS[3]
        del row["image"]
    return row


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """Folder with a small random model under the name of each published one."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_video(monkeypatch)
        for name in PUBLISHED:
            save_small(name, root)
    return root


def overrides(path, small_models, data, output, student):
    """Options that take names of the Hub, data and lengths out of a recipe; all others stay."""
    values = yaml.safe_load(Path(path).read_text())
    changed = {**SHORT, "output_dir": output}
    for name in ("vision_tower", "language_model", "teacher"):
        if name in values:
            changed[name] = small_models / values[name]
    if student:
        changed["student"] = student
    changed["datasets" if "datasets" in values else "dataset_name"] = data / DATA[Path(path).stem]
    if "image_folder" in values or "datasets" in values:
        changed["image_folder"] = data / "images"
    return [part for name, value in changed.items() for part in (f"--{name}", str(value))]


def run_chain(recipe, small_models, data, output):
    """Runs a README's commands one after the other, and returns the folders that they write."""
    folders = {}
    for stage, (_, argv) in commands(recipe).items():
        student = next(reversed(folders.values()), None)
        options = overrides(argv[2], small_models, data, output / stage, student)
        assert main([*argv, *options]) == 0, stage
        folders[stage] = output / stage
    return folders


@pytest.mark.parametrize(
    "recipe", ["qwen2-0.5b", *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES[1:])]
)
def test_two_steps_of_each_stage_as_the_readme_launches_them(recipe, small_models, data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    without_video(monkeypatch)
    folders = run_chain(recipe, small_models, data, tmp_path)

    weights = {}
    for (stage, folder), name in zip(folders.items(), ("adapt", "mimic_dense", "mimic_sparse", "prefer"), strict=True):
        run = json.loads((folder / "run.json").read_text())
        assert (run["stage"], run["steps"]) == (name, 2)
        norms = [entry["grad_norm"] for entry in run["log_history"] if "grad_norm" in entry]
        assert len(norms) == 2
        assert all(0 < norm < float("inf") for norm in norms), (stage, norms)
        weights[stage] = load_file(folder / "model.safetensors")
    text_config = AutoConfig.from_pretrained(folders["4_prefer"]).get_text_config()
    assert (text_config.moe_layers, text_config.num_experts, text_config.num_experts_per_tok) == ([0, 2], 4, 2)
    assert text_config.model_type == recipe.split("-")[0]

    # what the paper trains in each stage
    expected = [{"multi_modal_projector"}, {"multi_modal_projector", "language_model"}, None, {"mlp", "projector"}]
    for (before, after), parts in zip(itertools.pairwise(weights.values()), expected[1:], strict=True):
        changed = {name for name in before.keys() & after.keys() if not before[name].equal(after[name])}
        assert changed
        if parts is not None:
            assert all(any(part in name for part in parts) for name in changed), changed
        assert not any("vision_tower" in name for name in changed)


@pytest.mark.slow
def test_two_steps_of_each_stage_on_one_gpu_as_the_readme_launches_them(small_models, data, tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "tests").mkdir()  # beside the folders that the commands write
    monkeypatch.chdir(tmp_path)
    without_video(monkeypatch)
    readme = (ROOT / "recipes" / ON_ONE_GPU / "README.md").read_text()
    lines = [shlex.split(line) for line in re.findall(r"^llava-mod (?!memory).*", readme, re.MULTILINE)]
    assert [words[1] for words in lines].count("merge-adapter") == 3
    for _, command, *argv in lines:
        options = []
        if "--config" in argv and command != "upcycle":
            options = overrides(
                argv[1], small_models, data, yaml.safe_load(Path(argv[1]).read_text())["output_dir"], None
            )
        assert main([command, *argv, *options]) == 0, (command, argv)
    runs = Path("runs", ON_ONE_GPU)
    assert AutoConfig.from_pretrained(runs / "student").get_text_config().moe_layers == [0, 2]
    weights = [load_file(runs / name / "model.safetensors") for name in ("sparse", "mimic_sparse_merged", "student")]
    both = set()
    for before, after in itertools.pairwise(weights):
        changed = {name for name in before if not before[name].equal(after[name])}
        assert all(any(part in name for name in changed) for part in ("self_attn", "experts", "mlp.gate."))
        assert not any("vision_tower" in name or "embed_tokens" in name for name in changed)
        both |= changed
    assert any("multi_modal_projector" in name for name in both)  # of either, a batch may be of text alone


# Launched


@pytest.mark.slow
def test_accelerate_launches_the_readmes_commands_in_two_processes(small_models, data, tmp_path):
    student = None
    for stage in ("1_adapt", "2_mimic_dense"):
        launcher, argv = commands("qwen2-0.5b")[stage]
        options = overrides(argv[2], small_models, data, tmp_path / stage, student)
        if student:  # the recipe's own teacher needs torchvision; this one reads what the student reads
            options[options.index("--teacher") + 1] = str(student)
        two = ["--num_processes", "2", "--mixed_precision", "no"]
        module = ["-m", "accelerate.commands.accelerate_cli"]
        process = subprocess.run(
            [sys.executable, *module, *launcher[1:], *two, *LAUNCHER, *argv, *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        student = tmp_path / stage
        run = json.loads((student / "run.json").read_text())
        assert run["steps"] == 2
        counts = list(run.get("datasets", {}).values())
        assert counts == ([] if stage == "1_adapt" else [{"rows": 6, "read": 8}]), stage  # of both processes
        # two steps of 2 rows in each of 2 processes
        assert run["log_history"][-1]["train_samples_per_second"] * run["log_history"][-1][
            "train_runtime"
        ] == pytest.approx(8, rel=0.05)
