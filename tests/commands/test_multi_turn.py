"""`multi_turn` of the stages, for rows that are TRL's already and need no reading."""

import pytest

from helpers.load_cases import COLUMNS, load, write
from helpers.templates import CONVERSATIONS, REWRITING, as_row, assistant, expanded, templated, user
from helpers.tiny import make_student
from llava_mod_hf.commands.stage_parts import fit_to_recipe
from llava_mod_hf.data.arguments import DataArguments, PromptArguments
from llava_mod_hf.training.adapt_config import AdaptConfig

TALKS = [{**CONVERSATIONS[2], "messages": CONVERSATIONS[number]["messages"]} for number in (0, 2, 3)]

TALKS += [{"images": [], "messages": [user("?"), assistant("<think>a</think>b"), user("?"), assistant("c")]}]


@pytest.mark.parametrize(("multi_turn", "rewriting"), [("whole", False), ("expand", False), ("whole", True)])
def test_conversations_of_a_file_are_one_row_or_one_for_each_answer(tokenizer, tmp_path, multi_turn, rewriting):
    processor = templated(tokenizer, REWRITING if rewriting else None)
    file = write(tmp_path / "rows.jsonl", [as_row(row) for row in TALKS])
    args = AdaptConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    data = DataArguments(str(file), multi_turn=multi_turn)
    rows = fit_to_recipe(
        load(file, multi_turn=multi_turn), make_student(processor.tokenizer, moe_layers=()), processor, data, args
    )
    expected = [as_row(row) for row in TALKS]
    if multi_turn == "expand":
        expected = [each for row in TALKS for each in expanded(row)]
    elif rewriting:
        expected = [*expected[:3], *expanded(TALKS[3])]
    assert [{name: row[name] for name in COLUMNS} for row in rows] == [
        {name: row[name] for name in COLUMNS} for row in expected
    ]


def test_commands_that_answer_prompts_have_one_for_each_answer():
    assert (DataArguments("rows.json").multi_turn, PromptArguments("rows.json").multi_turn) == ("whole", "expand")
