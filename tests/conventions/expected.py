"""Which of transformers' common tests fail, of which models, and why; what passes in spite of it fails the suite."""

import transformers

from llava_mod_hf.model.configuration_llava_mod import release

ALL = "Stock Dense Sparse LowRank"

NOT_SPARSE = "the class can set an implementation of experts, as packed ones have; the test wants it called here too"

# {test: [(reason, the classes of `suite.py` without `Test`)]}
FAILS = {
    **{
        f"test_eager_matches_batched_and_grouped_inference_{dtype}": [(NOT_SPARSE, "Dense LowRank")]
        for dtype in ("0_fp16", "1_fp32", "2_bf16")
    },
    "test_generation_tester_mixin_inheritance": [
        ("asks for GenerationTesterMixin, which is in no source distribution", ALL),
    ],
}

if release(transformers.__version__) >= (5, 24):
    FAILS["test_multimodal_outputs_are_returned"] = [
        (
            "asks for `image_outputs`, which LLaVA has since 5.24: ours are the same in all releases",
            "Dense Sparse LowRank",
        )
    ]

UNUSED = {
    f"model.vision_tower.post_layernorm.{name}": "LLaVA reads hidden states before it" for name in ("weight", "bias")
}

# {test: {part: reason}}, of all classes: the other parts (`subTest`) of the test have to pass
PARTS = {
    "test_training_gradient_checkpointing": UNUSED,
    "test_training_gradient_checkpointing_use_reentrant_false": UNUSED,
    "test_training_gradient_checkpointing_use_reentrant_true": UNUSED,
}
