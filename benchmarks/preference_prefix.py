"""
What a pair costs with its image and prompt computed once, against computed for each of its two responses.

    python benchmarks/preference_prefix.py [--json FILE] [--rounds 5] [--device cuda] [--dtype bfloat16]

A sparse LLaVA with a Qwen2-0.5B's widths (four experts, top 2, in every second layer), shrunk in its layers and its
vocabulary; random weights and tokens: `--image-tokens` of an image that are given as embeddings, `--prompt-tokens`, and
two responses of `--response-tokens`. The two ways run in turns, forward and backward, `--rounds` times; the median
round counts, and the ratio of each round its spread. The JSON has a floor of the body too: the time of as many
multiplications as the shared way makes, in products of 1,024 · 1,024 matrices, in the same turns.

- body: the language model without its head.
- head: the log-probabilities of the responses, of which both ways compute no others (`--vocabulary` tokens).
- memory: the peak of what one step allocates, of its tensors alone (on a GPU, `torch.cuda.max_memory_allocated`).
"""

import argparse
import statistics
import sys
import weakref

import torch
from measuring import MIB, add_json, in_turns, measured, products_of, square_product, write_json
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, SiglipVisionConfig

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.teachers.shared_prefix import SharedPrefix


class Allocated(TorchDispatchMode):
    """The most bytes that tensors hold at once which operations make on a CPU."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def _forget(self, pointer, size):
        self.known.discard(pointer)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage.data_ptr(), storage.nbytes())
        return found


def model_of(args):
    """A student of those widths; its vision encoder is not run, as the rows are tokens alone."""
    text_config = Qwen2Config(
        vocab_size=args.vocabulary, hidden_size=896, intermediate_size=4864, num_hidden_layers=args.layers,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    vision_config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaModConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=args.vocabulary - 1, image_seq_length=4,
        vision_feature_layer=-1, vision_feature_select_strategy="full", moe_layers=list(range(0, args.layers, 2)),
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaModForConditionalGeneration(config).to(args.device, getattr(torch, args.dtype)).train()


def batch_of(args):
    """Rows of random tokens; those of an image are as costly to the language model as any."""
    generator = torch.Generator().manual_seed(1)
    prompt, response = args.image_tokens + args.prompt_tokens, args.response_tokens
    prompts = torch.randint(args.vocabulary - 1, (args.pairs, prompt), generator=generator)
    responses = torch.randint(args.vocabulary - 1, (2 * args.pairs, response), generator=generator)
    input_ids = torch.cat([torch.cat([prompts, prompts]), responses], dim=1).to(args.device)
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


class Body:
    """Stands where the trainer's model stands: the hidden states that predict a response, and no head."""

    def __init__(self, model):
        self.model = model

    def __call__(self, labels=None, shift_labels=None, fused_lm_head=True, **inputs):
        hidden_states = self.model.base_model(**inputs).last_hidden_state
        if shift_labels is None:
            hidden_states, shift_labels = hidden_states[:, :-1], labels[:, 1:]
        self.rows = hidden_states[shift_labels != -100]
        return {}


def body_step(model, body, call, batch):
    call(**batch, fused_lm_head=True)
    body.rows.float().square().mean().backward()
    model.zero_grad()


def head_step(model, rows, labels):
    logits = model.lm_head(rows)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    model.zero_grad()


def peak_of(step, device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Allocated() as allocated:
        step()
    return allocated.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--response-tokens", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, batch = model_of(args), batch_of(args)
    body = Body(model)
    ways = {"two sequences": body, "shared": SharedPrefix(body, model)}
    steps = {name: lambda call=call: body_step(model, body, call, batch) for name, call in ways.items()}
    rows = torch.randn(2 * args.pairs * args.response_tokens, 896, device=args.device, dtype=model.dtype)
    labels = batch["labels"][batch["labels"] != -100]
    steps["head"] = lambda: head_step(model, rows.requires_grad_(), labels)
    needed = products_of(steps["shared"], model)["all"]
    product, count = square_product(args.dtype, args.device)
    times = in_turns({**steps, "product": product}, args.rounds, device=args.device)
    floor = [seconds * needed / count for seconds in times.pop("product")]
    ratios = sorted(one / two for one, two in zip(times["shared"], times["two sequences"], strict=True))
    peaks = {name: peak_of(step, args.device) for name, step in steps.items()}
    prompt = args.image_tokens + args.prompt_tokens
    tokens = (prompt + 2 * args.response_tokens) / (2 * (prompt + args.response_tokens))
    body = statistics.median(ratios)
    for name in steps:
        sys.stdout.write(f"{name:>14} {statistics.median(times[name]):8.3f} s {peaks[name] / MIB:8.0f} MiB\n")
    sys.stdout.write(
        f"shared / two sequences: tokens {tokens:.3f}, body {body:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), memory "
        f"{peaks['shared'] / peaks['two sequences']:.3f}\n"
    )
    rows = [
        measured(name, values, "s", {} if name == "head" else {"floor": floor, "two sequences": times["two sequences"]})
        for name, values in times.items()
    ]
    rows += [
        measured(f"{name}: peak memory", peak / MIB, "MiB", {"two sequences": peaks["two sequences"] / MIB})
        for name, peak in peaks.items()
    ]
    rows.append(measured("shared: tokens", tokens, "of the tokens of two sequences"))
    write_json(args.json, __file__, rows, device=args.device, dtype=args.dtype, threads=args.threads)


if __name__ == "__main__":
    main()
