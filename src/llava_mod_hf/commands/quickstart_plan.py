"""What the quickstart runs in each of its worlds: stages, recipes, questions, and how many steps there is time for."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from llava_mod_hf import recipes
from llava_mod_hf.commands import adapt, make_preferences, mimic, prefer
from llava_mod_hf.commands.arguments import DistillArguments, StudentArguments, UpcycleArguments
from llava_mod_hf.data import easy_vqa, scene_rows
from llava_mod_hf.data.arguments import DataArguments, PromptArguments
from llava_mod_hf.students.build import build_student
from llava_mod_hf.training import output_folder
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.mimic_config import MimicConfig
from llava_mod_hf.training.preference_config import PreferenceConfig

CALIBRATION_STEPS = 16

console = Console()


@dataclass(frozen=True)
class Stage:
    """
    One line of the plan.

    Args:
        run (`Callable`), groups (`tuple[type, ...]`): of the command, and its options.
        recipe (`str`): file of the world's recipes.
        inputs (`dict[str, str]`): options that are folders of other stages.
        overrides (`tuple[str, ...]`): other options than the recipe's.
        step_cost (`float`): time of a step, of a dense-to-sparse step's; from runs on two cores.
        by_rows (`bool`): whether it is as long as its rows are many, instead of `max_steps`.
    """

    run: Callable
    groups: tuple
    recipe: str
    inputs: dict = field(default_factory=dict)
    overrides: tuple = ()
    step_cost: float = 1.0
    by_rows: bool = False

    def length(self, groups):
        """Steps of its options, or rows."""
        return groups[0].dataset_options["rows"] if self.by_rows else groups[-1].max_steps

    def of_length(self, groups, length):
        """Options that say so many steps, or rows."""
        if self.by_rows:
            return ("--dataset_options", json.dumps({**groups[0].dataset_options, "rows": length}))
        return ("--max_steps", str(length))


@dataclass(frozen=True)
class World:
    """
    Where a quickstart takes place.

    Args:
        recipes (`str`): folder of the recipes.
        dataset (`str`): name of the data set.
        stages (`dict[str, Stage]`): by name, in the order of their running.
        test_rows (`Callable[[int, int], Dataset]`): test rows of a seed, so many or fewer.
        blind_rows (`Callable[[World, int], list[dict]]`): what the blind baseline learns from.
        asked (`Callable[[Dataset, int, Path], list[dict]]`):
            A row of each kind for the published student, `image` being a path; pictures go into the folder.
        minutes (`float`): for the whole run, unless somebody says otherwise.
        evaluation_cost, publishing_cost (`float`):
            Time of judging one model and of publishing, in dense-to-sparse steps.
    """

    recipes: str
    dataset: str
    stages: dict
    test_rows: Callable
    blind_rows: Callable
    asked: Callable
    minutes: float
    evaluation_cost: float
    publishing_cost: float

    def parse(self, name, output_dir, seed, *more):
        """Argument groups of a stage: its recipe, with this run's folders and seed."""
        stage = self.stages[name]
        argv = ["--config", str(recipes.packaged("recipes", f"{self.recipes}/{stage.recipe}.yaml")), *stage.overrides]
        argv += ["--output_dir", str(output_dir / name), "--seed", str(seed)]
        if not stage.by_rows:
            argv += ["--disable_tqdm", "false"]
        for option, earlier in stage.inputs.items():
            argv += [f"--{option}", str(output_dir / earlier)]
        return recipes.parse(stage.groups, [*argv, *more])

    def run(self, name, output_dir, seed, length):
        """Runs a stage, of so many steps or rows; `dict`: what its `run.json` holds."""
        stage, start = self.stages[name], time.perf_counter()
        more = stage.of_length(self.parse(name, output_dir, seed), length)
        result = stage.run(*self.parse(name, output_dir, seed, *more))
        if stage.by_rows:
            result = {"stage": name, "seconds": time.perf_counter() - start, **result}
            output_folder.write_json(output_dir / name / output_folder.RUN_FILE, result)
        return result

    @property
    def teacher(self):
        """`str`: name of the teacher."""
        return self.parse("mimic_sparse", Path(), 0)[1].teacher


def _easy_vqa_test(seed, count):
    rows = easy_vqa.load("questions", "test", seed)
    return rows.select(range(min(count, len(rows))))


def _easy_vqa_asked(rows, seed, folder):
    paths = easy_vqa.image_paths("test")
    asked = {row["kind"]: row for row in easy_vqa.balanced(easy_vqa.questions("test"), seed)}
    return [{**row, "image": paths[row["image_id"]]} for row in asked.values()]


def _scenes_train(world, seed):
    options = scene_rows.scene_options(world.parse("mimic_sparse", Path(), seed)[0].dataset_options)
    numbers = range(options.first_row, options.first_row + options.rows)
    return [scene_rows.scene_row(number, "mixture", "train", seed, options)[1] for number in numbers]


def _scenes_asked(rows, seed, folder):
    """Of the tasks that are one question."""
    kinds, asked = rows["kind"][:], []
    folder.mkdir(parents=True, exist_ok=True)
    for kind in dict.fromkeys(kind for kind in kinds if kind != "conversation"):
        number = kinds.index(kind)
        path = folder / f"{number}.png"
        rows[number]["images"][0].save(path)
        asked.append({name: rows[number][name] for name in ("question", "answer", "kind")} | {"image": str(path)})
    return asked


