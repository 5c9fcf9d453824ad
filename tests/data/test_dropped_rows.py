"""Rows that are left out: each is written down with its reason, and too many of them stop the reading."""

import json
import tracemalloc

import pytest
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.dropped_rows import FILE, DroppedRows
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.data.problems import without_problems

COLUMNS = ("prompt", "completion")


def row(answer="red", image=None):
    question = "<image>\nwhat?" if image else "what?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": image} if image else {})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def file(tmp_path):
    """Six rows: 1 has no answer, 3 no picture, 4 spells out a mark; `a.png` is there."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [row(), row(""), row(image="a.png"), row(image="nowhere.png"), row("<|user|>"), row()]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def read(file, processor, dropped, *, streaming=False, **values):
    args = DataArguments(str(file), bad_rows="drop", streaming=streaming, **values)
    rows = load_rows(args, columns=COLUMNS, dropped=dropped)
    return fit_rows(rows, processor, max_length=40, bad_rows="drop", dropped=dropped.of(str(file)))[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_dropped_row_is_a_line_with_its_number_and_reason(file, processor, streaming):
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([*rows, row("red " * 50)]))
    dropped = DroppedRows(file.parent / "run" / FILE, max_share=1)
    found = read(file, processor, dropped, streaming=streaming, max_bad_rows=1.0)
    assert [each["source_row"] for each in found] == [0, 2, 5]
    assert set(found.column_names) == {"images", *COLUMNS, "source_row", "length", "num_images"}
    told = sorted(lines(dropped.path), key=lambda line: line["row"])
    assert {line["dataset"] for line in told} == {str(file)}
    assert [(line["row"], line["kind"]) for line in told] == [(1, "bad"), (3, "bad"), (4, "bad"), (6, "too_long")]
    for line, part in zip(
        told, ("an answer is empty", "nowhere.png", "holds `<|user|>`", "and `max_length` is 40"), strict=True
    ):
        assert line["reason"].startswith(f"Row {line['row']}") and part in line["reason"]
    assert dropped.counts() == {"bad": 3, "too_long": 1}


def test_equal_texts_are_each_named_by_their_own_number(processor):
    bad = {"images": [], "prompt": [{"role": "user", "content": "<image>?"}], "completion": "x"}
    bad["completion"] = [{"role": "assistant", "content": "x"}]
    good = bad | {"prompt": [{"role": "user", "content": "?"}]}
    rows = Dataset.from_list([bad, good, bad]).add_column("source_row", [5, 6, 9])
    seen = []
    dropped = DroppedRows(max_share=1)
    dropped.write = seen.extend
    fit_rows(rows, processor, max_length=None, bad_rows="drop", dropped=dropped)
    assert [(line["row"], line["reason"][:6]) for line in seen] == [(5, "Row 5:"), (9, "Row 9:")]


def test_a_new_start_writes_the_file_anew_and_one_process_alone_writes(file, processor):
    for _ in range(2):
        dropped = DroppedRows(file.parent / FILE, max_share=1)
        read(file, processor, dropped, max_bad_rows=1.0)
        read(file, processor, DroppedRows(file.parent / FILE, max_share=1, writes=False), max_bad_rows=1.0)
        assert dropped.counts() == {"bad": 3}


def test_more_than_the_share_stop_the_reading_with_the_first_reasons(file, processor):
    with pytest.raises(ValueError) as caught:
        read(file, processor, DroppedRows(file.parent / FILE))
    told = str(caught.value)
    assert told.startswith(f"2 of 6 rows of `{file}` cannot be used (33.33%), and `max_bad_rows` is 0.01")
    assert f"`{file.parent / FILE}` names all" in told and "Row 1: an answer is empty" in told and "Row 3" in told
    assert len(lines(file.parent / FILE)) == 2  # each of them, all the same
    read(file, processor, DroppedRows(file.parent / FILE, max_share=2 / 6), max_bad_rows=2 / 6)  # a share that may be
    with pytest.raises(ValueError, match="1 of 4 rows .* cannot be used .25.00%., and `max_bad_rows` is 0.2"):
        rows = load_rows(DataArguments(str(file), bad_rows="drop", max_bad_rows=0.5), columns=COLUMNS)
        fit_rows(rows, processor, max_length=None, bad_rows="drop", dropped=DroppedRows(max_share=0.2))


def test_rows_that_are_too_long_do_not_count_as_bad(processor):
    talk = [{"images": [], "prompt": [{"role": "user", "content": "?"}]} for _ in range(3)]
    rows = [
        each | {"completion": [{"role": "assistant", "content": "red " * n}]}
        for each, n in zip(talk, (1, 99, 99), strict=True)
    ]
    fitted, report = fit_rows(
        Dataset.from_list(rows), processor, max_length=20, bad_rows="drop", dropped=DroppedRows(max_share=0)
    )
    assert (len(fitted), report["too_long"]) == (1, 2)


def stream_file(tmp_path, bad, count=3000):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row("" if number in bad else "red")) + "\n" for number in range(count)))
    return path


def test_a_stream_is_judged_after_a_thousand_rows_and_at_its_end(tmp_path):
    path = stream_file(tmp_path, bad=range(0, 1400, 2))
    args = DataArguments(str(path), streaming=True, bad_rows="drop", max_bad_rows=0.4)
    taken = 0
    with pytest.raises(ValueError, match="500 of 1000 rows"):
        for _ in load_rows(args, columns=COLUMNS):
            taken += 1
    assert taken == 499
    dropped = DroppedRows(max_share=0.1)
    list(
        load_rows(
            DataArguments(str(path), streaming=True, bad_rows="drop", max_samples=99), columns=COLUMNS, dropped=dropped
        )
    )
    with pytest.raises(ValueError, match="50 of 99 rows"):
        dropped.judge()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_begins_anew_writes_each_row_once(tmp_path, workers):
    path = stream_file(tmp_path, bad=(0, 7), count=20)
    dropped = DroppedRows(tmp_path / FILE, max_share=0.2)
    args = DataArguments(str(path), streaming=True, bad_rows="drop", max_bad_rows=0.2)
    rows = load_rows(args, columns=COLUMNS, dropped=dropped)
    next(iter(rows))  # as a trainer looks at the first ones, of which half are bad
    loader = DataLoader(rows.remove_columns("images").repeat(3), batch_size=None, num_workers=workers)
    assert len(list(loader)) == 3 * 18
    assert [line["row"] for line in lines(dropped.path)] == [0, 7]


def test_a_worker_judges_a_small_stream_when_it_begins_anew(tmp_path):
    path = stream_file(tmp_path, bad=(3, 7), count=20)
    rows = load_rows(DataArguments(str(path), streaming=True, bad_rows="drop"), columns=COLUMNS)
    list(DataLoader(rows.remove_columns("images"), batch_size=None, num_workers=1))
    with pytest.raises(ValueError, match="2 of 20 rows"):
        list(DataLoader(rows.remove_columns("images").repeat(2), batch_size=None, num_workers=1))


@pytest.mark.slow
def test_many_reasons_are_written_with_little_memory(tmp_path):
    count = 200_000
    rows = Dataset.from_dict({"x": range(count), "problem": [f"Row {n} {'long ' * 20}" for n in range(count)]})
    dropped = DroppedRows(tmp_path / FILE, max_share=1)
    tracemalloc.start()
    assert len(without_problems(rows, dropped.reading("some"))) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # the reasons alone have 21 MB
    assert dropped.counts() == {"bad": count}


@pytest.mark.parametrize("value", [-0.1, 1.5, "much", True, float("nan")])
def test_a_share_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="`max_bad_rows` is .*: give a share of the rows, from 0 to 1"):
        DataArguments("rows.json", bad_rows="drop", max_bad_rows=value)


def test_a_share_without_dropping_is_refused():
    with pytest.raises(ValueError, match="`max_bad_rows` is 0.5, which does nothing without `bad_rows: drop`"):
        DataArguments("rows.json", max_bad_rows=0.5)


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    dropped = DroppedRows(tmp_path / "file" / FILE, max_share=1)
    with pytest.raises(OSError, match="could not be written .*: make room for it"):
        dropped.reading("some").note([(0, "bad", "why")])
