"""
A recipe of a published student from `check` to `publish`, as its README launches it, at its real sizes but few layers.

    PYTHONPATH=tests python -m helpers.rehearsal --recipe qwen2-0.5b --out runs/rehearsal

In a folder of its own lie models and data under the very names that the recipe has, so that its files are read as they
are; `SHORT` alone is changed. Each command runs in a process of its own. `OUT/rehearsal.json` has what the table says.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from PIL import Image

from helpers.real_shapes import save_shallow
from helpers.rlaif_v import write_rlaif_v

ROOT = Path(__file__).parents[2]

RECIPES = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-1.5b-24gb", "qwen3-0.6b")

# What a machine without a GPU lacks: time, and memory for the moments of an embedding of 151,936 rows
SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "optim": "sgd",
    "use_cpu": True,
}

PAIRS = {"max_steps": 1, "per_device_train_batch_size": 2}  # `kto_pair` estimates by the other pairs of a batch

STAGES = {"1_adapt": "adapt", "2_mimic_dense": "mimic", "3_mimic_sparse": "mimic", "4_prefer": "prefer"}

# Of a teacher's processor only the half for videos needs torchvision, which need not be here
WITHOUT_VIDEO = """
import sys
from types import SimpleNamespace
from helpers.published_models import without_video
without_video(SimpleNamespace(setattr=setattr))
"""

ANSWERS = ("a red circle.", "two blue squares and a dog.", "no, there is none.", "it is shown on the left.")
QUESTIONS = ("what is in the picture?", "is there a dog?", "describe it shortly.", "where is it?")


# data, as it is published


def recipe_values(recipe):
    """`{stage: values}` of a recipe's files."""
    folder = ROOT / "recipes" / recipe
    return {stage: yaml.safe_load((folder / f"{stage}.yaml").read_text()) for stage in STAGES}


def write_data(recipe, folder, *, rows=6):
    """Writes every data set that a recipe names under that name, and `data/test.json`, below a folder."""
    for values in recipe_values(recipe).values():
        for entry in values.get("datasets") or [{"path": values["dataset_name"]}]:
            path, images = entry["path"], entry.get("image_folder", values.get("image_folder"))
            if path.endswith((".json", ".jsonl")):
                write_conversations(folder / path, folder / images, rows)
            else:
                write_pairs(folder / path, rows // 2)  # a reference reads each twice
    for name in ("test.json", "seen.json"):  # what is measured on, and where its blind baseline learns
        write_conversations(folder / "data" / name, folder / "data" / "test", 2)


def picture(number):
    size, color = [(64, 48), (40, 100), (90, 90)][number % 3], ("red", "green", "blue")[number % 3]
    return Image.new("RGB", size, color)


def write_conversations(path, images, rows):
    """LLaVA's JSON, or JSON lines, with `id` of mixed types; of captions each row has one picture and one answer."""
    captions, several = "Pretrain" in str(path), "la_tune" in path.name
    found = []
    for number in range(rows):
        names = [f"{number // 3:05}/{number:09}.jpg"]
        names += [f"{number // 3:05}/{number:09}b.jpg"] if several and number % 2 else []
        for name in names:
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(images / name)
        question = "\n".join(["<image>"] * len(names)) + "\n" + QUESTIONS[number % 4]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ANSWERS[number % 4]}]
        row = {"id": number if number % 2 else f"{number:09}", "image": names if several else names[0]}
        if not captions and number % 3 == 1:
            turns += [{"from": "human", "value": QUESTIONS[1]}, {"from": "gpt", "value": ANSWERS[2]}]
        if not captions and number % 3 == 2:
            turns[0]["value"] = QUESTIONS[0]
            del row["image"]
        found.append({**row, "conversations": turns})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, found)) if path.suffix == ".jsonl" else json.dumps(found)
    path.write_text(lines)


