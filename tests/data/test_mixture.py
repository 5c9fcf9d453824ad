"""Mixtures: their shares, their order, one form of rows, and each data set's name in what is said of it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from PIL import Image
from trl.scripts.utils import DatasetConfig

from helpers.load_cases import COLUMNS, row, write
from llava_mod_hf.data.arguments import STOPPING, DataArguments, DatasetEntry
from llava_mod_hf.data.formats import FORMATS, text_of
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.data.mixture import count_sources, mix_rows, row_names, source_names
from llava_mod_hf.recipes import parse

ORDER = "aabbaaaabaababbbabbaabaa"

PAIR = ("prompt", "chosen", "rejected")


def llava(number, image="x.png", answer=None):
    turns = [
        {"from": "human", "value": f"<image>\nquestion {number}"},
        {"from": "gpt", "value": f"a{number}" if answer is None else answer},
    ]
    return {"id": number, "image": image, "conversations": turns}


def parts(text, *images):
    return [*({"type": "image", "text": None} for _ in images), {"type": "text", "text": text}]


@pytest.fixture
def sets(tmp_path):
    """LLaVA's JSON and TRL's JSON lines of parts: the picture that both name lies in a folder of each."""
    for name, color in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / name / "x.png")
    rows = [
        {
            "images": ["x.png"],
            "prompt": [{"role": "user", "content": parts("question", "x.png")}],
            "completion": [{"role": "assistant", "content": parts(f"b{number}")}],
        }
        for number in range(130)
    ]
    write(tmp_path / "a" / "rows.json", [llava(number) for number in range(300)])
    write(tmp_path / "b" / "rows.jsonl", rows)
    return [str(tmp_path / "a" / "rows.json"), str(tmp_path / "b" / "rows.jsonl")]


def load(entries, seed=0, columns=COLUMNS, **values):
    return load_rows(DataArguments(datasets=entries, **values), columns=columns, seed=seed)


def weighted(paths, *weights, **keys):
    return [{"path": path, "weight": weight, **keys} for path, weight in zip(paths, weights, strict=True)]


def answers(rows):
    return [text_of(row["completion"][0]["content"]) for row in rows]


def test_without_weights_each_row_comes_once_with_its_picture_and_its_place(sets):
    rows = load([{"path": path} for path in sets])
    assert answers(rows) == [f"a{number}" for number in range(300)] + [f"b{number}" for number in range(130)]
    assert count_sources(rows) == {sets[0]: 300, sets[1]: 130}
    assert rows["source_row"][:] == [*range(300), *range(130)]
    colors = [rows[number]["images"][0].getpixel((0, 0)) for number in (0, 299, 300, 429)]
    assert colors == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
    assert rows[400]["prompt"] == [{"role": "user", "content": parts("question", "x.png")}]
    assert row_names(rows)[301] == f"Row 1 of `{sets[1]}`"
    assert set(rows.column_names) == {"images", "prompt", "completion", "source_row", "source_dataset"}


def test_rows_are_drawn_by_their_weights_until_the_first_data_set_ends(sets):
    rows = load(weighted(sets, 1, 3))
    found = answers(rows)
    counts = count_sources(rows)
    assert counts[sets[1]] == 130  # all, each once, and nothing after the last
    assert found[-1] == "b129"
    assert [answer for answer in found if answer[0] == "b"] == [f"b{number}" for number in range(130)]
    assert [answer for answer in found if answer[0] == "a"] == [f"a{number}" for number in range(counts[sets[0]])]
    assert counts[sets[1]] / len(rows) == pytest.approx(0.75, abs=0.07)  # 0.033 is a standard deviation of 173 draws
    for start in (0, 50, 100):  # all along
        part = Counter(answer[0] for answer in found[start : start + 50])
        assert part["b"] == pytest.approx(37.5, abs=9)
    # weights are shares of their sum
    assert answers(load(weighted(sets, 0.2, 0.6))) == found


@pytest.mark.parametrize("stopping", [None, *STOPPING])
def test_the_order_is_the_same_streamed_or_not_and_another_with_another_seed(sets, stopping):
    entries = weighted(sets, 2, 1, max_samples=40)
    found = answers(load(entries, stopping_strategy=stopping))
    assert answers(load(entries, stopping_strategy=stopping, streaming=True)) == found
    assert answers(load(entries, stopping_strategy=stopping)) == found
    assert answers(load(entries, stopping_strategy=stopping, seed=1)) != found
    each = Counter(found)
    longest = max(each.values())
    if stopping == "all_exhausted":
        assert len(each) == 80 and longest > 1
    else:
        assert longest == 1
        assert (len(each) == 80) == (stopping == "all_exhausted_without_replacement")


def test_the_order_follows_from_the_seed_in_every_process(sets):
    found = "".join(answer[0] for answer in answers(load(weighted(sets, 1, 1, max_samples=20), seed=3)))
    assert found[:24] == ORDER


@pytest.mark.slow
def test_another_process_mixes_alike(sets):
    entries = weighted(sets, 1, 1, max_samples=60)
    code = f"""
