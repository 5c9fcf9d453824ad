"""The embedded data: what it says is true of the images, and nothing in it can be answered without looking."""

import functools
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from trl.chat_template_utils import is_chat_template_stop_token_trained

from llava_mod_hf import loading
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.easy_vqa import COLORS, SHAPES
from llava_mod_hf.evaluation.answers import evaluate_blind

CONFIGS = ("captions", "questions", "mixture", "preferences")


@pytest.fixture(scope="module", params=["train", "test"])
def split(request):
    return request.param


@functools.cache
def columns(config, split, seed=0):
    """`{column: values}`, images as `{"path": …}` instead of decoded."""
    return easy_vqa.load(config, split, seed).with_format("arrow")[:].to_pydict()


def content(messages_column):
    return [messages[0]["content"] for messages in messages_column]


def image_files(images_column):
    return [image["path"] for (image,) in images_column]


def kind_of_answer(answer):
    if answer in ("yes", "no"):
        return "yes/no"
    if answer in COLORS:
        return "color"
    if answer in SHAPES:
        return "shape"
    article, color, shape = answer.split()
    assert (article, color in COLORS, shape in SHAPES) == ("a", True, True)
    return "caption"


def test_published_splits(split):
    assert len(easy_vqa.questions(split)) == {"train": 38575, "test": 9673}[split]
    paths = easy_vqa.image_paths(split)
    assert len(paths) == {"train": 4000, "test": 1000}[split]
    assert {row["image_id"] for row in easy_vqa.questions(split)} <= paths.keys()
    assert all(row["kind"] == kind_of_answer(row["answer"]) for row in easy_vqa.questions(split))


@pytest.mark.parametrize("seed", [0, 1])
def test_every_answer_of_a_question_is_as_frequent(split, seed):
    counts = defaultdict(Counter)
    for row in easy_vqa.balanced(easy_vqa.questions(split), seed):
        counts[row["question"]][row["answer"]] += 1
    for question, answers in counts.items():
        assert len(set(answers.values())) == 1, question
        assert len(answers) == {"yes/no": 2, "color": 8, "shape": 3}[easy_vqa.question_kind(question)], question
    assert {easy_vqa.question_kind(question) for question in counts} == {"yes/no", "color", "shape"}


def test_balancing_takes_published_rows_once_and_as_many_as_it_can(split):
    published = [tuple(row.values()) for row in easy_vqa.questions(split)]
    kept = [tuple(row.values()) for row in easy_vqa.balanced(easy_vqa.questions(split), 0)]
    assert not Counter(kept) - Counter(published)
    rarest = defaultdict(Counter)
    for _, question, answer, _ in published:
        rarest[question][answer] += 1
    assert len(kept) == sum(len(answers) * min(answers.values()) for answers in rarest.values())


def test_without_looking_a_model_reaches_chance():
    scores = evaluate_blind(easy_vqa.balanced(easy_vqa.questions("train"), 0), easy_vqa.load("questions", "test"))
    expected = {"yes/no": 1 / 2, "color": 1 / 8, "shape": 1 / 3}
    assert scores["exact_match_by_kind"] == pytest.approx(expected, abs=1e-12)
    # the most frequent answer claims presence or absence by the question alone
    assert scores["balanced_accuracy"] == pytest.approx(1 / 2, abs=0.02)


def test_captions_agree_with_every_question_of_their_image(split):
    labels = easy_vqa.image_labels(split)
    checked = Counter()
    for row in easy_vqa.questions(split):
        if row["image_id"] not in labels:
            continue
        color, shape = labels[row["image_id"]]
        if row["kind"] == "color":
            assert row["answer"] == color
        elif row["kind"] == "shape":
            assert row["answer"] == shape
        else:
            asked = [word for word in row["question"].rstrip("?").split() if word in (*COLORS, *SHAPES)]
            assert asked
            there = all(word in (color, shape) for word in asked)
            assert easy_vqa.presence(row["question"], row["answer"]) == there, row
        checked[row["kind"]] += 1
    assert set(checked) == {"yes/no", "color", "shape"}
    assert len(labels) > 0.85 * len(easy_vqa.image_paths(split))
    assert {caption["answer"] for caption in easy_vqa.caption_rows(split)} == {
        easy_vqa.caption(color, shape) for color in COLORS for shape in SHAPES
    }


@pytest.mark.parametrize(
    ("question", "answer", "claimed"),
    [
        ("is there a circle?", "yes", True),
        ("is there a circle?", "no", False),
        ("is there not a circle?", "yes", False),
        ("is there not a circle?", "no", True),
        ("is there no red shape in the image?", "yes", False),
        ("is there no red shape in the image?", "no", True),
        ("does the image not contain a square?", "no", True),
        ("is a noble knot present?", "yes", True),  # "no" and "not" as words only
        ("is there a circle?", "red", None),
        ("is there a circle?", "", None),
    ],
)
def test_presence(question, answer, claimed):
    assert easy_vqa.presence(question, answer) is claimed


