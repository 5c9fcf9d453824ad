"""Judges, local and behind an address, and their verdicts on disk: asked once for each answer, whoever gave it."""

import json

import pytest
import torch
from huggingface_hub import constants
from transformers import Qwen2ForCausalLM

from helpers.judges import TEMPLATE, JudgeServer, save_judge
from llava_mod_hf.evaluation.judges import LocalJudge, ServerJudge
from llava_mod_hf.evaluation.verdict_file import Verdicts, read_prompt

PROMPTS = ["is there a red circle?", "what color is the shape in the image?", "yes"]


@pytest.fixture
def online(monkeypatch):
    """The client asks nobody with `HF_HUB_OFFLINE`, not even this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return save_judge(tokenizer, tmp_path_factory.mktemp("judge"))


def local(folder, batch_size=2, max_new_tokens=6, **options):
    return LocalJudge(str(folder), batch_size=batch_size, max_new_tokens=max_new_tokens, **options)


class Scripted:
    """A judge whose verdict is its prompt, and who breaks off after some."""

    def __init__(self, identity="one", after=None):
        self.identity, self.after, self.asked = identity, after, []

    def verdicts(self, prompts):
        for number, prompt in enumerate(prompts):
            if number == self.after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            yield f"so {prompt}"


def test_a_local_judge_answers_greedily_whatever_the_batch(folder, tokenizer):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(f"<|user|>{prompt}<|assistant|>", return_tensors="pt").input_ids
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        start = len(tokenizer(f"<|user|>{prompt}<|assistant|>").input_ids)
        expected.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    for batch_size in (1, 2, 3):
        assert list(local(folder, batch_size).verdicts(PROMPTS)) == expected
    assert len(set(expected)) > 1


def test_a_judge_is_known_by_weights_template_and_length(folder, tokenizer, tmp_path):
    known = local(folder).identity
    assert local(folder, batch_size=1).identity == known
    assert local(folder, max_new_tokens=7).identity != known
    other = local(save_judge(tokenizer, tmp_path, "Hello. " + TEMPLATE)).identity
    assert other["judge"] == known["judge"] and other["tokenizer"] != known["tokenizer"]
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path)
    assert local(tmp_path).identity["judge"] != known["judge"]


def test_what_cannot_judge_is_refused(folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no folder here, and on the Hub a name alone is whatever it is today"):
        local("someone/judge")
    with pytest.raises(ValueError, match="`judge_revision` is `main`, and .* is a folder"):
        local(folder, revision="main")
    save_judge(tokenizer, tmp_path, None)
    with pytest.raises(ValueError, match="which has no chat template: give a model that was trained to chat"):
        local(tmp_path)


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_server_is_asked_for_the_likeliest_answer_and_sees_no_token_of_the_hub(online, monkeypatch, key):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("JUDGE_API_KEY", key)
    with JudgeServer(lambda prompt: f"Rating: {len(prompt)}") as server:
        judge = ServerJudge("qwen", url=server.url, revision="r1", max_new_tokens=9)
        assert list(judge.verdicts(["a", "bb"])) == ["Rating: 1", "Rating: 2"]
    assert [(body["model"], body["max_tokens"], body["temperature"]) for body in server.asked] == [("qwen", 9, 0.0)] * 2
    assert server.asked[1]["messages"] == [{"role": "user", "content": "bb"}]
    assert server.keys == [f"Bearer {key or 'none'}"] * 2
    assert judge.identity == {"judge": "qwen", "revision": "r1", "max_new_tokens": 9}


def test_a_server_that_fails_is_one_sentence(online):
    with JudgeServer(lambda prompt: 1 / 0) as server:
        judge = ServerJudge("qwen", url=server.url, max_new_tokens=9)
        said = r"The judge at `http.*` gave no verdict \(.*500.*\): the verdicts so far are kept"
        with pytest.raises(ConnectionError, match=said):
            list(judge.verdicts(["a"]))
    with pytest.raises(ConnectionError, match="gave no verdict"):  # nobody is there
        list(judge.verdicts(["a"]))


def test_no_answer_is_judged_twice(tmp_path):
    path, judge = tmp_path / "v.jsonl", Scripted()
    fields = [("cat", "what?", "a cat", said) for said in ("a cat", "a dog", "a cat")]
    first = Verdicts(judge, path)("{} {} {} {}", fields)
    assert first == ["so cat what? a cat a cat", "so cat what? a cat a dog", "so cat what? a cat a cat"]
    assert len(judge.asked) == 2
    assert Verdicts(judge, path)("{} {} {} {}", fields[::-1]) == first[::-1] and len(judge.asked) == 2
    for other, prompt in ((Scripted("two"), None), (judge, "other: {} {} {} {}")):
        before = len(other.asked)
        Verdicts(other, path, prompt)("{} {} {} {}", fields)
        assert len(other.asked) == before + 2
    assert len(path.read_text().splitlines()) == 6


@pytest.mark.parametrize("torn", ["", '{"key": "ab' + "x" * 9000, '{"key": "k"}\n', "null\n"], ids=len)
def test_a_killed_run_asks_only_what_is_missing(tmp_path, torn):
    path, fields = tmp_path / "v.jsonl", [("", "", "", str(number)) for number in range(5)]
    with pytest.raises(KeyboardInterrupt):
        Verdicts(Scripted(after=3), path)("{}{}{}{}", fields)
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write(torn)
    judge = Scripted()
    assert Verdicts(judge, path)("{}{}{}{}", fields) == [f"so {number}" for number in range(5)]
    assert judge.asked == ["3", "4"]
    assert [json.loads(line)["verdict"] for line in path.read_text().splitlines()] == [f"so {n}" for n in range(5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{} {} {}", "with 3 places to fill in: give four"),
        ("{} {} {} {name}", "with 4 places to fill in: give four"),
        ("{} {} {} {} }", "whose braces do not match"),
    ],
)
def test_a_prompt_has_four_places(tmp_path, text, message):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompt(tmp_path / "prompt.txt")
    with pytest.raises(ValueError, match="and no such file is there"):
        read_prompt(tmp_path / "gone.txt")
    (tmp_path / "prompt.txt").write_text("{} {} {} {}")
    assert read_prompt(str(tmp_path / "prompt.txt")) == "{} {} {} {}"
