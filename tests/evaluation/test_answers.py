import math
import re
from collections import Counter

import pytest
import torch
from datasets import Dataset, Features, Image, List
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from helpers.models import extend, prompt_inputs, sharpen
from helpers.published_models import ONEVISION, QWEN3_VL, published_config
from helpers.real_shapes import shallow
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.evaluation import answers as answers_module
from llava_mod_hf.evaluation.answers import (
    evaluate_blind,
    evaluate_model,
    generate_answers,
    kl_to_teacher,
)
from llava_mod_hf.evaluation.measures import (
    MEASURES,
    Measure,
    ObjectHallucination,
    VqaExactMatch,
    register_measure,
)
from llava_mod_hf.students.parameter_counts import count_parameters, student_parameters

ROWS = 24


@pytest.fixture(scope="module")
def dataset():
    """Rows of all lengths; every fifth is text only."""
    rows = easy_vqa.load("mixture", "test").select(range(ROWS))
    images = [[] if index % 5 == 0 else row["images"] for index, row in enumerate(rows)]
    columns = {name: list(rows[name]) for name in rows.column_names} | {"images": images}
    return Dataset.from_dict(columns, features=Features({**rows.features, "images": List(Image())}))


@pytest.fixture(scope="module")
def student(make_student):
    return sharpen(make_student(moe_layers=[0, 2]))


@pytest.fixture(scope="module")
def teacher(make_student):
    """A dense LLaVA of the stock class."""
    dense = make_student(moe_layers=[], seed=1)
    values = {name: value for name, value in dense.config.to_dict().items() if name not in ("model_type", "auto_map")}
    model = LlavaForConditionalGeneration(LlavaConfig(**values)).eval()
    model.load_state_dict(dense.state_dict())
    return sharpen(model)


def test_exact_match_normalises_both_sides_and_sorts_kinds():
    scores = VqaExactMatch(keep_in_memory=True).compute(
        predictions=["Yes.", " red", "blue", "a red circle", "circle"],
        references=["yes", "Red.", "red", "a red circle.", "square"],
        kinds=["yes/no", "color", "color", "caption", "shape"],
    )
    assert scores["exact_match"] == 3 / 5
    assert list(scores["exact_match_by_kind"].items()) == [
        ("caption", 1.0),
        ("color", 0.5),
        ("shape", 0.0),
        ("yes/no", 1.0),
    ]


def test_exact_match_keeps_words_and_inner_periods():
    scores = VqaExactMatch(keep_in_memory=True).compute(
        predictions=["yes it is", "3.5", "", "red.."], references=["yes", "35", "yes", "red"], kinds=["a"] * 4
    )
    assert scores["exact_match"] == 0.0


def test_hallucination_follows_the_polarity_of_the_question():
    rows = [  # question, reference, prediction
        ("is there a circle?", "no", "yes"),  # absent, claimed
        ("is there not a circle?", "yes", "No."),  # absent, claimed
        ("Is there no circle?", "yes", "yes"),  # absent, denied
        ("is a circle present?", "no", "no"),  # absent, denied
        ("is there a circle?", "no", "maybe"),  # absent, invalid: no claim, no denial
        ("is there a circle?", "yes", "yes"),  # present, claimed
        ("is there not a circle?", "no", "yes"),  # present, denied
        ("is a circle present?", "yes", "circle"),  # present, invalid
        ("what color is shown?", "red", "yes"),  # no question of presence
        ("describe the image.", "a red circle", "no"),
    ]
    questions, references, predictions = zip(*rows, strict=True)
    scores = ObjectHallucination(keep_in_memory=True).compute(
        predictions=predictions, questions=questions, references=references
    )
    assert scores == {
        "hallucination_rate": pytest.approx(2 / 5),
        "miss_rate": pytest.approx(2 / 3),
        "balanced_accuracy": pytest.approx((1 / 3 + 2 / 5) / 2),
    }