def test_rejected_answers_are_wrong_and_of_the_same_kind(split):
    rows = columns("preferences", split)
    chosen, rejected = content(rows["chosen"]), content(rows["rejected"])
    assert chosen == rows["answer"]
    for kind, right, wrong in zip(rows["kind"], chosen, rejected, strict=True):
        assert wrong != right
        assert kind_of_answer(wrong) == kind_of_answer(right) == kind
    # no kind of mistake is missing: colour, shape or both in a caption
    mistakes = Counter(
        tuple(a == b for a, b in zip(right.split(), wrong.split(), strict=True))
        for kind, right, wrong in zip(rows["kind"], chosen, rejected, strict=True)
        if kind == "caption"
    )
    assert set(mistakes) == {(True, False, True), (True, True, False), (True, False, False)}
    assert min(mistakes.values()) > 0.25 * mistakes.total()


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_are_trls_and_show_the_right_image(config):
    rows = columns(config, "test")
    answers = ("chosen", "rejected") if config == "preferences" else ("completion",)
    assert rows.keys() == {"images", "prompt", *answers, "question", "answer", "kind"}
    assert content(rows["prompt"]) == rows["question"]
    assert {messages[0]["role"] for messages in rows["prompt"]} == {"user"}
    assert {messages[0]["role"] for name in answers for messages in rows[name]} == {"assistant"}
    assert content(rows[answers[0]]) == rows["answer"]
    published = {(row["question"], row["answer"], row["image_id"]) for row in easy_vqa.questions("test")}
    published |= {(row["question"], row["answer"], row["image_id"]) for row in easy_vqa.caption_rows("test")}
    ids = {Path(path).resolve(): image_id for image_id, path in easy_vqa.image_paths("test").items()}
    shown = [ids[Path(path).resolve()] for path in image_files(rows["images"])]
    assert published.issuperset(zip(rows["question"], rows["answer"], shown, strict=True))
    (image,) = easy_vqa.load(config, "test")[0]["images"]
    assert image.size == (64, 64)


def test_a_fifth_of_the_mixture_are_captions(split):
    kinds = Counter(columns("mixture", split)["kind"])
    assert kinds["caption"] / kinds.total() == pytest.approx(0.2, abs=1e-3)
    assert set(columns("captions", split)["kind"]) == {"caption"}
    assert set(columns("questions", split)["kind"]) == {"yes/no", "color", "shape"}


@pytest.mark.parametrize("config", CONFIGS)
def test_no_training_row_shows_a_test_image(config):
    train, test = (set(image_files(columns(config, name)["images"])) for name in ("train", "test"))
    assert train
    assert test
    assert not train & test


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_follow_the_seed(config):
    first = columns(config, "test", 3)
    assert columns.__wrapped__(config, "test", 3) == first
    assert columns(config, "test", 4) != first


def test_text_rows_have_the_caption_in_place_of_the_image(split):
    rows = easy_vqa.load_text(split).with_format("arrow")[:].to_pydict()
    labels = easy_vqa.image_labels(split)
    expected = Counter(
        (easy_vqa.caption(*labels[row["image_id"]]), row["question"], row["answer"])
        for row in easy_vqa.questions(split) + easy_vqa.caption_rows(split)
        if row["image_id"] in labels
    )
    system, user = ([messages[turn]["content"] for messages in rows["prompt"]] for turn in (0, 1))
    assert Counter(zip(system, user, content(rows["completion"]), strict=True)) == expected
    assert {tuple(message["role"] for message in messages) for messages in rows["prompt"]} == {("system", "user")}


@pytest.mark.parametrize(("config", "split_name"), [("puzzles", "train"), (None, "train"), ("questions", "validation")])
def test_unknown_config_or_split_is_refused(config, split_name):
    with pytest.raises(ValueError, match=f"no `{config}` of split `{split_name}`.*captions, questions, mixture, pref"):
        easy_vqa.load(config, split_name)


def test_unknown_embedded_model_is_refused():
    assert loading.resolve("someone/model") == "someone/model"
    with pytest.raises(ValueError, match="There is no model `embedded:huge-teacher`: the embedded ones are"):
        loading.resolve("embedded:huge-teacher")


# The tokenizer and its chat template


def test_tokenizer_gives_every_text_back(tokenizer, split):
    texts = {row[part] for row in easy_vqa.questions(split) for part in ("question", "answer")}
    texts |= {row["answer"] for row in easy_vqa.caption_rows(split)}
    texts |= {"Ünïcode, 漢字, emoji 🦙, tabs\tand\n\nlines", " leading and trailing ", "don't ,  space", ""}
    for text in texts:
        token_ids = tokenizer(text).input_ids
        assert tokenizer.decode(token_ids) == text
        assert tokenizer.unk_token_id not in token_ids or tokenizer.unk_token_id is None


def test_special_tokens_are_single_and_apart(tokenizer):
    names = ["<|pad|>", "<|end|>", "<image>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert [tokenizer(name).input_ids for name in names] == [[index] for index in range(6)]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    assert tokenizer.decode(tokenizer("".join(names)).input_ids, skip_special_tokens=True) == ""
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_the_prompt_is_a_prefix_of_prompt_and_answer(tokenizer):
    for row in easy_vqa.load("mixture", "test").remove_columns("images").select(range(200)):
        image_content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        for prompt in (row["prompt"], [{"role": "user", "content": image_content}]):
            begin = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(prompt + row["completion"], tokenize=False)
            image = "" if isinstance(prompt[0]["content"], str) else "<image>"
            assert begin == f"<|user|>{image}{row['question']}<|assistant|>"
            assert whole == f"{begin}{row['answer']}<|end|>"
            begin_ids, whole_ids = tokenizer(begin).input_ids, tokenizer(whole).input_ids
            assert whole_ids[: len(begin_ids)] == begin_ids


def test_content_in_parts_renders_as_plain_content(tokenizer):
    plain = [{"role": role, "content": "one two"} for role in ("system", "user", "assistant")]
    parts = [
        {"role": message["role"], "content": [{"type": "text", "text": text} for text in ("one", " two")]}
        for message in plain
    ]
    rendered = tokenizer.apply_chat_template(plain, tokenize=False)
    assert rendered == "<|system|>one two<|user|>one two<|assistant|>one two<|end|>"
    assert tokenizer.apply_chat_template(parts, tokenize=False) == rendered


def test_the_end_token_is_trained(tokenizer):
    assert is_chat_template_stop_token_trained(tokenizer)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    supervised = [i for i, on in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(supervised) == "yes<|end|>"
