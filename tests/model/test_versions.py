"""What keeps a published student loadable in other releases of transformers, as far as one release can show it."""

import ast
import re
import runpy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

import llava_mod_hf
from llava_mod_hf import LlavaModForConditionalGeneration
from llava_mod_hf.model import modeling_llava_mod
from llava_mod_hf.model.configuration_llava_mod import LOWEST_TRANSFORMERS
from llava_mod_hf.model.modeling_llava_mod import CACHE, rows_to_project
from llava_mod_hf.model.moe_llava_mod import router_losses

ROOT = Path(__file__).parents[2]
MODEL = Path(llava_mod_hf.__file__).parent / "model"
# Names that transformers has had since 5.0; `make test-versions` shows that the files load there.
SINCE_5_0 = """
transformers: AutoConfig AutoModel AutoModelForImageTextToText GenerationConfig GenerationMixin LlavaConfig
    MODEL_FOR_CAUSAL_LM_MAPPING MODEL_MAPPING initialization
transformers.activations: ACT2FN
transformers.conversion_mapping: register_checkpoint_conversion_mapping
transformers.core_model_loading: Concatenate MergeModulelist WeightConverter WeightRenaming
transformers.integrations: moe use_experts_implementation
transformers.modeling_outputs: BaseModelOutputWithPast CausalLMOutputWithPast
transformers.models.llava.modeling_llava: LlavaModel LlavaMultiModalProjector LlavaPreTrainedModel
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


def test_a_tied_head_stays_tied_where_transformers_forgets_that_it_is(make_student, tmp_path, monkeypatch):
    student = make_student()
    student.save_pretrained(tmp_path)

    def forget(self, loading_info):  # as transformers 5.3 does
        loading_info.missing_keys = set()

    monkeypatch.setattr(PreTrainedModel, "mark_tied_weights_as_initialized", forget)
    loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, student.lm_head.weight)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["switch", "pooled"])
def test_router_losses_are_those_of_transformers(kind, padded):
    drawn = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    found, expected = ([logits.clone().requires_grad_() for logits in drawn] for _ in range(2))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]) if padded else None
    config = SimpleNamespace(router_aux_loss_type=kind, num_experts_per_tok=2)
    groups = [tuple(expected)] if kind == "pooled" else [(logits,) for logits in expected]
    aux = sum(load_balancing_loss_func(group, 4, 2 if kind == "pooled" else 1, mask) for group in groups)
    counted = torch.ones(12, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    z = sum(router_z_loss_func(logits[counted][None]) for logits in expected)
    for own, theirs in zip(router_losses(tuple(found), config, mask), (aux, z), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-6, atol=0)
        gradients = (torch.autograd.grad(loss, logits) for loss, logits in ((own, found), (theirs, expected)))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("release", "deeper", "name", "kinds"),
    [
        ((5, 24), False, "LlavaModLlamaModel", ["WeightConverter", "WeightConverter"]),
        ((5, 9), False, "llava_mod", ["WeightConverter", "WeightConverter"]),
        ((5, 0), True, "llava_mod", ["WeightConverter", "WeightConverter", "WeightRenaming"]),
    ],
)
def test_file_names_are_kept_where_each_release_finds_them(make_student, monkeypatch, release, deeper, name, kinds):
    kept = {}
    monkeypatch.setattr(modeling_llava_mod, "RELEASE", release)
    monkeypatch.setattr(
        modeling_llava_mod,
        "register_checkpoint_conversion_mapping",
        lambda key, conversions, overwrite: kept.update({key: conversions}),
    )
    tower = SimpleNamespace(vision_model=None) if deeper else SimpleNamespace()
    modeling_llava_mod._register_file_names(make_student().model.language_model, tower)
    assert {key: [type(conversion).__name__ for conversion in values] for key, values in kept.items() if values} == {
        name: kinds
    }
    for renaming in (value for value in kept[name] if type(value).__name__ == "WeightRenaming"):
        assert renaming.reverse_transform().target_patterns == ["vision_tower."]  # what is saved has no pattern in it


@pytest.mark.parametrize("version", ["4.57.6", "3.0"])
def test_an_older_release_is_refused_in_a_sentence(monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"for transformers 5\.0 and newer, and {re.escape(version)} is installed"):
        runpy.run_path(str(MODEL / "configuration_llava_mod.py"))


def test_the_pages_name_the_ranges():
    page, readme = (ROOT / "docs" / "versions.md").read_text(), (ROOT / "README.md").read_text()
    for text in (page, readme):
        assert f"transformers {LOWEST_TRANSFORMERS} and newer" in text
    for library in ("transformers", "trl"):
        allowed = re.search(rf'"{library}([><=!~][^"]*)"', (ROOT / "pyproject.toml").read_text())[1]
        assert f"| {library} | `{allowed}` |" in page


@pytest.mark.parametrize(
    ("cached", "ids", "kept"),
    [
        (0, [7, 7, 9], True),  # the prompt, its pictures with it
        (5, [9], False),
        (5, [7], False),  # an answer of one placeholder asks for no picture
        (5, [9, 9], False),  # several tokens at a time, as assisted generation has them
        (5, [9, 7, 7], True),  # a prompt after a cached prefix
    ],
)
def test_pictures_that_the_cache_holds_are_left_out_in_every_release(make_student, monkeypatch, cached, ids, kept):
    """Some releases pass them on with each token."""
    student, pixels = make_student(), torch.zeros(1)
    student.config.image_token_index = 7
    cache = DynamicCache()
    if cached:
        cache.update(torch.zeros(1, 2, cached, 4), torch.zeros(1, 2, cached, 4), 0)
    monkeypatch.setattr(
        GenerationMixin,
        "prepare_inputs_for_generation",
        lambda self, input_ids, **kwargs: {"input_ids": input_ids, **kwargs},
    )
    found = student.prepare_inputs_for_generation(torch.tensor([ids]), pixel_values=pixels, **{CACHE: cache})
    assert (found["pixel_values"] is pixels) == kept
