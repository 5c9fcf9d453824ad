"""CHAIR and Object HalBench's figures by a list of synonyms; the scenes' own are in test_scene_measures.py."""

import pytest

from llava_mod_hf.evaluation.metrics.chair import Chair, ObjectHalBench
from llava_mod_hf.evaluation.metrics.synonyms import Synonyms, plural

# in the form of CHAIR's list, a line a thing; written for this test
LIST = """person, man, child, people
dog, puppy
bus, minibus
bench, seat
toilet
tie
plate
train
wine glass
hot dog, sausage in a bun
bird
"""


@pytest.fixture
def synonyms(tmp_path):
    (tmp_path / "synonyms.txt").write_text(LIST)
    return Synonyms.read(tmp_path / "synonyms.txt")


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("Two men and a Puppy.", ["person", "dog"]),
        ("children, people, buses, benches", ["person", "person", "bus", "bench"]),
        ("wine glasses beside hot dogs and a dog", ["wine glass", "hot dog", "dog"]),
        ("a sausage in a bun", ["hot dog"]),
        ("a toilet seat; the seat of the toilet", ["toilet", "toilet"]),
        ("a seat", ["bench"]),
        ("a bow tie at the home plate by the train track", ["tie"]),
        ("a passenger train and a baby bird, not a child", ["train", "bird", "person"]),
        ("the man's dog-house, a dogma", ["person"]),
    ],
)
def test_things_that_a_text_names(synonyms, text, things):
    assert [thing for _, thing in synonyms.mentions(text)] == things


@pytest.mark.parametrize(
    ("word", "expected"),
    [("dog", "dogs"), ("bus", "buses"), ("pony", "ponies"), ("toy", "toys"), ("hot woman", "hot women")],
)
def test_plurals(word, expected):
    assert plural(word) == expected


PREDICTIONS = ["A man with a dog, a dog and a puppy.", "people and a bus", "something"]
REFERENCES = [["person", "bench"], ["person", "a man on a minibus"], ["dog"]]


def test_chair_counts_every_mention(synonyms):
    found = Chair(keep_in_memory=True).compute(predictions=PREDICTIONS, references=REFERENCES, synonyms=synonyms)
    # named: 4, 2, 0, of which absent: 3, 0, 0; present: 2, 2, 1, of which found: 1, 2, 0
    assert found == {"chair_s": 1 / 3, "chair_i": 3 / 6, "object_recall": 3 / 5}


def test_object_halbench_counts_each_word_once_and_only_responses_that_name_a_thing(synonyms):
    found = ObjectHalBench(keep_in_memory=True).compute(
        predictions=PREDICTIONS, references=REFERENCES, synonyms=synonyms
    )
    # words: man, dog, puppy; people, bus
    assert found == {"response_hallucination": 1 / 2, "mention_hallucination": 2 / 5, "object_recall": 3 / 5}


def test_without_a_list_the_things_are_the_scenes():
    found = Chair(keep_in_memory=True).compute(
        predictions=["a red circle and red circles", "yes"], references=[["a red circle and a blue square"], ["no"]]
    )
    assert found == {"chair_s": 0.0, "chair_i": 0.0, "object_recall": 1 / 2}


def test_no_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file is there"):
        Synonyms.read(tmp_path / "none.txt")
    (tmp_path / "words.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match="has no line `thing, synonym, synonym`"):
        Synonyms.read(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        Synonyms.read(tmp_path / "words.txt")