import json, sys
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows
rows = load_rows(DataArguments(datasets={entries!r}), columns={COLUMNS!r}, seed=7)
print(json.dumps([rows["source_dataset"][:], rows["source_row"][:]]))
"""
    run = subprocess.run([sys.executable, "-c", code, sets[0] + ".cache"], capture_output=True, text=True, check=True)
    rows = load(entries, seed=7)
    assert json.loads(run.stdout.splitlines()[-1]) == [rows["source_dataset"][:], rows["source_row"][:]]


def test_max_samples_is_of_the_mixture_and_max_samples_of_an_entry_of_that(sets):
    whole = answers(load(weighted(sets, 1, 1)))
    for streaming in (False, True):
        assert answers(load(weighted(sets, 1, 1), max_samples=30, streaming=streaming)) == whole[:30]
    rows = load([{"path": sets[0], "max_samples": 3}, {"path": sets[1]}])
    assert count_sources(rows) == {sets[0]: 3, sets[1]: 130}


def test_a_stream_has_pictures_rows_and_names(sets):
    rows = load(weighted(sets, 1, 1), streaming=True)
    assert source_names(rows) == sets
    for each in rows.take(20):
        assert each["images"][0].getpixel((0, 0)) == ((255, 0, 0), (0, 0, 255))[each["source_dataset"]]
        assert text_of(each["completion"][0]["content"]) == f"{'ab'[each['source_dataset']]}{each['source_row']}"


def test_pairs_of_different_formats(tmp_path, sets):
    path = write(
        tmp_path / "a" / "rlaif.json",
        [
            {"image": "x.png", "question": "q?", "chosen": f"c{number}", "rejected": "no", "idx": number}
            for number in range(3)
        ],
    )
    rows = load([str(path), {"path": "embedded:scenes", "name": "preferences", "options": {"rows": 2}}], columns=PAIR)
    assert count_sources(rows) == {str(path): 3, "embedded:scenes (preferences)": 2}
    assert [messages[0]["role"] for messages in rows["chosen"]] == ["assistant"] * 5
    assert rows["source_row"][:] == [0, 1, 2, 0, 1]


def test_conversations_as_a_whole(tmp_path):
    turns = [{"from": "human", "value": "q0?"}, {"from": "gpt", "value": "a0"}]
    turns += [{"from": "human", "value": "q1?"}, {"from": "gpt", "value": "a1"}]
    path = str(write(tmp_path / "c.json", [{"conversations": turns}]))
    other = {"path": "embedded:scenes", "name": "describe", "options": {"rows": 1}}
    rows = load([path, other])
    assert [len(messages) for messages in rows["completion"]] == [3, 1]
    assert rows[0]["completion"][-1] == {"role": "assistant", "content": "a1"}
    assert [len(messages) for messages in load([path, other], multi_turn="expand")["completion"]] == [1, 1, 1]


def test_what_all_have_alike_is_kept_and_the_columns_of_an_entry_are_all_that_is_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    first = write(tmp_path / "a.jsonl", [{**row("x.png"), "kind": "k", "number": 1}])
    second = write(tmp_path / "b.jsonl", [{**row("x.png"), "kind": "l", "number": "one", "more": 1}])
    rows = load([str(first), str(second)])
    assert rows["kind"][:] == ["k", "l"]
    assert not {"number", "more"} & set(rows.column_names)
    entries = [{"path": str(first), "columns": ["images", "prompt", "completion"]}, str(second)]
    assert "kind" not in load(entries).column_names
    with pytest.raises(ValueError, match=r"a.jsonl` has the columns .*, and `columns` asks for answer as well"):
        load([{"path": str(first), "columns": ["images", "answer"]}])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_is_named_with_its_data_set_or_left_out(tmp_path, sets, streaming, caplog):
    outside = tmp_path / "a" / "x.png"
    bad = {
        "image": llava(1, image="nowhere.png"),
        "outside": llava(1, image=f"../a/{outside.name}"),
        "answer": llava(1, answer=""),
    }
    for name, each in bad.items():
        path = write(tmp_path / "b" / f"{name}.json", [llava(0), each, llava(2)])
        with pytest.raises(ValueError, match=rf"Row 1 of `{path}`.*(nowhere|lies outside the image folder|is empty)"):
            list(load(weighted([sets[0], path], 1, 3, max_samples=3), streaming=streaming))
        caplog.clear()
        entries = weighted([sets[0], path], 1, 9, max_samples=3)
        rows = list(load(entries, streaming=streaming, bad_rows="drop", max_bad_rows=1.0))
        assert [row["source_row"] for row in rows if row["source_dataset"] == 1] == [0, 2]
        assert f"Row 1 of `{path}`" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_trls_keeps_the_numbers_of_the_others(tmp_path, sets, streaming, caplog):
    (tmp_path / "c").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "c" / "x.png")
    path = write(tmp_path / "c" / "rows.jsonl", [row("x.png"), row("nowhere.png"), row("x.png")])
    rows = list(
        load(weighted([sets[0], path], 1, 9, max_samples=3), streaming=streaming, bad_rows="drop", max_bad_rows=1.0)
    )
    assert [row["source_row"] for row in rows if row["source_dataset"] == 1] == [0, 2]
    assert f"Row 1 of `{path}`: image" in caplog.text


def test_pictures_between_words_stay_there(tmp_path, sets):
    content = [{"type": "text", "text": "this"}, {"type": "image", "text": None}]
    each = {
        "images": ["x.png"],
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": parts("b")}],
    }
    path = write(tmp_path / "b" / "between.jsonl", [each])
    assert load([str(path)])[0]["prompt"][0]["content"][0]["text"] == "this"  # alone it stays as it is
    rows = load([sets[0], str(path)])
    assert rows[300]["prompt"][0]["content"] == content
    assert rows[0]["prompt"][0]["content"] == parts("question 0", "x.png")  # a text has its pictures before it


def test_texts_and_messages_do_not_mix(tmp_path, sets):
    path = write(tmp_path / "b" / "text.jsonl", [{"images": ["x.png"], "prompt": "<image>?", "completion": "b"}])
    with pytest.raises(ValueError, match=r"text.jsonl` is a text and that of `.*rows.json` messages"):
        load([sets[0], str(path)])


def test_a_file_that_is_not_there_is_told_by_the_entrys_key(tmp_path):
    with pytest.raises(ValueError, match=r"The data file `.*nowhere.json` does not exist: check `path`"):
        load([str(tmp_path / "nowhere.json")])


def test_an_image_folder_is_inherited_by_entries_without_one(tmp_path, sets):
    (tmp_path / "rows").mkdir()
    paths = [write(tmp_path / "rows" / name, [llava(0)]) for name in ("first.json", "second.json")]
    entries = [str(paths[0]), {"path": str(paths[1]), "image_folder": str(tmp_path / "b")}]
    rows = load(entries, image_folder=str(tmp_path / "a"))
    assert [each["images"][0].getpixel((0, 0)) for each in rows] == [(255, 0, 0), (0, 0, 255)]


def test_entries_have_split_and_options():
    entry = {"path": "embedded:scenes", "name": "presence", "options": {"rows": 5}}
    rows = load([entry, {**entry, "split": "test", "options": {"rows": 3}}])
    assert count_sources(rows) == {"embedded:scenes (presence)": 5, "embedded:scenes (presence, test)": 3}
    names = source_names(load([entry, entry]))
    assert names == ["embedded:scenes (presence)", "embedded:scenes (presence) #2"]


def test_entries_of_trl_and_of_the_command_line(sets):
    entries = [DatasetConfig(path=sets[0]), sets[1], json.dumps({"path": sets[1], "max_samples": 2})]
    arguments = DataArguments(datasets=entries)
    assert arguments.datasets == [DatasetEntry(sets[0]), DatasetEntry(sets[1]), DatasetEntry(sets[1], max_samples=2)]
    assert arguments.names() == [sets[0], sets[1], sets[1]]


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([{"path": "a", "wieght": 1}], r"`datasets\[0\]` has the unknown key `wieght`: did you mean `weight`\? "
         "The keys are path, name, data_dir, data_files, split, columns, weight, image_folder, max_samples, options"),
        ([{"path": "a"}, {"name": "b"}], r"`datasets\[1\]` has no `path`"),
        ([{"path": "a", "fraction": 0.5}], "entry `a` of `datasets` has TRL's `fraction`, .* `weight` in its place"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "entry `b` of `datasets` has no `weight`, and others have one"),
        ([{"path": "a", "weight": 0}], "has the `weight` 0: give a number above 0"),
        ([{"path": "a", "weight": "1"}], "has the `weight` '1': give a number above 0"),
        ([{"path": "a", "weight": True}], "has the `weight` True"),
        ([{"path": "a", "columns": "images"}], "has the `columns` 'images': give a list of names"),
        ([{"path": "a", "split": None}], "has the `split` None: give a text"),
        ([{"path": "json", "data_files": "a.json"}], "`json` of `datasets` is a reader of the library"),
        ([{"path": 5}], "has the `path` 5"),
        ([5], r"`datasets\[0\]` is 5: give an entry"),
        (["{path: a}"], r"`datasets\[0\]` is `\{path: a\}`, which is no JSON"),
        ([], r"`datasets` is \[\]: give a list"),
        ("a.json", "`datasets` is 'a.json': give a list"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_refused(entries, told):
    with pytest.raises(ValueError, match=told):
        DataArguments(datasets=entries)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"dataset_name": "a"}, "and both are given"),
        ({"datasets": None}, "and neither is given"),
        ({"dataset_config": "x"}, "`dataset_config` is of `dataset_name`: give it to the entries"),
        ({"dataset_options": {}}, "`dataset_options` is of `dataset_name`"),
        ({"dataset_train_split": "x"}, "give the entries of `datasets` a `split`"),
        ({"stopping_strategy": "all_exhausted"}, "`stopping_strategy` does nothing without a `weight`"),
        ({"stopping_strategy": "some"}, "`stopping_strategy` is 'some': give one of first_exhausted"),
        ({"streaming": True}, "`streaming` takes the first rows, and without weights"),
        ({"max_samples": 3}, "`max_samples` takes the first rows, and without weights"),
    ],
)
def test_options_that_do_not_go_with_a_mixture_are_refused(values, told):
    with pytest.raises(ValueError, match=told):
        DataArguments(**{"datasets": ["a", "b"], **values})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"name": "x"}, "`name` is given with the data set `.*rows.json`, a file or folder of this machine"),
        ({"data_files": "x"}, "`data_files` is given with"),
        ({"split": "test"}, "rows.json` is one file, without splits, and the `split` is `test`"),
        ({"options": {"rows": 3}}, "`options` are of `embedded:scenes`"),
    ],
)
def test_keys_that_do_nothing_for_a_data_set_are_refused(sets, keys, told):
    with pytest.raises(ValueError, match=told):
        load([{"path": sets[0], **keys}])
    if "data_files" in keys:
        with pytest.raises(ValueError, match="`data_files` is given with the data set `embedded:easy-vqa`"):
            load([{"path": "embedded:easy-vqa", **keys}])


def test_a_mixture_of_ones_own_rows():
    mixed = mix_rows([Dataset.from_dict({"a": [1, 2]}), Dataset.from_dict({"a": [3]})], ["x", "y"], [1, 1], seed=2)
    assert count_sources(mixed)["y"] + count_sources(mixed)["x"] == len(mixed)
    with pytest.raises(ValueError, match="There are 1 data sets and 2 names"):
        mix_rows([Dataset.from_dict({"a": [1]})], ["x", "y"])
    with pytest.raises(ValueError, match="There are 1 data sets and 1 names and 2 weights"):
        mix_rows([Dataset.from_dict({"a": [1]})], ["x"], [1, 2])


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_pages_example_is_read(tmp_path):
    (example,) = re.findall(r"```yaml\n(datasets:.*?)```", PAGE, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(example)
    (arguments,) = parse([DataArguments], ["--config", str(tmp_path / "recipe.yaml")])
    given = yaml.safe_load(example)
    assert [
        {key: getattr(entry, key) for key in keys}
        for entry, keys in zip(arguments.datasets, given["datasets"], strict=True)
    ] == given["datasets"]
    assert arguments.stopping_strategy == given["stopping_strategy"] == STOPPING[0]


def test_the_pages_python_runs():
    (code,) = re.findall(r"```python\n(.*?load_rows.*?)```", PAGE, re.DOTALL)
    found = {}
    exec(code, found)
    counts = count_sources(found["rows"])
    assert list(counts) == ["embedded:easy-vqa (captions)", "embedded:scenes (describe)"]
    assert counts["embedded:scenes (describe)"] == 600


def test_the_pages_keys_and_formats_are_those_that_there_are():
    section = PAGE.split("## Several data sets")[1].split("\n## ")[0]
    named = {
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert named == set(DatasetEntry.__dataclass_fields__) - {"fraction"}
    rows = re.findall(
        r"^\| ([^|]+) \| ((?:`\w+`(?: of `\{[^|]+\}`)?(?:, )?)+) \|", PAGE.split("## Several")[0], re.MULTILINE
    )
    columns = [tuple(re.findall(r"`(\w+)`", re.sub(r" of `[^`]+`", "", names))) for _, names in rows]
    assert columns == [entry.columns for entry in FORMATS.values()]


def test_trls_keys_are_all_known_here():
    assert set(DatasetConfig.__dataclass_fields__) == {
        "path", "name", "data_dir", "data_files", "split", "columns", "fraction"
    }  # fmt: skip
