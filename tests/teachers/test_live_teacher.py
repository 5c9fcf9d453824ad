"""The teacher: which tokens it is compared on, its head, its own processor and images, and what is refused."""

import copy
import dataclasses
import inspect
import math

import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.ddp_gradients import sharpened
from helpers.live_teacher_cases import examples, logits_of
from llava_mod_hf.loading import load_model_and_processor, quantization_config
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.teachers.cached_teacher import CachedTeacher
from llava_mod_hf.teachers.live_teacher import LiveTeacher
from llava_mod_hf.teachers.response_alignment import align_labels, align_response
from llava_mod_hf.teachers.vocabulary import check_teacher, shared_vocab_size


@pytest.fixture(scope="module")
def live(student, processor, collator):
    """`live(model, teacher_processor, collator=…)`: a [`LiveTeacher`] of the student."""

    def make(model, teacher_processor=None, collator=collator):
        return LiveTeacher(
            model, student=student, processor=processor, teacher_processor=teacher_processor, collator=collator
        )

    return make


def conversation(processor):
    """Rows of two turns, and a collator that supervises both answers."""
    image = Image.new("RGB", (64, 64), "red")
    turns = [("what is it?", "a red circle"), ("is it red?", "yes")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    return [{"images": [image], "messages": messages}, {"images": [image], "messages": messages[:2]}], collator


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        (["yes", "<e>"], ["yes", "<e>"], [(0, 0), (1, 1)]),
        (["yes", "<e>"], ["yes", "</s>", "\n"], [(0, 0)]),  # another end of the turn
        (["a", "Ġred", "<e>"], ["Ġa", "Ġred", "<e>"], [(1, 1), (2, 2)]),  # a space before the answer
        (["no", "Ġno", "Ġno", "<e>"], ["Ġno", "Ġno", "Ġno", "</s>"], [(1, 1), (2, 2)]),
        (["Ġno", "Ġno", "Ġno", "</s>"], ["no", "Ġno", "Ġno", "<e>"], [(1, 1), (2, 2)]),
        (["a", "Ġtri", "angle"], ["a", "Ġtriangle"], [(0, 0)]),  # cut otherwise
        (["yes"], ["Ġno"], []),
        ([], ["yes"], []),
    ],
)
def test_tokens_are_aligned_at_the_same_place_of_the_text(ours, theirs, pairs):
    assert align_response(ours, theirs) == pairs


def test_of_a_row_with_another_number_of_responses_the_first_of_the_same_text_are_aligned(tokenizer):
    yes, no, red = (tokenizer.encode(word)[0] for word in ("yes", "no", "red"))
    end = tokenizer.eos_token_id
    ours = torch.tensor([[-100, yes, -100, no, -100], [-100, no, -100, red, -100], [-100, end, -100, yes, -100]])
    theirs = torch.tensor(
        [
            [-100, -100, yes, -100, no, -100, red],  # a turn more
            [-100, -100, yes, -100, red, -100, no],  # another first turn: the others may be other turns too
            [-100, yes, -100, no, -100, end, -100],  # which has nothing where the student ends its turn
        ]
    )
    aligned, keep = align_labels(ours, theirs, tokenizer)
    assert aligned.tolist() == [[True, False, True, False, False], [False] * 5, [False] * 5]
    assert keep.tolist() == [[False, True, False, True, False, False, False], [False] * 7, [False] * 7]


def marked_targets(labels, mask):
    """Tokens that the marked positions predict."""
    return labels[:, 1:][mask[:, :-1]].tolist()


