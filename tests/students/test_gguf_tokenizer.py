"""Tokenizers in GGUF files: llama.cpp cuts text into the same tokens, ends where the student does, or is refused."""

import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers import llama_cpp, tiny
from helpers.models import QUESTIONS
from llava_mod_hf.students.gguf_export import export_gguf
from llava_mod_hf.students.gguf_tokenizer import PRE_TOKENIZERS, WORDS

TEXTS = [
    "\n \n\n \t\t end.  \n   x ",
    "3 33 333 3333 33333, 3.14 or -1,000,000!!??",
    "I've been 'told he's there, 'RE you sure? WE'LL see; it'd do",
    "é ☃ 😀👩‍🚀 größer Привет 今天 កាន់ ‘quotes’",
    "<|user|>a <image>b<|assistant|> c<|end|>",
    "x = {'a': [1, 2]}  # no --- ======= __init__",
]

CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS % digits), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, digits in (("qwen2", r"\p{N}"), ("llama-bpe", r"\p{N}{1,3}"))
    },
}

SPECIAL = ["<|pad|>", "<|end|>", "<image>", "<|user|>", "<|assistant|>"]


def byte_pairs(cut, *, model=None, normalizer=None):
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, *TEXTS] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template="{{ messages }}",
    )


def export(tokenizer, folder, **fields):
    student = tiny.make_student(tokenizer)
    student.generation_config.update(**fields)
    return export_gguf(student, tiny.make_processor(tokenizer), folder, gguf_type="f32")[0]


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_text_into_the_same_tokens(tmp_path, name):
    gguf, tokenizer = llama_cpp.package(), byte_pairs(CUTS[name])
    assert set(CUTS) == set(PRE_TOKENIZERS.values())
    path = export(tokenizer, tmp_path)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    found = llama_cpp.answers(path, TEXTS, steps=1)
    assert [answer["tokens"] for answer in found] == [tokenizer(text).input_ids for text in TEXTS]


def fields_of(path):
    return {name: field.contents() for name, field in llama_cpp.package().GGUFReader(path).fields.items()}


def test_what_the_file_says_of_tokens_and_template(tmp_path):
    llama_cpp.package()
    tokenizer = byte_pairs(CUTS["gpt-2"])
    tokenizer.add_tokens(["[box]"])
    fields = fields_of(export(tokenizer, tmp_path, eos_token_id=[1, 4]))
    assert fields["tokenizer.ggml.tokens"][:5] == SPECIAL
    assert fields["tokenizer.ggml.tokens"][-1] == "[box]"
    assert fields["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]  # control, then normal
    assert fields["tokenizer.ggml.token_type"][-1] == 4  # user-defined
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (1, 4)
    assert fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_rows_without_a_token_are_unused(tmp_path):
    llama_cpp.package()
    tokenizer = byte_pairs(CUTS["gpt-2"])
    student = tiny.make_student(tokenizer)
    student.resize_token_embeddings(len(tokenizer) + 9)
    path, _ = export_gguf(student, tiny.make_processor(tokenizer), tmp_path, gguf_type="f32")
    fields = fields_of(path)
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 8}]"
    assert fields["tokenizer.ggml.token_type"][-9:] == [5] * 9
    (answer,) = llama_cpp.answers(path, ["x"], steps=1)
    assert len(answer["probabilities"][0]) == len(tokenizer) + 9


REFUSED = {
    "another cut": ({"cut": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), CUTS["gpt-2"]])}, "Whitespace"),
    "a space before": ({"cut": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "ByteLevel"),
    "lower case": ({"cut": CUTS["gpt-2"], "normalizer": normalizers.Lowercase()}, "ByteLevel"),
    "byte fallback": ({"cut": CUTS["gpt-2"], "model": models.BPE(byte_fallback=True)}, "BPE"),
}


@pytest.mark.parametrize(("made", "message"), REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path, made, message):
    llama_cpp.package()
    with pytest.raises(ValueError, match=re.escape(message)):
        export(byte_pairs(**made), tmp_path)
    assert not (tmp_path / "model.gguf").exists()
