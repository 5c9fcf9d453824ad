"""Which checkpoints are whole, which one a run begins from, and which options it may then have."""

import dataclasses
import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from llava_mod_hf import MimicConfig, PreferenceConfig
from llava_mod_hf.commands.arguments import DistillArguments, StudentArguments, UpcycleArguments
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.checkpoints import chosen_checkpoint, damaged_file, last_complete_checkpoint
from llava_mod_hf.training.run_recipe import (
    MAY_CHANGE,
    PROCESSES_FILE,
    Recipe,
    check_same_recipe,
    recipe_of,
    write_processes,
    write_recipe,
)

FILES = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


def write_checkpoint(folder):
    folder.mkdir()
    save_file({"weight": torch.ones(64)}, folder / FILES[0])
    for name in FILES[1:3]:
        torch.save({"step": torch.ones(64)}, folder / name)
    (folder / FILES[3]).write_text('{"global_step": 1}')
    return str(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_cut_file_is_found(tmp_path, name, share):
    first, second = (write_checkpoint(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    assert damaged_file(second) is None
    assert last_complete_checkpoint(tmp_path) == second
    file = tmp_path / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert damaged_file(second) == file
    assert last_complete_checkpoint(tmp_path) == first
    with pytest.raises(ValueError, match=rf"{name}` is cut off or damaged"):
        chosen_checkpoint(second, tmp_path)


def test_where_a_run_begins(tmp_path):
    assert chosen_checkpoint(None, tmp_path) is None
    first, second = (write_checkpoint(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    for choice in (None, True, "true", "True", "last"):
        assert chosen_checkpoint(choice, tmp_path) == second, choice
    for choice in (False, "false"):
        assert chosen_checkpoint(choice, tmp_path) is None, choice
    assert chosen_checkpoint(first, tmp_path) == first


def refusal(folder, then, now, changed=()):
    """What is said of a recipe that was `then` and is `now`, or `None`."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(then))
    try:
        check_same_recipe(folder, Recipe(now, {name: now[name] for name in changed}))
    except ValueError as error:
        return str(error)


def test_what_changes_learning_is_refused_by_name(tmp_path):
    then = {"learning_rate": 1e-3, "student": "a", "save_steps": 5, "lr_scheduler_type": "linear", "gone": 1}
    assert refusal(tmp_path, then, then) is None
    assert refusal(tmp_path, then, then | {"save_steps": 7}) is None
    assert "`student` was 'a' and is 'b'." in refusal(tmp_path, then, then | {"student": "b"})
    # an option that came later is at its default, or was chosen
    assert refusal(tmp_path, then, then | {"new": 3}) is None
    assert "`new` was None and is 3" in refusal(tmp_path, then, then | {"new": 3}, changed=["new"])


def test_another_number_of_processes_is_refused_with_what_keeps_the_rows_of_a_step(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    write_recipe(Recipe(options, {}), tmp_path)
    write_processes(4, tmp_path)
    check_same_recipe(tmp_path, Recipe(options, {}, processes=4))
    with pytest.raises(ValueError, match=r"processes was 4 and is 2\. .*`gradient_accumulation_steps: 6` .* 24 rows"):
        check_same_recipe(tmp_path, Recipe(options, {}, processes=2))
    # another number of accumulation steps keeps the rows of a step, and not what is drawn for them
    with pytest.raises(
        ValueError, match=r"`gradient_accumulation_steps` was 3 and is 6, the number of processes was 4"
    ):
        check_same_recipe(tmp_path, Recipe(options | {"gradient_accumulation_steps": 6}, {}, processes=2))
    with pytest.raises(ValueError, match=r"was 4 and is 5\. .*in another `output_dir`") as error:
        check_same_recipe(tmp_path, Recipe(options, {}, processes=5))
    assert "24 rows" not in str(error.value)
    (tmp_path / PROCESSES_FILE).unlink()  # an older checkpoint does not say
    check_same_recipe(tmp_path, Recipe(options, {}, processes=2))


@pytest.mark.parametrize(("schedule", "may"), [("constant", True), ("constant_with_warmup", True), ("cosine", False)])
def test_a_run_may_get_longer_where_its_learning_rate_does_not_depend_on_it(tmp_path, schedule, may):
    then = {"max_steps": 10, "lr_scheduler_type": schedule}
    assert (refusal(tmp_path, then, then | {"max_steps": 20}) is None) == may


def test_every_option_that_may_change_is_one(tmp_path):
    groups = (DataArguments, StudentArguments, DistillArguments, UpcycleArguments)
    configs = (AdaptConfig, MimicConfig, PreferenceConfig)
    known = {item.name for group in (*groups, *configs) for item in dataclasses.fields(group)}
    names = [name for names in MAY_CHANGE.values() for name in names.split()]
    assert set(names) - known == set()
    assert len(names) == len(set(names))
    first, second = (recipe_of(AdaptConfig(output_dir=str(tmp_path / name), use_cpu=True)) for name in "ab")
    assert refusal(tmp_path, json.loads(json.dumps(first.resolved)), second.resolved, second.changed) is None
