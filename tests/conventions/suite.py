"""transformers' common tests over the stock LLaVA and over students; `run.py` says where the tests are from."""

import contextlib
import re
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers_tests import test_modeling_common as common
from transformers_tests.test_configuration_common import ConfigTester

from conventions.expected import FAILS, PARTS
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.model.modeling_llava_mod import LlavaModModel

PAGE = Path(__file__).parents[2] / "docs" / "conventions.md"

# The tests know by these names which classes have a loss: a model that transformers holds is in its tables.
common.MODEL_MAPPING_NAMES = {**common.MODEL_MAPPING_NAMES, "llava_mod": "LlavaModModel"}
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "llava_mod": "LlavaModForConditionalGeneration",
}

IMAGE_TOKEN, VOCABULARY = 3, 99
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class ModelTester:
    """Tiny configs and batches, by the names that the common tests read."""

    batch_size, num_image_tokens, image_size = 3, 4, 8
    seq_length = encoder_seq_length = num_image_tokens + 7
    hidden_size, num_hidden_layers, num_attention_heads = (
        SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    is_training = True
    text_config = {
        "model_type": "llama", **SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision_config = {"model_type": "clip_vision_model", **SIZES, "image_size": image_size, "patch_size": 4}

    def __init__(self, config_class, **fields):
        self.config_class, self.fields = config_class, fields

    def get_config(self):
        return self.config_class(
            text_config=dict(self.text_config),
            vision_config=dict(self.vision_config),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=self.num_image_tokens,
            vision_feature_layer=-1,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(IMAGE_TOKEN + 1, VOCABULARY, (self.batch_size, self.seq_length))
        input_ids[:, : self.num_image_tokens] = IMAGE_TOKEN
        images = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": images,
        }


class Common(common.ModelTesterMixin):
    all_model_classes = (LlavaModModel, LlavaModForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    config_class = LlavaModConfig
    fields = {}

    def setUp(self):
        self.model_tester = ModelTester(self.config_class, **self.fields)
        self.failed = set()  # of the parts that are expected to

    def tearDown(self):
        self.assertEqual(self.failed, set(PARTS.get(self._testMethodName, ())), "shorten the table in expected.py")

    @contextlib.contextmanager
    def subTest(self, msg=None, **params):
        if msg in PARTS.get(self._testMethodName, ()):
            with self.assertRaises(self.failureException):
                yield
            self.failed.add(msg)
        else:
            with super().subTest(msg, **params):
                yield

    def test_config(self):
        ConfigTester(self, config_class=self.config_class, has_text_modality=False).run_common_tests()


class TestStock(Common, unittest.TestCase):
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)
    config_class = LlavaConfig


class TestDense(Common, unittest.TestCase):
    pass


class WithExperts(Common):
    def test_moe_models_record_router_logits(self):
        # asked of the text of the model's file, and the experts are in another
        with mock.patch.object(common.inspect, "getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()


class TestSparse(WithExperts, unittest.TestCase):
    fields = {"moe_layers": [1]}


class TestLowRank(WithExperts, unittest.TestCase):
    fields = {"moe_layers": [1], "expert_rank": 2}


@pytest.mark.parametrize("test", sorted({**FAILS, **PARTS}))
def test_what_is_expected_is_a_test_and_told_of(test):
    assert hasattr(Common, test)
    assert {name for _, classes in FAILS.get(test, ()) for name in classes.split()} <= {
        "Stock",
        "Dense",
        "Sparse",
        "LowRank",
    }
    assert re.search(r"`(\w+?)(_\d_\w+)?`", f"`{test}`")[1] in PAGE.read_text()
