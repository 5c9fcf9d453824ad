"""
Time of the mixture-of-experts block against transformers' own experts and a dense FFN, as ratios within one run.

    python benchmarks/moe_block.py [--tokens 704 4096 1] [--threads 2] [--clock cpu] [--json FILE]
    python benchmarks/moe_block.py --expert-rank 8

At Qwen2-0.5B's sizes by default. `ours` is the block of a student as it is built by default; `eager` and `grouped_mm`
are transformers' own implementations of the same experts behind the same router, with the same weights; the floor is
one dense FFN on k times the rows, the arithmetic that k experts per token cannot do without. One token is decoded,
forward without gradient; more are trained on, forward and backward. The implementations take turns, so that whatever
else the machine does meets them all alike, and the medians are compared. `--clock cpu` counts the seconds of all
threads, which other work on the machine changes less.

Experts of a low rank (`--expert-rank`) share a dense FFN, and their floor is that FFN, once for each token.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from measuring import CLOCKS, add_json, rows_of, seconds_of, write_json
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration


def default_block(args):
    """The mixture-of-experts block of a student of one layer, with the experts implementation it has by default."""
    config = LlavaModConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        text_config=Qwen2Config(
            vocab_size=64,
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=1,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=2,
        ),
        moe_layers=[0],
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        expert_rank=args.expert_rank,
    )
    model = LlavaModForConditionalGeneration._from_config(config, dtype=getattr(torch, args.dtype))
    return model.model.language_model.layers[0].mlp.to(args.device)


def stock_experts(block, args, implementation):
    """transformers' experts with the block's weights."""
    config = SimpleNamespace(
        num_experts=args.experts,
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    experts = Qwen2MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = block.experts.gate_up_proj, block.experts.down_proj
    return experts


def implementations(args):
    """`{name: function of (tokens, width)}`; all but the floor compute the same."""
    block = default_block(args)
    dense = Qwen2MLP(
        SimpleNamespace(hidden_size=args.hidden, intermediate_size=args.intermediate, hidden_act="silu")
    ).to(args.device, getattr(torch, args.dtype))

    parameters = [*block.parameters(), *dense.parameters()]
    if args.expert_rank is not None:
        for part in (block.experts.up_b, block.experts.down_b):
            torch.nn.init.normal_(part, std=0.02)  # as after some training
        return {"ours": block, "floor": dense}, parameters

    def behind_the_router(experts):
        def run(tokens):
            _, weights, index = block.gate(tokens)
            return experts(tokens, index, weights)

        return run

    return {
        "ours": block,
        "eager": behind_the_router(stock_experts(block, args, "eager")),
        "grouped_mm": behind_the_router(stock_experts(block, args, "grouped_mm")),
        "floor": lambda tokens: dense(tokens.repeat_interleave(args.top_k, dim=0)),
    }, parameters


def seconds(run, tokens, parameters, args):
    """Of one forward pass, and one backward pass where there is more than one token."""
    training = len(tokens) > 1
    for parameter in parameters:
        parameter.grad = None
    tokens = tokens.clone().requires_grad_(training)

    def step():
        output = run(tokens)
        if training:
            output.sum().backward()

    with torch.set_grad_enabled(training):
        return seconds_of(step, args.device, args.clock)


def measure(num_tokens, args):
    """`{name: [seconds]}` of each turn but the first, which warms up."""
    torch.manual_seed(0)
    runs, parameters = implementations(args)
    runs = {
        name: run
        for name, run in runs.items()
        if name in (*(runs if args.only is None else args.only), "ours", "floor")
    }
    tokens = torch.randn(num_tokens, args.hidden, dtype=getattr(torch, args.dtype), device=args.device)
    with torch.no_grad():
        alike = [name for name in runs if name != "floor"]
        expected = runs[alike[-1]](tokens)
        for name in alike[:-1]:
            torch.testing.assert_close(runs[name](tokens), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    # at least `repetitions` turns, and at least `seconds` long: one token takes milliseconds
    times, start = {name: [] for name in runs}, time.perf_counter()
    while len(times["ours"]) < args.repetitions or time.perf_counter() - start < args.seconds:
        for name, run in runs.items():
            times[name].append(seconds(run, tokens, parameters, args))
    return {name: values[1:] for name, values in times.items()}


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[704, 4096, 1])
    parser.add_argument("--hidden", type=int, default=896, help="width, Qwen2-0.5B's by default")
    parser.add_argument("--intermediate", type=int, default=4864, help="width of an expert, Qwen2-0.5B's by default")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--expert-rank", type=int, help="experts of that rank; whole ones by default")
    parser.add_argument("--only", nargs="*", choices=["eager", "grouped_mm"], help="beside ours and the floor")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=6, help="turns, at least")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of tokens, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    add_json(parser)
    return parser


def main(argv=None):
    args = options().parse_args(argv)
    torch.set_num_threads(args.threads)
    results = {num_tokens: measure(num_tokens, args) for num_tokens in args.tokens}
    names = list(next(iter(results.values())))
    rivals = [name for name in names if name not in ("ours", "floor")]
    table = Table("tokens", "work", *names, "ours / better", title=f"times, and ratios to the floor, {args.dtype}")
    rows = []
    for num_tokens, times in results.items():
        medians = {name: statistics.median(values) for name, values in times.items()}
        cells = [f"{1e3 * medians[name]:.2f} ms\n{medians[name] / medians['floor']:.2f}" for name in names]
        better = medians["ours"] / min(medians[name] for name in rivals or ["ours"])
        work = "forward and backward" if num_tokens > 1 else "forward"
        table.add_row(str(num_tokens), work, *cells, f"{better:.2f}")
        for each in rows_of(times, bases=["floor", *rivals]):
            rows.append({**each, "name": f"{each['name']}, {num_tokens} tokens", "work": work})
    Console().print(table)
    write_json(args.json, __file__, rows, argv, device=args.device, dtype=args.dtype, threads=args.threads)


if __name__ == "__main__":
    main()