@pytest.mark.parametrize("turns", ["one", "two"])
def test_another_template_and_image_size_are_aligned_token_by_token(live, make_teacher, processor, collator, turns):
    data = examples()
    if turns == "two":
        data, collator = conversation(processor)
    before = copy.deepcopy(data)
    batch = collator([dict(row) for row in data])
    teacher = live(*make_teacher(), collator=collator)
    own = teacher.collate(data, batch)
    assert data == before
    assert own["input_ids"].shape[1] != batch["input_ids"].shape[1]
    assert own["pixel_values"].shape[-1] == 96

    ours = marked_targets(batch["labels"], own["aligned"])
    theirs = marked_targets(own["input_ids"], own["keep"])
    assert ours == theirs
    keep, targets = shift_for_next_token(batch["labels"])
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert ours == [token for token in targets.tolist() if token != end]  # all but the ends of turns
    assert (targets == end).sum() == (3 if turns == "two" else 4)
    assert not (own["aligned"] & ~keep).any()


@pytest.mark.parametrize("left", [0, 1], ids=["a turn is cut away", "within a turn"])
def test_turns_that_max_length_leaves_are_aligned(live, make_teacher, processor, left):
    data, collator = conversation(processor)
    labels = collator([dict(row) for row in data])["labels"][0]
    ends = (labels == processor.tokenizer.convert_tokens_to_ids("<|end|>")).nonzero().flatten().tolist()
    second = next(i for i in range(ends[0] + 1, len(labels)) if labels[i] != -100)
    teacher = live(*make_teacher(end="<|end|>"), collator=collator)
    cut = dataclasses.replace(collator, max_length=second + left)
    batch = cut([dict(row) for row in data])
    own = teacher.collate(data, batch)
    keep, targets = shift_for_next_token(batch["labels"])
    assert torch.equal(own["aligned"], keep)
    assert marked_targets(own["input_ids"], own["keep"]) == targets.tolist()
    assert keep[0].sum() == ends[0] - labels.ne(-100).nonzero()[0].item() + 1 + left


def test_the_same_template_and_another_image_size_align_every_token(live, make_teacher, processor, collator):
    model, teacher_processor = make_teacher()
    teacher_processor.chat_template = processor.chat_template
    batch = collator(examples())
    own = live(model, teacher_processor).collate(examples(), batch)
    assert torch.equal(own["aligned"], shift_for_next_token(batch["labels"])[0])


def test_equal_processors_read_the_same_tensors(live, make_student, processor, collator):
    other = copy.deepcopy(processor)
    other(text="any", padding="max_length", max_length=8, truncation=True)  # leaves a trace in the tokenizer
    teacher = live(make_student(moe_layers=[], seed=1), other)
    assert teacher.collate(examples(), collator(examples())) == {}


def test_the_share_of_unaligned_tokens_is_reported(live, make_teacher, collator):
    batch = collator(examples())
    tokens = (batch["labels"] != -100).sum().item()
    assert live(*make_teacher()).check_alignment(examples(), batch) == pytest.approx(4 / tokens)
    assert live(*make_teacher(end="<|end|>")).check_alignment(examples(), batch) == 0


def test_responses_that_cannot_be_aligned_are_refused_with_the_first(live, make_teacher, collator):
    # a space before the answer: the first word is another token, in sentences and in answers of one word
    batch = collator(examples())
    teacher = live(*make_teacher(before=" ", end="<|end|>"))
    own = teacher.collate(examples(), batch)
    ours = marked_targets(batch["labels"], own["aligned"])
    assert 0 < len(ours) == (batch["labels"] != -100).sum() - 4
    assert ours == marked_targets(own["input_ids"], own["keep"])
    with pytest.raises(ValueError, match=r"\d\d% of the words") as error:
        teacher.check_alignment(examples(), batch)
    answer = examples()[0]["answer"]
    assert f"'{answer}<|end|>' for the student and ' {answer}<|end|>' for the teacher" in str(error.value)


def test_an_own_processor_needs_rows_with_images(live, make_teacher):
    with pytest.raises(ValueError, match="column `images`"):
        live(*make_teacher(), collator=lambda batch: batch)