MIMIC = (mimic.run, (DataArguments, DistillArguments, UpcycleArguments, MimicConfig))

ADAPT = (adapt.run, (DataArguments, StudentArguments, AdaptConfig))

PREFER = (prefer.run, (DataArguments, DistillArguments, PreferenceConfig))

PAIRS = (make_preferences.run, (PromptArguments, make_preferences.PairArguments))

NO_TEACHER = ("--kl_weight", "0", "--lm_weight", "1")

# the comparison: the same student, rows and steps, without a teacher
SUPERVISED = {
    "sft_dense": Stage(*MIMIC, "2_mimic_dense", {"student": "adapt"}, NO_TEACHER, step_cost=0.5),
    "sft": Stage(*MIMIC, "3_mimic_sparse", {"student": "sft_dense"}, NO_TEACHER, step_cost=0.7),
}

EASY_VQA = World(
    recipes="tiny",
    dataset=easy_vqa.DATASET,
    stages={
        "adapt": Stage(*ADAPT, "1_adapt", step_cost=0.8),
        "mimic_dense": Stage(*MIMIC, "2_mimic_dense", {"student": "adapt"}, step_cost=0.8),
        "mimic_sparse": Stage(*MIMIC, "3_mimic_sparse", {"student": "mimic_dense"}),
        "prefer": Stage(*PREFER, "4_prefer", {"student": "mimic_sparse"}),
        **SUPERVISED,
    },
    test_rows=_easy_vqa_test,
    blind_rows=lambda world, seed: easy_vqa.balanced(easy_vqa.questions("train"), seed),
    asked=_easy_vqa_asked,
    minutes=10,
    evaluation_cost=20,
    publishing_cost=60,
)

SCENES = World(
    recipes="scenes",
    dataset=scene_rows.DATASET,
    stages={
        "adapt": Stage(*ADAPT, "1_adapt", step_cost=0.5),
        "mimic_dense": Stage(*MIMIC, "2_mimic_dense", {"student": "adapt"}, step_cost=0.8),
        "mimic_sparse": Stage(*MIMIC, "3_mimic_sparse", {"student": "mimic_dense"}),
        "make_preferences": Stage(
            *PAIRS, "4_make_preferences", {"model": "mimic_sparse"}, step_cost=0.012, by_rows=True
        ),
        "prefer": Stage(
            *PREFER, "4_prefer", {"student": "mimic_sparse", "dataset_name": "make_preferences"}, step_cost=0.6
        ),
        **SUPERVISED,
    },
    test_rows=lambda seed, count: scene_rows.load("mixture", "test", seed, {"rows": count}),
    blind_rows=_scenes_train,
    asked=_scenes_asked,
    minutes=5,
    evaluation_cost=20,
    publishing_cost=60,
)

WORLDS = {"scenes": SCENES, "easy-vqa": EASY_VQA}

REPORTED = ("adapt", "mimic_dense", "mimic_sparse", "prefer", "sft")


def plan_steps(world, output_dir, seed, max_minutes):
    """
    Steps of each stage: the recipes', or fewer, in proportion, if this machine is too slow for them.

    Args:
        world ([`World`]).
        output_dir (`Path`), seed (`int`): of the run.
        max_minutes (`float`): for all of it.

    Returns:
        `dict[str, int]`: steps, or rows of a stage that is as long as its rows are many.

    Raises:
        ValueError: if the time would do for less than a quarter of them.
    """
    lengths = {name: stage.length(world.parse(name, output_dir, seed)) for name, stage in world.stages.items()}
    training_cost = sum(length * world.stages[name].step_cost for name, length in lengths.items())
    fixed_cost = world.evaluation_cost * (len(REPORTED) + 1) + world.publishing_cost + CALIBRATION_STEPS
    seconds = seconds_per_step(world, seed)
    share = min(1.0, (max_minutes * 60 / seconds - fixed_cost) / training_cost)
    if share < 0.25:
        needed = seconds * (fixed_cost + 0.25 * training_cost) / 60
        raise ValueError(
            f"`--max-minutes` is {max_minutes:g}, and a quarter of the recipes' steps would take about "
            f"{needed:.1f} on this machine: with fewer the student learns nothing. Give more time."
        )
    if share < 1:
        console.print(f"Taking {share:.0%} of the recipes' steps, to end in {max_minutes:g} minutes.")
    return {name: max(1, round(length * share)) for name, length in lengths.items()}


def seconds_per_step(world, seed):
    """Time of a dense-to-sparse step on this machine, from a few of them."""
    with tempfile.TemporaryDirectory() as folder:
        parts = world.parse("adapt", Path(folder), seed)[1]
        model, processor = build_student(parts.vision_tower, parts.language_model, seed=seed)
        output_folder.save_checkpoint(model, processor, Path(folder, "mimic_dense"))
        console.rule("[bold]how fast is this machine?[/]")
        return world.run("mimic_sparse", Path(folder), seed, CALIBRATION_STEPS)["seconds_per_step"]
