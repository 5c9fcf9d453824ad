"""Experts, attention, generation and compilation of the models, forward."""

import copy

import torch
from transformers import CLIPVisionConfig, Qwen2Config
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from gpu_checks.cases import Skipped, need_cuda, on_cuda, relative_error, share_of_largest
from helpers.models import moe_blocks
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, load_model_and_processor, upcycle
from llava_mod_hf.data.easy_vqa import image_paths

TEACHER = "embedded:tiny-teacher"
WIDTHS = {"cuda": (896, 4864), "cpu": (128, 256)}  # Qwen2-0.5B's, of model and expert
EXPERTS, TOP_K = 4, 2
EXPERT_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02}
LOGIT_BOUND, HALF_LOGIT_BOUND = 1e-4, 0.05  # of the largest logit
QUESTIONS = [
    "is there a red circle?",
    "what color is the shape?",
    "what shape is in the image?",
    "does the image contain a triangle?",
    "what color is it?",
    "is there not a blue rectangle?",
    "is a green shape present?",
    "what is the blue shape?",
]


# Experts


def expert_block(dtype, device):
    """A student of one layer, and its block, at Qwen2-0.5B's widths on a GPU."""
    width, intermediate = WIDTHS[torch.device(device).type]
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = Qwen2Config(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        initializer_range=width**-0.5,
    )
    config = LlavaModConfig(
        vision_config=vision, text_config=text, moe_layers=[0], num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    model = LlavaModForConditionalGeneration._from_config(config, dtype=dtype).to(device)
    return model, moe_blocks(model)[0]


def random_tokens(count, device, dtype):
    width, _ = WIDTHS[torch.device(device).type]
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def expert_gradients(experts, tokens, index, weights):
    """Output, and the gradients of tokens, gates and packed matrices, for the same routing whatever the precision."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (tokens, weights)]
    experts.zero_grad(set_to_none=True)
    output = experts(leaves[0], index, leaves[1])
    towards = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64).view_as(output)
    (output * towards.to(output.dtype)).sum().backward()
    found = {"output": output, "tokens": leaves[0].grad, "gates": leaves[1].grad}
    return found | {name: parameter.grad for name, parameter in experts.named_parameters()}


def expert_cases(device):
    rows = 704 if on_cuda(device) else 64
    for dtype, bound in EXPERT_BOUNDS.items():
        for name in ("eager", "grouped_mm", "batched_mm"):
            # which copies the matrices for every token and expert: 704 tokens would need 74 GB in float32
            tokens = min(rows, 64) if name == "batched_mm" else rows

            def run(dtype=dtype, bound=bound, name=name, tokens=tokens):
                model, block = expert_block(dtype, device)
                hidden = random_tokens(tokens, device, dtype)
                with torch.no_grad():
                    _, weights, index = block.gate(hidden)
                plain = copy.deepcopy(block.experts).double()
                model.set_experts_implementation("eager")
                plain.config = copy.deepcopy(block.experts.config)
                expected = expert_gradients(plain, hidden.double(), index, weights.double())
                del plain
                model.set_experts_implementation(name)
                found = expert_gradients(block.experts, hidden, index, weights)
                return {part: (relative_error(found[part], expected[part]), bound) for part in expected}

            yield f"{name} {str(dtype).removeprefix('torch.')} {tokens} tokens", run


# Models


def dense_teacher(device, **options):
    model, processor = load_model_and_processor(TEACHER, **options)
    return model.to(device).eval(), processor


def sparse_student(device):
    """The embedded teacher with experts that differ, as after a training."""
    dense, processor = load_model_and_processor(TEACHER)
    model, generator = upcycle(dense, layers="alternate"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in moe_blocks(model):
            for parameter in block.experts.parameters():
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(device).eval(), processor


def prompts(processor, device, questions, *, pictures, padding_side="left"):
    """A batch of questions, of which those in `pictures` have an image."""
    texts = [f"<|user|>{'<image>' if i in pictures else ''}{text}<|assistant|>" for i, text in enumerate(questions)]
    paths = list(image_paths("test").values())
    images = [paths[i] for i in range(len(questions)) if i in pictures]
    batch = processor(text=texts, images=images or None, padding=True, padding_side=padding_side, return_tensors="pt")
    return {name: value.to(device) for name, value in batch.items()}


# Attention


@torch.no_grad()
def kept_logits(model, batch):
    """Logits of the tokens that are no padding."""
    return model(**batch).logits[batch["attention_mask"].bool()]


@torch.no_grad()
def attention_errors(device, name, side):
    """Of a batch of picture and text rows: from `eager`, and from its rows alone."""
    model, processor = sparse_student(device)
    pictures, questions = {0, 2}, QUESTIONS[:4]
    batch = prompts(processor, device, questions, pictures=pictures, padding_side=side)
    model.set_attn_implementation("eager")
    expected = kept_logits(model, batch)
    model.set_attn_implementation(name)
    found = kept_logits(model, batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    alone = []
    for i, question in enumerate(questions):
        single = prompts(processor, device, [question], pictures={0} if i in pictures else set())
        if i in pictures:
            single["pixel_values"] = batch["pixel_values"][[sorted(pictures).index(i)]]
        alone.append(model(**single).logits[0])
    if [len(part) for part in alone] != lengths:
        raise ValueError(f"the rows alone have {[len(part) for part in alone]} tokens, in the batch {lengths}")
    return {
        "from eager": (share_of_largest(found, expected), LOGIT_BOUND),
        "from rows alone": (share_of_largest(found, torch.cat(alone)), LOGIT_BOUND),
    }


def half_attention_errors(device, name, side):
    """bfloat16 against `eager` in float32; of the dense model, where no rounding sends a token to another expert."""
    installed = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "sdpa": lambda: True,
    }
    if not installed[name]():
        raise Skipped("not installed")
    if name != "sdpa":
        need_cuda(device)
    model, processor = dense_teacher(device, attn_implementation="eager")
    batch = prompts(processor, device, QUESTIONS[:4], pictures={0, 2}, padding_side=side)
    expected = kept_logits(model, batch)
    half, _ = dense_teacher(device, dtype="bfloat16", attn_implementation=name)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    return {"from eager": (share_of_largest(kept_logits(half, batch), expected), HALF_LOGIT_BOUND)}


def attention_cases(device):
    for side in ("left", "right"):
        for name in ("eager", "sdpa"):
            yield f"{name} float32, padded {side}", lambda name=name, side=side: attention_errors(device, name, side)
        for name in ("sdpa", "flash_attention_2", "flash_attention_3"):
            yield (
                f"{name} bfloat16, padded {side}",
                lambda name=name, side=side: half_attention_errors(device, name, side),
            )


# Generation and compilation


@torch.no_grad()
def generation_differences(device, make, options):
    """How many tokens of eight greedy answers differ from those of the rows one by one."""
    model, processor = make(device)
    batch = prompts(processor, device, QUESTIONS, pictures=set(range(len(QUESTIONS))))
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = model.generate(**batch, **greedy, **options)[:, batch["input_ids"].shape[1] :]
    different = 0
    for i in range(len(QUESTIONS)):
        keep = batch["attention_mask"][i].bool()
        single = {name: batch[name][i][keep][None] for name in ("input_ids", "attention_mask")}
        answer = model.generate(**single, pixel_values=batch["pixel_values"][[i]], **greedy)
        different += (answer[0, keep.sum() :] != found[i]).sum().item()
    return {"tokens that differ": (different, 0)}


MODELS = {"dense": dense_teacher, "sparse": sparse_student}


def generation_cases(device):
    for name, make in MODELS.items():
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            cache = options.get("cache_implementation", "dynamic")
            yield (
                f"{name}, {cache} cache, 8 rows",
                lambda make=make, options=options: generation_differences(device, make, options),
            )


@torch.no_grad()
def compile_findings(device, make):
    model, processor = make(device)
    batch = prompts(processor, device, QUESTIONS, pictures=set(range(len(QUESTIONS))))
    expected = kept_logits(model, batch)
    text = prompts(processor, device, QUESTIONS, pictures=set())
    torch._dynamo.reset()
    explained_text = torch._dynamo.explain(model)(**text)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(**batch)
    torch._dynamo.reset()
    error = share_of_largest(kept_logits(torch.compile(model), batch), expected)
    torch._dynamo.reset()
    reasons = {" ".join(str(found.reason).split())[:80] for found in explained.break_reasons}
    return {
        "logits": (error, LOGIT_BOUND),
        "graph breaks": explained.graph_break_count,
        "graph breaks, text alone": explained_text.graph_break_count,
        "reasons": "; ".join(sorted(reasons)) or "none",
    }


def compiled_generation(device, make):
    """With a static cache, as transformers does unasked on a GPU where it can."""
    need_cuda(device)
    return generation_differences(device, make, {"cache_implementation": "static"})


def compile_cases(device):
    for name, make in MODELS.items():
        yield f"{name} forward", lambda make=make: compile_findings(device, make)
        yield f"{name}, static cache, compiled", lambda make=make: compiled_generation(device, make)