def test_rows_of_the_same_tensors_are_the_models_logits(live, make_student, processor, collator):
    model = sharpened(make_student(moe_layers=[], seed=1))
    batch = collator(examples())
    labels = batch.pop("labels")
    found = live(model, processor).rows(dict(batch), {}, labels)
    assert found.aligned is None
    expected = model(**batch).logits[shift_for_next_token(labels)[0]]
    torch.testing.assert_close(logits_of(found.hidden, found.head), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 10])
def test_rows_of_own_tensors_are_the_models_logits_at_the_same_words(live, make_teacher, tokenizer, collator, padding):
    model, teacher_processor = make_teacher(vocab_size=len(tokenizer) + padding)
    batch = collator(examples())
    teacher = live(model, teacher_processor)
    found = teacher.rows({}, teacher.collate(examples(), batch), batch["labels"])
    # by hand: each row alone, the words of the answer after the prompt, where `rows` pads and selects
    expected, targets = [], []
    for example in examples():
        text = teacher_processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example["question"]}]}],
            add_generation_prompt=True,
        )
        inputs = teacher_processor(images=example["images"], text=text + example["answer"], return_tensors="pt")
        count = len(tokenizer(example["answer"])["input_ids"])
        targets += inputs["input_ids"][0, -count:].tolist()
        expected.append(model(**inputs).logits[0, -count - 1 : -1, : len(tokenizer)])
    assert found.aligned.sum() == len(targets) == len(found.hidden)
    _, supervised = shift_for_next_token(batch["labels"])
    assert supervised[found.aligned].tolist() == targets
    torch.testing.assert_close(logits_of(found.hidden, found.head), torch.cat(expected).double(), rtol=1e-4, atol=1e-4)
    assert teacher.shared_vocab_size == (len(tokenizer) if padding else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_of_half_precision_answers(live, make_teacher, collator, dtype):
    model, teacher_processor = make_teacher()
    batch = collator(examples())
    full, half = (live(m, teacher_processor) for m in (model, copy.deepcopy(model).to(dtype)))
    own = full.collate(examples(), batch)
    answers = [teacher.rows({}, own, batch["labels"]) for teacher in (full, half)]
    expected, found = (logits_of(answer.hidden, answer.head) for answer in answers)
    assert half.head.weight.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_the_hidden_states_can_be_saved_for_a_backward_pass(live, make_student, processor, collator):
    batch = collator(examples())
    labels = batch.pop("labels")
    found = live(make_student(moe_layers=[], seed=1)).rows(dict(batch), {}, labels)
    scale = torch.ones((), requires_grad=True)
    (found.hidden * scale).sum().backward()
    assert scale.grad.item() == pytest.approx(found.hidden.sum().item(), rel=1e-4)
    assert not any(p.requires_grad for p in (found.head.weight, found.hidden))


def test_a_teacher_that_gives_nan_is_refused(live, make_student, processor, collator):
    model = make_student(moe_layers=[], seed=1)
    model.model.language_model.norm.weight.data[0] = math.nan
    batch = collator(examples())
    labels = batch.pop("labels")
    count = shift_for_next_token(labels)[0].sum().item()
    with pytest.raises(ValueError, match=f"not finite at {count} of {count} positions"):
        live(model).rows(dict(batch), {}, labels)


def with_tokens(processor, *tokens):
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(list(tokens))
    return other


def test_vocabularies_that_differ_in_padding_share_the_real_tokens(student, make_teacher, processor):
    size = len(processor.tokenizer)
    for padding in (8, 64):
        teacher, teacher_processor = make_teacher(vocab_size=size + padding)
        assert shared_vocab_size(student, teacher, processor, teacher_processor) == size
        check_teacher(student, _images_as(student, teacher), processor, teacher_processor)
    teacher, teacher_processor = make_teacher()
    assert shared_vocab_size(student, teacher, processor, teacher_processor) is None
    assert shared_vocab_size(student, teacher, processor) is None


def _images_as(student, teacher):
    teacher.config.image_seq_length = student.config.image_seq_length
    return teacher


def test_a_token_that_one_tokenizer_alone_has_at_the_end_is_left_out(student, make_teacher, processor):
    size = len(processor.tokenizer)
    teacher, teacher_processor = make_teacher(vocab_size=size + 64)
    assert shared_vocab_size(student, teacher, processor, with_tokens(teacher_processor, "<|more|>")) == size
    with pytest.raises(ValueError, match=r"first at token '<\|more\|>'"):  # the very tensors cannot be read by both
        check_teacher(student, _images_as(student, teacher), processor, with_tokens(teacher_processor, "<|more|>"))


def test_another_tokenizer_is_refused_by_its_first_differing_token(student, make_teacher, processor):
    teacher, teacher_processor = make_teacher(vocab_size=len(processor.tokenizer) + 64)
    first = len(processor.tokenizer)
    ours, theirs = with_tokens(processor, "<a>", "<b>", "<c>"), with_tokens(teacher_processor, "<a>", "<c>", "<b>")
    with pytest.raises(ValueError, match=f"first at token '<b>' with id {first + 1}"):
        shared_vocab_size(student, teacher, ours, theirs)
    # another id beyond those that are shared
    with pytest.raises(ValueError, match="'<c>'"):
        shared_vocab_size(student, teacher, with_tokens(processor, "<a>", "<c>"), theirs_with_hole(teacher_processor))


def theirs_with_hole(processor):
    """`<c>` at a higher id, and nothing where the student has it."""
    other = with_tokens(processor, "<a>", "<c>")
    vocabulary = other.tokenizer.get_vocab()
    vocabulary["<c>"] += 5
    other.tokenizer.get_vocab = lambda: vocabulary
    return other


def test_sizes_that_differ_need_the_teachers_processor(student, make_teacher, processor):
    teacher, _ = make_teacher(vocab_size=len(processor.tokenizer) + 8)
    with pytest.raises(ValueError, match="give the teacher's processor"):
        shared_vocab_size(student, teacher, processor)


def test_a_processor_of_another_model_is_refused(student, make_teacher, processor):
    teacher, teacher_processor = make_teacher(vocab_size=len(processor.tokenizer) - 8)
    with pytest.raises(ValueError, match="does not belong to its model"):
        shared_vocab_size(student, teacher, processor, teacher_processor)


def test_quantisations_of_a_recipe():
    assert quantization_config(None) is None
    assert quantization_config("8bit").load_in_8bit
    assert quantization_config("4bit").bnb_4bit_quant_type == "nf4"
    other = quantization_config('{"quant_method": "quanto", "weights": "int8"}')
    assert (other.quant_method, other.weights) == ("quanto", "int8")
    for wrong in ("3bit", '{"weights": "int8"}', '{"quant_method": "none"}', "[]"):
        with pytest.raises(ValueError, match="none of 8bit, 4bit"):
            quantization_config(wrong)


def test_a_quantisation_without_its_library_is_refused(make_teacher, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("pip install optimum-quanto")

    model, processor = make_teacher()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.quantizers.quantizer_quanto.QuantoHfQuantizer.validate_environment", missing)
    with pytest.raises(ValueError, match="install it"):
        load_model_and_processor(str(tmp_path), quantization='{"quant_method": "quanto", "weights": "int8"}')


def test_dtype_and_device_are_the_options(make_teacher, tmp_path):
    model, processor = make_teacher()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_model_and_processor(str(tmp_path), dtype="bfloat16", device="meta")
    assert (loaded.dtype, loaded.device.type) == (torch.bfloat16, "meta")


@pytest.mark.parametrize("teacher", [LiveTeacher, CachedTeacher])
def test_a_teachers_weight_is_said_by_the_trainers_options_alone(teacher):
    assert "weight" not in inspect.signature(teacher).parameters
