"""Commands that leave rows out write down which, beside what they write, and stop where these are too many."""

import json

import pytest
from PIL import Image

from helpers.stages import ARGUMENTS
from llava_mod_hf import MimicConfig
from llava_mod_hf.commands import cache_teacher, generate_completions
from llava_mod_hf.commands import mimic as mimic_module
from llava_mod_hf.commands.arguments import DistillArguments, UpcycleArguments
from llava_mod_hf.data.arguments import DataArguments, PromptArguments
from llava_mod_hf.publishing.checks import files_to_commit


@pytest.fixture
def file(tmp_path):
    """Twelve rows: 2 has no answer, 5 no picture, 7 and 9 spell out a mark, one of them in the question."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    rows = []
    for number in range(12):
        answer = {2: "", 7: "a <|user|>"}.get(number, "red")
        picture = {5: "nowhere.png"}.get(number, "a.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat?" + " <|user|>" * (number == 9)},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"image": picture, "conversations": turns, "kind": "color"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def written(path):
    return sorted((line["row"], line["dataset"]) for line in map(json.loads, path.read_text().splitlines()))


def mimic(folders, data, output_dir, **args):
    return mimic_module.run(
        data,
        DistillArguments(student=folders["student"], teacher=folders["teacher"]),
        UpcycleArguments(),
        MimicConfig(output_dir=str(output_dir), **{**ARGUMENTS, **args}),
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stage_writes_them_into_its_folder_and_counts_them_in_run_json(folders, file, tmp_path, streaming):
    data = DataArguments(str(file), bad_rows="drop", max_bad_rows=0.3, streaming=streaming)
    run = tmp_path / "run"
    mimic(folders, data, run, max_steps=8)  # more than a pass: a stream begins anew
    assert written(run / "dropped_rows.jsonl") == [(n, str(file)) for n in (2, 5, 7, 9)]
    assert json.loads((run / "run.json").read_text())["dropped_rows"] == {"bad": 4}
    assert "dropped_rows.jsonl" not in {path.name for path in files_to_commit(run)}  # it holds words and paths


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stage_stops_where_they_are_too_many(folders, file, tmp_path, streaming):
    data = DataArguments(str(file), bad_rows="drop", max_bad_rows=0.1, streaming=streaming)
    with pytest.raises(ValueError, match=r"2 of 12 rows of .* \(16.67%\), and `max_bad_rows` is 0.1.*dropped_rows"):
        mimic(folders, data, tmp_path / "run", max_steps=8)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_first_rows_that_are_looked_at_are_not_judged_for_all(folders, file, tmp_path):
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[2], *[rows[0]] * 199]))
    data = DataArguments(str(file), bad_rows="drop", max_bad_rows=0.007, streaming=True)
    mimic(folders, data, tmp_path / "run", max_steps=2, dataloader_num_workers=1)
    assert written(tmp_path / "run" / "dropped_rows.jsonl") == [(0, str(file))]


def test_rows_of_evaluation_are_named_with_their_own_data_set(folders, file, tmp_path):
    data = DataArguments(
        "embedded:easy-vqa",
        dataset_config="captions",
        max_samples=4,
        eval_dataset_name=str(file),
        bad_rows="drop",
        max_bad_rows=0.3,
    )
    mimic(folders, data, tmp_path / "run", eval_strategy="steps", eval_steps=2)
    assert written(tmp_path / "run" / "dropped_rows.jsonl") == [(n, f"{file} (test)") for n in (2, 5, 7, 9)]


def test_a_cache_and_a_written_data_set_have_them_beside_their_folder(folders, file, tmp_path, monkeypatch):
    data = DataArguments(str(file), bad_rows="drop", max_bad_rows=0.3)
    distill = DistillArguments(folders["student"], folders["teacher"], teacher_cache=str(tmp_path / "cache"))
    args = MimicConfig(output_dir=str(tmp_path / "run"), **ARGUMENTS)
    cache_teacher.run(data, distill, UpcycleArguments(), args, cache_teacher.CacheCommand())
    assert written(tmp_path / "cache.dropped_rows.jsonl") == [(n, str(file)) for n in (2, 5, 7, 9)]
    mimic(folders, data, tmp_path / "run")  # reads the same rows

    # of which the answers are not read
    data = PromptArguments(str(file), bad_rows="drop", max_bad_rows=0.3)
    options = generate_completions.GenerationArguments(folders["student"], str(tmp_path / "set"), max_new_tokens=4)
    monkeypatch.setattr(generate_completions, "sample_answers", lambda m, p, rows, **_: [[("red", True)]] * len(rows))
    generate_completions.run(data, options)
    assert written(tmp_path / "set.dropped_rows.jsonl") == [(n, str(file)) for n in (2, 5, 9)]


def test_another_process_of_a_cache_writes_none(folders, file, tmp_path):
    data = DataArguments(str(file), bad_rows="drop", max_bad_rows=0.3)
    distill = DistillArguments(folders["student"], folders["teacher"], teacher_cache=str(tmp_path / "cache"))
    args = MimicConfig(output_dir=str(tmp_path / "run"), **ARGUMENTS)
    cache_teacher.run(data, distill, UpcycleArguments(), args, cache_teacher.CacheCommand(shard=1, num_shards=2))
    assert not (tmp_path / "cache.dropped_rows.jsonl").exists()