def write_pairs(folder, rows):
    """RLAIF-V's file, where it lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = (
        (picture(number), QUESTIONS[number % 4], ANSWERS[number % 4], ANSWERS[(number + 1) % 4])
        for number in range(rows)
    )
    write_rlaif_v(folder / "RLAIF-V-Dataset_000.parquet", pairs)


def write_models(recipe, folder):
    """Saves each model that a recipe names under that name, below a folder."""
    values = recipe_values(recipe)
    names = [values["1_adapt"]["vision_tower"], values["1_adapt"]["language_model"]]
    for name in [*names, values["2_mimic_dense"]["teacher"]]:
        save_shallow(name, folder)


# commands


def launched(recipe):
    """What a README launches, in its order: `list` of the words behind `llava-mod` each."""
    text = (ROOT / "recipes" / recipe / "README.md").read_text()
    block = re.search(r"^## Launch\n.*?```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE)[1].replace("\\\n", " ")
    lines = [shlex.split(line) for line in block.splitlines()]
    return [words[words.index("llava_mod_cli" if "llava_mod_cli" in words else "llava-mod") + 1 :] for words in lines]


def commands(recipe):
    """All that is rehearsed: each stage checked before, and its last student measured and made a repository of."""
    found, student = [], None
    for words in launched(recipe):
        short = {**SHORT, **PAIRS} if words[-1].endswith("4_prefer.yaml") else SHORT
        options = [part for name, value in short.items() for part in (f"--{name}", str(value))]
        if words[0] in STAGES.values():
            found += [["check", *words[1:], *options], [*words, *options]]
            student = yaml.safe_load((ROOT / words[words.index("--config") + 1]).read_text())["output_dir"]
        elif words[0].startswith("cache-"):
            found.append([*words, *options])
        else:
            found.append(words)
        if words[0] == "merge-adapter":
            student = words[words.index("--output_dir") + 1]
    teacher = recipe_values(recipe)["2_mimic_dense"]
    data = ["--dataset_name", "data/test.json", "--image_folder", "data/test", "--train_dataset_name", "data/seen.json"]
    both = ["--teacher", teacher["teacher"], "--teacher_dtype", teacher["teacher_dtype"]]
    found.append(["evaluate", "--model", student, *both, *data, "--batch_size", "1"])
    found.append(["publish", "--checkpoint", student, "--output_dir", f"runs/{recipe}/hub"])
    return found


def run(words, folder, log):
    """
    Runs a command, which writes into a log.

    Returns:
        `dict`: as [`run_python`].
    """
    print(f"$ llava-mod {shlex.join(words)}", file=log, flush=True)
    name = words[0] + (f" {Path(words[words.index('--config') + 1]).stem}" if "--config" in words else "")
    code = f"{WITHOUT_VIDEO}import llava_mod_cli\nsys.exit(llava_mod_cli.main(sys.argv[1:]))"
    return {"command": name, **run_python(code, words, folder, log)}


def run_python(code, words, folder, log):
    """
    Runs Python in a process of its own, in a folder, with some arguments.

    Returns:
        `dict`: `seconds`, `gigabytes` (the most that the process had in memory) and `code`, 0 if all went well.
    """
    paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_DATASETS_CACHE": str(folder / ".cache")}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
    )
    _, status, used = os.wait4(process.pid, 0)  # `Popen` does not say what a process used
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, gigabytes = time.perf_counter() - start, used.ru_maxrss * 1024 / 1e9
    return {"seconds": round(seconds, 1), "gigabytes": round(gigabytes, 2), "code": process.returncode}


def rehearse(recipe, out, *, tell=print):
    """
    Rehearses a recipe; stops at the first command that fails.

    Args:
        recipe (`str`): of `RECIPES`.
        out (`Path`): made anew below it: `data/`, the models, `runs/`; `rehearsal.log` has what the commands printed.
        tell (`Callable`, *optional*): is given a line for each command when it has ended.

    Returns:
        `list[dict]`: as [`run`].
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "recipes").symlink_to(ROOT / "recipes")
    write_data(recipe, out)
    models = f"{WITHOUT_VIDEO}from helpers import rehearsal\nrehearsal.write_models(sys.argv[1], '.')"
    with (out / "rehearsal.log").open("w") as log:
        rows = [{"command": "models", **run_python(models, [recipe], out, log)}]
        tell(line_of(rows[-1]))
        for words in commands(recipe):
            if rows[-1]["code"]:
                break
            rows.append(run(words, out, log))
            tell(line_of(rows[-1]))
    (out / "rehearsal.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def line_of(row):
    verdict = "ok" if row["code"] == 0 else f"FAILED ({row['code']})"
    return f"{row['command']:28} {row['seconds']:8.1f} s {row['gigabytes']:6.2f} GB  {verdict}"


def table(rows):
    """A Markdown table of what each command took."""
    lines = ["| command | seconds | GB of memory |", "| --- | ---: | ---: |"]
    lines += [f"| {row['command']} | {row['seconds']:.1f} | {row['gigabytes']:.2f} |" for row in rows]
    total = sum(row["seconds"] for row in rows)
    return "\n".join([*lines, f"| all | {total:.1f} | {max(row['gigabytes'] for row in rows):.2f} |"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"), help="made anew")
    args = parser.parse_args(argv)
    out = args.out / args.recipe
    rows = rehearse(args.recipe, out, tell=lambda line: print(line, flush=True))
    if rows[-1]["code"]:
        log = (out / "rehearsal.log").read_text().splitlines()
        print("\n".join(log[-20:]), f"\nFAILED: {out}/rehearsal.log has all of it", sep="\n")
        return 1
    print(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
