"""Rows and files that look right at first sight: each is refused by name, or left out and told."""

import codecs
import gzip
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_mod_hf.data.dropped_rows import DroppedRows
from llava_mod_hf.data.fitting import _measure_batch, fit_rows
from llava_mod_hf.data.image_files import resolve_image
from llava_mod_hf.data.load import DataArguments, load_rows

GOOD = {"conversations": [{"from": "human", "value": "what color?"}, {"from": "gpt", "value": "red"}]}
PAIR = {"question": "what color?", "chosen": "red", "rejected": "blue"}
# of LLaVA's and of RLAIF-V's rows; each is Row 1
BAD = [
    (GOOD, {"id": 7}, "Row 1 has no `conversations`"),
    (GOOD, None, "Row 1 is a NoneType: rows are `{key: value}`"),
    (GOOD, 17, "Row 1 is a int"),
    (GOOD, {"conversations": None}, "`conversations` must be a list"),
    (GOOD, {"conversations": "what?"}, "`conversations` must be a list"),
    (
        GOOD,
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": ["a", "b"]}]},
        r"Row 1: the `value` of a turn is \['a', 'b'\]: give a text",
    ),
    (PAIR, {"question": 3, "chosen": "a", "rejected": "b"}, "Row 1: the question is 3: give a text"),
    (PAIR, {"question": "what?", "chosen": 5, "rejected": "b"}, "an answer is 5: give a text"),
    (PAIR, {"question": "what?", "chosen": [3], "rejected": "b"}, r"an answer is \[3\]: give a text"),
    (PAIR, {"question": "what?", "rejected": "b"}, "Row 1 has no `chosen`"),
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(path, **values):
    columns = ("prompt",) if values.pop("pairs", False) else ("prompt", "completion")
    return load_rows(DataArguments(str(path), **values), columns=columns)


@pytest.mark.parametrize(("good", "bad", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_malformed_rows_stop_or_are_left_out_by_number(tmp_path, caplog, good, bad, message):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([good, bad, good]))
    with pytest.raises(ValueError, match=message):
        load(path, pairs=good is PAIR)
    assert list(load(path, pairs=good is PAIR, bad_rows="drop", max_bad_rows=1.0)["source_row"]) == [0, 2]
    assert "Left out 1 of 3 rows, first: Row 1" in caplog.text


def test_the_first_row_may_be_the_bad_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([None, GOOD]))
    assert list(load(path, bad_rows="drop", max_bad_rows=1.0)["source_row"]) == [1]


@pytest.mark.parametrize("encode", [lambda text: text.encode("utf-16"), lambda text: gzip.compress(text.encode())])
def test_other_encodings_are_refused_with_the_files_name(tmp_path, encode):
    path = tmp_path / "rows.json"
    path.write_bytes(encode(json.dumps([GOOD])))
    with pytest.raises(ValueError, match=r"rows\.json` is not text in UTF-8 .*: unpack it if it is compressed"):
        load(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps([GOOD]).encode())
    assert len(load(path)) == 1


def test_a_file_that_ends_between_rows_is_cut_off(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD])[:-1])
    with pytest.raises(ValueError, match="ends inside its list, after 2 rows: it was cut off"):
        load(path)


def short_png(path):
    """A PNG of 8 x 8 whose chunks are whole, and whose data has one line of eight."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 25))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


def deep(mode, suffix):
    values = np.linspace(0, 1, 64).reshape(8, 8) * (1 if mode == "F" else 60000)
    kinds = {"F": np.float32, "I;16": np.uint16, "I": np.int32}

    def write(path):
        Image.fromarray(values.astype(kinds[mode])).save(path)

    return suffix, write


@pytest.mark.parametrize("inside", [False, True], ids=["path", "bytes"])
@pytest.mark.parametrize(
    ("suffix", "write", "message"),
    [
        (*deep("I;16", "png"), "more than 8 bits a value .mode I;16"),
        (*deep("I", "tiff"), "more than 8 bits a value .mode I"),
        (*deep("F", "tiff"), "more than 8 bits a value .mode F"),
        ("png", short_png, "is not a whole image"),
    ],
    ids=["16 bits", "32 bits", "float", "too little data"],
)
def test_pictures_that_would_become_something_else(tmp_path, suffix, write, message, inside):
    path = tmp_path / f"picture.{suffix}"
    write(path)
    image = {"bytes": path.read_bytes() if inside else None, "path": path.name}
    with pytest.raises(ValueError, match=message):
        resolve_image(image, tmp_path, "Row 0")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_whole_png_passes(tmp_path, mode):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (7, 13, 4), dtype=np.uint8), "RGBA").convert(mode)
    picture.save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    assert resolve_image(image, tmp_path, "Row 0") == image


def test_an_interlaced_png_passes(tmp_path):
    rows = [(columns, height) for columns, height in ((1, 1), (1, 1), (2, 1), (2, 2), (3, 2), (2, 3), (5, 2))]
    data = b"".join(b"\0" * (1 + columns) for columns, height in rows for _ in range(height))
    header = struct.pack(">IIBBBBB", 5, 5, 8, 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    image = {"bytes": b"\x89PNG\r\n\x1a\n" + body, "path": None}
    assert resolve_image(image, tmp_path, "Row 0") == image


@pytest.mark.parametrize("part", ["prompt", "completion"])
def test_marks_of_a_turn_in_a_text_are_refused(processor, tmp_path, part):
    rows = [json.loads(json.dumps(GOOD)), json.loads(json.dumps(GOOD))]
    rows[1]["conversations"][part == "completion"]["value"] += " <|assistant|>no"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    dataset = load(path)
    with pytest.raises(ValueError, match=r"Row 1: a text holds `<\|assistant\|>`, which the tokenizer reads as a mark"):
        fit_rows(dataset, processor, max_length=None)
    fitted, report = fit_rows(dataset, processor, max_length=None, bad_rows="drop", dropped=DroppedRows(max_share=1))
    assert (len(fitted), report["bad"]) == (1, 1)


TRL = {
    "images": [],
    "prompt": [{"role": "user", "content": "what?"}],
    "completion": [{"role": "assistant", "content": "a dog"}],
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_a_row_of_null_in_trls_formats_is_refused(tmp_path, place, bad_rows):
    rows = [TRL, TRL]
    rows.insert(place, None)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"Row {place} of `.*rows\.json` is no `.key: value.`: take it out"):
        load(tmp_path / "rows.json", bad_rows=bad_rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "Row 1 has no `prompt`"),
        ({"prompt": []}, "Row 1 has no `prompt`"),
        ({"completion": [{"role": "assistant", "content": ["a", "b"]}]}, "Row 1: an answer is .*: give a text"),
    ],
)
def test_malformed_parts_of_trls_rows_are_named_or_counted(processor, change, message):
    def measure(bad_rows):
        batch = {name: [row[name] for row in (TRL, TRL | change)] for name in TRL}
        return _measure_batch(
            batch, [0, 1], processor=processor, image_tokens=None, max_length=None, bad_rows=bad_rows, seen={}
        )

    with pytest.raises(ValueError, match=message):
        measure("error")
    assert measure("drop")["reason"] == [None, "bad"]


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"Row 3: image `a\.png`"):
        resolve_image({"bytes": None, "path": "a.png"}, tmp_path, "Row 3")
