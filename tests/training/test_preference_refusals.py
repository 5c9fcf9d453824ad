"""What the preference trainer refuses or warns of."""

import copy
import math

import pytest

from helpers.ddp_gradients import rows
from helpers.preference_trainer_cases import PAIRS, batch_of, small_image_teacher, with_reference
from helpers.preference_trainers import uneven
from llava_mod_hf import PreferenceConfig
from llava_mod_hf.teachers.reference_model import REFERENCE_COLUMNS


def test_beta_of_the_paper_is_the_default(tmp_path):
    args = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert args.beta == 0.1
    assert args.loss_type == ["sigmoid"]
    assert args.reference == "teacher"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"loss_type": ["kto"]}, "no `loss_type` `kto`"),
        ({"reference": "student"}, "`reference` is `student`: give one of teacher, self"),
        ({"label_smoothing": 0.1}, "`label_smoothing` is 0.1, which .* does not read"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1"),
        ({"loss_type": ["margin"], "ld_alpha": 0.5}, r"`margin` takes plain log-ratios: leave out `ld_alpha` \(0.5\)"),
        ({"loss_type": ["kto_pair"], "use_weighting": True}, "leave out .*`use_weighting` .True."),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "`use_weighting` weighs pairs, .* leave one out."),
        ({"kto_reference_compat": True}, "changes `kto_pair` alone"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"beta": 0.0}, "`beta` is 0.0: give a positive one"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_options_that_do_not_fit_are_refused(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **args)


def test_there_is_exactly_one_reference(models, pair_trainer_of):
    student, teacher = models()
    columns = rows("preferences")
    one = columns.add_column(REFERENCE_COLUMNS[0], [0.0] * PAIRS)
    both = one.add_column(REFERENCE_COLUMNS[1], [0.0] * PAIRS)
    for reference, args, message in (
        (None, {}, "ref_model"),
        (teacher, {"reference": "self"}, "leave one out"),
        (teacher, {"dataset": both}, "there is another reference"),
        (None, {"dataset": both, "reference": "self"}, "there is another reference"),
        (None, {"dataset": one}, f"`{REFERENCE_COLUMNS[0]}` alone"),
        (None, {"dataset": both, "eval_dataset": columns}, "Some rows have"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_trainer_of(student, reference, **args)
    trainer = pair_trainer_of(student, None, dataset=both)
    with pytest.raises(ValueError, match="no columns ref_chosen_logps"):
        trainer.evaluate(columns)


def test_a_teacher_of_another_vocabulary_is_refused(models, pair_trainer_of):
    student, teacher = models()
    size = teacher.config.text_config.vocab_size
    teacher.resize_token_embeddings(size + 8)
    with pytest.raises(ValueError, match=rf"{size + 8} entries and the student's {size}"):
        pair_trainer_of(student, teacher)


def test_a_teacher_whose_head_is_padded_is_taken(models, pair_trainer_of, processor):
    student, teacher = models(())
    teacher.resize_token_embeddings(teacher.config.text_config.vocab_size + 8)
    trainer = pair_trainer_of(student, teacher, teacher_processor=processor)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"]) and trainer.state.global_step > 0


def test_a_teacher_of_another_tokenizer_is_refused(models, pair_trainer_of, processor):
    other = copy.deepcopy(processor)
    vocabulary = other.tokenizer.get_vocab()
    first, second = sorted(vocabulary, key=vocabulary.get)[20:22]
    text = other.tokenizer.backend_tokenizer.to_str()
    text = text.replace(f'"{first}":20', f'"{first}":21').replace(f'"{second}":21', f'"{second}":20')
    other.tokenizer._tokenizer = type(other.tokenizer.backend_tokenizer).from_str(text)
    with pytest.raises(ValueError, match="tokenizers of teacher and student differ, first at token"):
        pair_trainer_of(*models(), teacher_processor=other)


def test_a_teacher_of_another_image_token_is_refused(models, pair_trainer_of, other_processor):
    student, teacher = models(())
    teacher = small_image_teacher(teacher)
    teacher.config.image_token_id = 7
    with pytest.raises(ValueError, match="writes images as token"):
        pair_trainer_of(student, teacher, teacher_processor=other_processor)
    with pytest.raises(ValueError, match="`image_seq_length` 4|`image_token_id` 7"):
        pair_trainer_of(student, teacher)


def test_a_template_that_writes_other_answers_is_refused(models, pair_trainer_of, other_processor):
    student, teacher = models(())
    other_processor.chat_template = other_processor.chat_template.replace("part['text'] }}", "part['text'] | upper }}")
    with pytest.raises(ValueError, match="words of the responses have no counterpart in the teacher's"):
        pair_trainer_of(student, small_image_teacher(teacher), teacher_processor=other_processor)


def test_a_student_given_by_name_is_checked_too(models, pair_trainer_of, processor, tmp_path):
    student, teacher = models()
    student.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    teacher.resize_token_embeddings(teacher.config.text_config.vocab_size + 8)
    with pytest.raises(ValueError, match="vocabulary"):
        pair_trainer_of(str(tmp_path / "student"), teacher, processor=None)


def test_a_thin_kl_estimate_is_warned_of(models, pair_trainer_of):
    student, teacher = models(())
    with pytest.warns(UserWarning, match="rest on 4 pairs: give batches of at least 8"):
        pair_trainer_of(student, teacher, loss_type=["kto_pair"])


def test_a_margin_to_oneself_is_warned_of(models, pair_trainer_of):
    with pytest.warns(UserWarning, match="its gradient is 0"):
        pair_trainer_of(models(())[0], None, loss_type=["margin"], reference="self")


@pytest.mark.parametrize("kind", ["own processor", "columns"])
def test_a_pair_that_the_student_would_read_a_part_of_is_refused(models, pair_trainer_of, other_processor, kind):
    """The reference has the whole of it: rewards would be of other responses."""
    student, teacher = models(())
    dataset = uneven(rows("preferences"))
    whole = pair_trainer_of(student, teacher, dataset=dataset)
    longest = batch_of(whole)["input_ids"].shape[1]
    if kind == "columns":
        options = {"teacher": None, "dataset": with_reference(dataset, teacher, whole)}
    else:
        options = {"teacher": small_image_teacher(teacher), "teacher_processor": other_processor, "dataset": dataset}
    pair_trainer_of(student, **options, max_length=longest, batch=1).train()
    with pytest.raises(ValueError, match=f"{longest} tokens, and `max_length` is {longest - 1}: .*fit_rows"):
        pair_trainer_of(student, **options, max_length=longest - 1, batch=1).train()