@pytest.mark.parametrize("references", [["red", "blue"], ["yes", "yes"], ["no", "no"]])
def test_hallucination_needs_present_and_absent_things(references):
    with pytest.raises(ValueError, match="Of 2 rows . ask .* present thing and . for an absent one"):
        ObjectHallucination(keep_in_memory=True).compute(
            predictions=["yes", "no"], questions=["is there a circle?"] * 2, references=references
        )


@pytest.mark.parametrize("metric", [VqaExactMatch, ObjectHallucination])
def test_metrics_in_memory_leave_no_file(metric, tmp_path):
    inputs = {name: ["yes", "no"] * 1500 for name in ("predictions", "references")}  # more than one Arrow batch
    extra = {"questions": "is there a circle?"} if metric is ObjectHallucination else {"kinds": "yes/no"}
    inputs |= {name: [text] * 3000 for name, text in extra.items()}
    scores = metric(keep_in_memory=True, cache_dir=tmp_path).compute(**inputs)
    assert 1.0 in (scores.get("exact_match"), scores.get("balanced_accuracy"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_answers_equal_a_greedy_loop_over_single_rows(student, processor, dataset, monkeypatch):
    tokenizer, max_new_tokens = processor.tokenizer, 6
    endless = []  # per row, what comes without an end
    for row in dataset:
        inputs, new = prompt_inputs(processor, row), []
        for _ in range(max_new_tokens):
            with torch.no_grad():
                new.append(student(**extend(inputs, new)).logits[0, -1].argmax().item())
        endless.append(new)
    # the commonest of these tokens as a second end, so that rows of one batch end at different lengths
    [(stop, _)] = Counter(token for new in endless for token in new[1:-1]).most_common(1)
    stops = [tokenizer.eos_token_id, stop]
    ended = [new[: min([i + 1 for i, token in enumerate(new) if token in stops], default=None)] for new in endless]
    expected = [tokenizer.decode([i for i in new if i not in tokenizer.all_special_ids]) for new in ended]
    assert len(set(expected)) > ROWS // 2 and len({len(new) for new in ended}) > 2  # else the comparison says little

    monkeypatch.setattr(student.generation_config, "eos_token_id", stops)
    for batch_size in (1, 7, ROWS):
        answers = generate_answers(student, processor, dataset, batch_size=batch_size, max_new_tokens=max_new_tokens)
        assert answers == expected


def test_answers_are_greedy_whatever_the_checkpoint_asks_for(student, processor, dataset, monkeypatch):
    rows = dataset.select(range(8))
    expected = generate_answers(student, processor, rows)
    for name, value in {"do_sample": True, "repetition_penalty": 3.0, "temperature": 2.0}.items():
        monkeypatch.setattr(student.generation_config, name, value)
    assert generate_answers(student, processor, rows) == expected


def test_evaluation_leaves_modes_and_random_state_alone(make_student, processor, dataset):
    model, rows = make_student(), dataset.select(range(4))
    model.train()
    model.model.vision_tower.eval()
    before, state = [module.training for module in model.modules()], torch.get_rng_state()
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    generate_answers(model, processor, rows)
    kl_to_teacher(model, model, processor, rows)
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def with_text(dataset, column, place, text):
    """The first rows, one of them with a text added to its first message."""
    rows = [dict(row) for row in dataset.select(range(3))]
    rows[place][column] = [rows[place][column][0] | {"content": text}]
    return Dataset.from_list(rows, features=dataset.features)


@pytest.mark.parametrize("mark", ["<image>", "<|assistant|>"])
def test_rows_that_spell_out_a_mark_are_refused_before_any_answer(student, processor, dataset, monkeypatch, mark):
    monkeypatch.setattr(student, "forward", lambda *args, **kwargs: pytest.fail("read first"))
    for column in ("prompt", "completion"):
        rows = with_text(dataset, column, 2, f"a {mark} b")
        with pytest.raises(ValueError, match=f"Row 2: a text holds `{re.escape(mark)}`"):
            if column == "prompt":
                generate_answers(student, processor, rows)
            else:
                kl_to_teacher(student, student, processor, rows)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_equals_a_float64_loop_over_single_rows(student, teacher, processor, dataset, temperature):
    total, count = 0.0, 0
    for row in dataset:
        prompt = prompt_inputs(processor, row)
        answer = processor.tokenizer(row["answer"] + "<|end|>")["input_ids"]
        inputs, start = extend(prompt, answer), prompt["input_ids"].shape[1]
        with torch.no_grad():
            p, q = (
                (each(**inputs).logits[0, start - 1 : -1].double() / temperature).softmax(-1)
                for each in (teacher, student)
            )
        assert len(p) == len(answer)
        total += (p * (p / q).log()).sum().item()
        count += len(answer)
    for batch_size in (5, ROWS):
        value = kl_to_teacher(student, teacher, processor, dataset, batch_size=batch_size, temperature=temperature)
        assert value == pytest.approx(total / count, rel=1e-4)


def test_kl_of_a_model_to_itself_is_zero(student, processor, dataset):
    assert kl_to_teacher(student, student, processor, dataset) == 0.0


def test_kl_refuses_another_vocabulary(student, make_student, processor, dataset):
    larger = make_student(moe_layers=[])
    size = larger.config.text_config.vocab_size
    larger.resize_token_embeddings(size + 8, mean_resizing=False)
    with pytest.raises(ValueError, match=f"has {size} tokens and the teacher's {size + 8}"):
        kl_to_teacher(student, larger, processor, dataset.select(range(2)))


def test_parameter_counts_by_hand(student, teacher, tokenizer):
    hidden, ffn = 32, 64
    linear = hidden * hidden + hidden
    vision_layer = 4 * linear + 2 * 2 * hidden + (hidden * ffn + ffn) + (ffn * hidden + hidden)
    # patch and position embeddings, layers, final norm
    vision = (3 * 16 * 16 * hidden + hidden) + 16 * hidden + 2 * vision_layer + 2 * hidden
    attention_and_norms, expert, router = 4 * hidden * hidden + 2 * hidden, 3 * hidden * ffn, 4 * hidden
    dense = len(tokenizer) * hidden + 3 * (attention_and_norms + expert) + hidden + 2 * linear  # tied head; adaptor
    # in two of the layers there are 4 experts instead of 1, and a token passes 2
    total, active = dense + 2 * (router + 3 * expert), dense + 2 * (router + expert)
    assert student_parameters(student) == (total, active)
    assert count_parameters(student) == (total + vision, active + vision)
    assert student_parameters(teacher) == (dense, dense)
    assert count_parameters(teacher) == (dense + vision, dense + vision)


def test_evaluate_model_puts_the_measures_together(student, teacher, processor, dataset, monkeypatch):
    rows = easy_vqa.load("questions", "test").select(range(40))
    # answers right but for the first question about an absent thing
    answers = list(rows["answer"])
    absent = [easy_vqa.presence(q, a) is False for q, a in zip(rows["question"], answers, strict=True)]
    wrong = absent.index(True)
    answers[wrong] = {"yes": "no", "no": "yes"}[answers[wrong]]
    monkeypatch.setattr(answers_module, "generate_answers", lambda *args, **kwargs: answers)
    scores = evaluate_model(student, processor, rows, teacher=teacher)
    assert scores["exact_match"] == 39 / 40
    assert scores["exact_match_by_kind"]["yes/no"] < 1.0 == scores["exact_match_by_kind"]["color"]
    assert scores["hallucination_rate"] == 1 / sum(absent)
    assert scores["miss_rate"] == 0.0
    assert scores["balanced_accuracy"] == pytest.approx(1 - 0.5 / sum(absent))
    assert scores["kl_to_teacher"] == kl_to_teacher(student, teacher, processor, rows) > 0.01
    assert (scores["params_total"], scores["params_active"]) == count_parameters(student)


def test_evaluate_model_without_teacher_and_yes_no_questions(student, processor):
    scores = evaluate_model(student, processor, easy_vqa.load("captions", "test").select(range(4)))
    assert 0.0 <= scores["exact_match"] <= 1.0 and list(scores["exact_match_by_kind"]) == ["caption"]
    absent = ["hallucination_rate", "miss_rate", "balanced_accuracy", "kl_to_teacher"]
    assert [scores[name] for name in absent] == [None] * 4


def test_blind_answers_fall_back_to_the_kind():
    train = [
        {"question": "what color?", "answer": "red", "kind": "color"},
        {"question": "what color?", "answer": "red", "kind": "color"},
        {"question": "which color?", "answer": "blue", "kind": "color"},
        {"question": "is there a circle?", "answer": "yes", "kind": "yes/no"},
    ]
    test = Dataset.from_dict(
        {
            "question": ["what color?", "which color?", "color?", "is there a circle?", "is there a circle?", "shape?"],
            "kind": ["color", "color", "color", "yes/no", "yes/no", "shape"],
            "answer": ["red", "blue", "red", "yes", "no", "circle"],
        }
    )
    scores = evaluate_blind(train, test)
    assert scores["exact_match"] == pytest.approx(4 / 6)
    assert scores["exact_match_by_kind"] == {"color": 1.0, "shape": 0.0, "yes/no": 0.5}
    assert scores["hallucination_rate"] == 1.0 and scores["miss_rate"] == 0.0


def test_no_question_text_gives_the_answer_away():
    """On the balanced test rows the blind baseline gains nothing on yes/no questions: the image decides."""
    scores = evaluate_blind(easy_vqa.questions("train"), easy_vqa.load("questions", "test"))
    assert math.isclose(scores["balanced_accuracy"], 0.5)


@pytest.mark.parametrize("name", ["question", "answer", "kind"])
def test_a_missing_text_is_named_before_any_answer(student, processor, dataset, monkeypatch, name):
    monkeypatch.setattr(answers_module, "generate_answers", lambda *args, **kwargs: pytest.fail("answered first"))
    texts = list(dataset[name])
    texts[3] = None
    rows = dataset.remove_columns(name).add_column(name, texts)
    with pytest.raises(ValueError, match=f"Row 3 has the `{name}` None: give a text"):
        evaluate_model(student, processor, rows)
    with pytest.raises(ValueError, match=f"Row 3 has the `{name}` None"):
        evaluate_blind(dataset, rows)


class Brevity(VqaExactMatch):
    """Share of answers of one word."""

    def _compute(self, predictions, references, kinds):
        return {"brevity": sum(" " not in answer for answer in predictions) / len(predictions)}


def test_a_measure_of_somebody_else(monkeypatch):
    monkeypatch.setattr("llava_mod_hf.evaluation.measures.MEASURES", dict(MEASURES))
    register_measure("brevity", Measure(Brevity, ("predictions", "references", "kinds"), ("brevity",)))
    rows = [{"question": f"q{i}", "answer": answer, "kind": "any"} for i, answer in enumerate(("red", "a dog"))]
    scores = evaluate_blind(rows, Dataset.from_list(rows))
    assert (scores["brevity"], scores["exact_match"], scores["hallucination_rate"]) == (0.5, 1.0, None)
    with pytest.raises(ValueError, match="There is a measure `other`, or one of brevity, already"):
        register_measure("other", Measure(Brevity, ("predictions",), ("brevity",)))


@pytest.mark.parametrize("name", [ONEVISION, QWEN3_VL])
def test_the_parameters_of_a_published_teacher_are_counted(name):
    with torch.device("meta"):
        teacher = AutoModelForImageTextToText.from_config(shallow(published_config(name), 1))
    total = sum(parameter.numel() for parameter in teacher.parameters())
    assert count_parameters(teacher) == (total, total)
    vision = teacher.base_model.visual if name == QWEN3_VL else teacher.base_model.vision_tower
    assert student_parameters(teacher).total == total - sum(parameter.numel() for parameter in vision.parameters())
