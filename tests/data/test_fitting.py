"""Rows that fit the context: lengths as TRL's collators make them, and what is left out and why."""

import logging

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.templates import LATER, PARTS, as_row
from helpers.templates import rows_of as templated_rows
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.dropped_rows import DroppedRows
from llava_mod_hf.data.fitting import check_images_fit, fit_rows, image_token_counter
from llava_mod_hf.data.mixture import mix_rows

MESSAGES = [{"role": Value("string"), "content": Value("string")}]
IMAGE = Image.new("RGB", (20, 10), "red")


def rows_of(*rows):
    features = {name: MESSAGES for name in rows[0] if name != "images"}
    return Dataset.from_list(list(rows), features=Features({"images": List(ImageFeature()), **features}))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def completion(text, images=1, question="what is it?"):
    return {"images": [IMAGE] * images, "prompt": [user(question)], "completion": [assistant(text)]}


def pair(chosen, rejected, images=1):
    row = completion(chosen, images)
    return {
        "images": row["images"],
        "prompt": row["prompt"],
        "chosen": row["completion"],
        "rejected": [assistant(rejected)],
    }


COMPLETIONS = [completion("red"), completion("a green circle", images=0), completion("a red circle " * 9, images=2)]
CONVERSATIONS = [
    {"images": [IMAGE], "messages": [user("what?"), assistant("red"), user("and the shape?"), assistant("a circle")]},
    {"images": [], "messages": [user("hello?"), assistant("hi " * 20)]},
]
PAIRS = [pair("red", "a green circle"), pair("a red circle " * 9, "no", images=2), pair("yes", "no", images=0)]


def collated_lengths(rows, collate):
    """Tokens that each row has by itself in a batch of TRL's."""
    return [int(collate([dict(row)])["attention_mask"].sum(1).max()) for row in rows]


@pytest.mark.parametrize("kind", ["completion", "messages", "pair"])
@pytest.mark.parametrize("streaming", [False, True])
def test_lengths_are_those_of_trls_collators_and_nothing_is_cut(processor, kind, streaming, caplog):
    rows = rows_of(*{"completion": COMPLETIONS, "messages": CONVERSATIONS, "pair": PAIRS}[kind])
    if kind == "pair":
        collate = DataCollatorForVisionPreference(processor)
    else:
        collate = DataCollatorForVisionLanguageModeling(
            processor, completion_only_loss=kind == "completion", assistant_only_loss=kind == "messages"
        )
    lengths = collated_lengths(rows, collate)
    assert len(set(lengths)) == len(lengths)
    options = {"assistant_only_loss": kind == "messages"}
    for max_length in (None, max(lengths), max(lengths) - 1, min(lengths)):
        source = rows.to_iterable_dataset() if streaming else rows
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            fitted, report = fit_rows(source, processor, max_length=max_length, **options)
            kept = list(fitted)
        expected = [length for length in lengths if max_length is None or length <= max_length]
        assert [row["length"] for row in kept] == expected
        assert [row["num_images"] for row in kept] == [len(row["images"]) for row in kept]
        assert report["rows"] == len(rows) and report["longest"] == max(lengths)
        assert report["too_long"] == len(rows) - len(expected)
        assert ("longer than `max_length`" in caplog.text or "is longer than" in caplog.text) == bool(
            report["too_long"]
        )
        if max_length is not None:  # image tokens and answers are whole
            collate.max_length = max_length
            batch = collate([dict(row) for row in kept])
            images = sum(len(row["images"]) for row in kept) * (2 if kind == "pair" else 1)
            assert (batch["input_ids"] == processor.image_token_id).sum() == images * 16
            mask = batch["completion_mask"] if kind == "pair" else batch["labels"] != -100
            assert (mask.sum(1) > 0).all()


def test_rows_without_anything_to_learn_and_equal_pairs_are_counted_and_dropped(processor, monkeypatch):
    # a template that writes answers without an end, and drops what is in brackets
    template = processor.chat_template.replace("{{ '<|end|>' }}", "")
    template = template.replace("{{ part['text'] }}", "{{ '' if part['text'][0] == '(' else part['text'] }}")
    monkeypatch.setattr(processor, "chat_template", template)
    rows = rows_of(completion("red"), completion("(nothing)"))
    fitted, report = fit_rows(rows, processor, max_length=None)
    assert [row["completion"][0]["content"] for row in fitted] == ["red"]
    assert report["unsupervised"] == 1

    fitted, report = fit_rows(
        rows_of(pair("red", "red"), pair("red", "blue"), pair("red", "(x)")), processor, max_length=99
    )
    assert [row["rejected"][0]["content"] for row in fitted] == ["blue"]
    assert (report["ties"], report["unsupervised"]) == (1, 1)

    talk = [
        {"images": [], "messages": [user("what?"), assistant("(nothing)")]},
        {"images": [], "messages": [user("what?"), assistant("red")]},
    ]
    fitted, report = fit_rows(rows_of(*talk), processor, max_length=None, assistant_only_loss=True)
    assert len(fitted) == 1 and report["unsupervised"] == 1


def test_no_row_left_is_an_error_with_the_reasons(processor):
    with pytest.raises(ValueError, match=r"None of the 3 rows .* 3 longer than `max_length` \(9; the longest has"):
        fit_rows(rows_of(*COMPLETIONS), processor, max_length=9)


BAD = {
    "an answer is empty": completion(" "),
    "a text holds `<image>`, which the tokenizer reads": completion("red", images=0, question="<image> what?"),
    "a text holds `<image>`": completion("an <image>"),
    "has no answer": completion("red") | {"completion": []},
    "does not fit the chat template": completion("red") | {"prompt": [{"role": "human", "content": "?"}]},
}


