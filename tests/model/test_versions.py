"""What keeps a published student loadable in other releases of transformers, as far as one release can show it."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

import llava_mod_hf
from llava_mod_hf.model.modeling_llava_mod import CACHE, rows_to_project

MODEL = Path(llava_mod_hf.__file__).parent / "model"
# Names that transformers has had since 5.0; `make test-versions` shows that the files load there.
SINCE_5_0 = """
transformers: AutoConfig AutoModel AutoModelForImageTextToText GenerationConfig GenerationMixin LlavaConfig
    MODEL_FOR_CAUSAL_LM_MAPPING MODEL_MAPPING PreTrainedConfig initialization
transformers.conversion_mapping: register_checkpoint_conversion_mapping
transformers.core_model_loading: Concatenate MergeModulelist WeightConverter WeightRenaming
transformers.integrations: moe use_experts_implementation
transformers.modeling_outputs: BaseModelOutputWithPast CausalLMOutputWithPast
transformers.models.llava.modeling_llava: LlavaModel LlavaMultiModalProjector LlavaPreTrainedModel
transformers.models.mixtral.modeling_mixtral: load_balancing_loss_func
transformers.models.switch_transformers.modeling_switch_transformers: router_z_loss_func
transformers.utils: can_return_tuple logging
"""


@pytest.mark.parametrize("path", sorted(MODEL.glob("*_llava_mod.py")), ids=lambda path: path.stem)
def test_shipped_files_import_old_names_or_have_another_way(path):
    tree = ast.parse(path.read_text())
    tried = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in tried]
    imports = [node for node in imports if not node.level and node.module.split(".")[0] == "transformers"]
    assert imports
    names = {name for node in imports for name in (f"{node.module}:", *(alias.name for alias in node.names))}
    assert names <= set(SINCE_5_0.split())


def test_the_cache_goes_in_and_out_by_the_name_of_this_release(make_student):
    student = make_student()
    ids = torch.arange(5, 11)[None]
    whole = student(input_ids=ids).logits
    first = student(input_ids=ids[:, :4], use_cache=True)
    assert CACHE in {field.name for field in fields(BaseModelOutputWithPast)}
    second = student(input_ids=ids[:, 4:], **{CACHE: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (0, [[0, 1, 2], [3, 4, 5]]),
        (2, [[1, 2], [4, 5]]),
        (torch.tensor([0, 2]), [[0, 2], [3, 5]]),
        (torch.tensor([[True, False, False], [False, True, True]]), [0, 4, 5]),
        (torch.tensor([[2], [0]]), [[2], [3]]),
    ],
    ids=["all", "last", "positions", "mask", "positions of each row"],
)
def test_rows_to_project(kept, expected):
    hidden = torch.arange(6.0).view(2, 3, 1)
    assert rows_to_project(hidden, kept)[..., 0].tolist() == expected