@pytest.mark.parametrize("message", BAD)
def test_malformed_rows_are_named_or_counted(processor, message):
    rows = rows_of(COMPLETIONS[0], BAD[message])
    with pytest.raises(ValueError, match=f"Row 1.*{message}"):
        fit_rows(rows, processor, max_length=None)
    numbered = rows.add_column("source_row", [4, 17])
    with pytest.raises(ValueError, match=f"Row 17.*{message}"):
        fit_rows(numbered, processor, max_length=None)
    fitted, report = fit_rows(rows, processor, max_length=None, bad_rows="drop", dropped=DroppedRows(max_share=1))
    assert len(fitted) == 1 and report["bad"] == 1


def test_a_malformed_row_of_a_mixture_is_named_with_its_data_set(processor):
    rows = rows_of(COMPLETIONS[0], completion(" ")).add_column("source_row", [4, 17])
    mixed = mix_rows([rows.select([0]), rows], ["first", "second"])
    for each in (mixed, mixed.to_iterable_dataset()):
        with pytest.raises(ValueError, match="Row 17 of `second`: an answer is empty"):
            list(fit_rows(each, processor, max_length=None)[0])


def test_malformed_pairs_are_named(processor):
    for row, message in (
        (pair("red", ""), "Row 1, `rejected`: an answer is empty"),
        (pair("red", "blue") | {"chosen": None}, "Row 1 has no `chosen`"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_rows(rows_of(PAIRS[0], row), processor, max_length=None)


def test_equal_words_with_other_images_are_measured_anew(processor):
    rows = rows_of(*(completion("red", images=count) for count in (1, 2, 0)))
    fitted, _ = fit_rows(rows, processor, max_length=None)
    one, two, none = fitted["length"][:]
    assert (two - one, one - none) == (16, 16)


def test_several_processes_and_a_second_pass_give_the_same(processor):
    rows = rows_of(*COMPLETIONS)
    once, _ = fit_rows(rows, processor, max_length=None)
    again, _ = fit_rows(once, processor, max_length=None, num_proc=2)
    assert once["length"][:] == again["length"][:]


def test_images_whose_tokens_depend_on_their_size_are_counted_by_their_headers(processor, tmp_path):
    class BySize:
        """Writes a placeholder for every ten pixels of width."""

        image_token = "<image>"

        def __call__(self, images, text, **kwargs):
            return {"input_ids": [[0] * (images[0].width // 10 + images[0].height // 10)]}

    class ByWidth(BySize):
        def __call__(self, images, text, **kwargs):
            width, height = images[0].size
            return {"input_ids": [[0] * (width // 10 if (width, height) != (64, 192) else 99)]}

    count = image_token_counter(BySize())
    for size, expected in (((50, 20), 7), ((30, 90), 12)):
        path = tmp_path / f"{expected}.png"
        Image.new("RGB", size).save(path)
        assert count({"bytes": None, "path": str(path)}) == expected
        assert count({"bytes": path.read_bytes(), "path": None}) == expected
    assert image_token_counter(processor)({"bytes": None, "path": "nowhere.png"}) == 16


def test_a_picture_that_exif_turns_has_the_tokens_of_the_one_that_is_shown(tmp_path):
    class ByWidth:
        image_token = "<image>"

        def __call__(self, images, text, **kwargs):
            return {"input_ids": [[0] * (images[0].width + 2 * images[0].height)]}

    count, exif = image_token_counter(ByWidth()), Image.Exif()
    for orientation in range(1, 9):
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (50, 20)).save(tmp_path / "turned.jpg", exif=exif)
        shown = ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg"))
        assert count({"bytes": None, "path": str(tmp_path / "turned.jpg")}) == shown.width + 2 * shown.height


def test_a_picture_of_a_later_question_may_not_be_cut_either(processor):
    rows = [as_row(row) for row in LATER]
    batch = AnswersCollator(processor, completion_only_loss=True)([dict(row) for row in rows])
    end = int((batch["input_ids"] == processor.image_token_id).nonzero()[:, 1].max()) + 1
    rows = templated_rows(rows, PARTS)
    check_images_fit(rows, processor, max_length=end)
    with pytest.raises(ValueError, match=f"`max_length` is {end - 1}, which cuts .* end at token {end}: give at least"):
        check_images_fit(rows, processor, max_length=end - 1)


@pytest.mark.parametrize("kind", ["completion", "messages", "pair"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_max_length_that_cuts_through_an_image_is_refused(processor, kind, streaming):
    rows = rows_of(*{"completion": COMPLETIONS, "messages": CONVERSATIONS, "pair": PAIRS}[kind])
    text = "<|user|>" + "<image>" * max(len(images) for images in rows["images"])
    end = 1 + 16 * text.count("<image>")  # tokens up to the last image's last
    assert len(processor(text=text, images=[IMAGE] * text.count("<image>"))["input_ids"][0]) == end
    source = rows.to_iterable_dataset() if streaming else rows
    for max_length in (None, end, 1000):
        check_images_fit(source, processor, max_length=max_length)
    for max_length in (end - 1, 6):
        told = rf"`max_length` is {max_length}, which cuts through .* of row . end at token {end}: give at least that"
        with pytest.raises(ValueError, match=told):
            check_images_fit(source, processor, max_length=max_length)


def test_rows_that_went_through_fit_rows_are_not_measured_again(processor, monkeypatch):
    fitted, _ = fit_rows(rows_of(*COMPLETIONS), processor, max_length=None)
    monkeypatch.setattr("llava_mod_hf.data.fitting.map_undecoded", lambda *a, **k: pytest.fail("measured again"))
    check_images_fit(fitted, processor, max_length=max(fitted["length"]))
    check_images_fit(fitted.remove_columns("images"), processor, max_length=6)
