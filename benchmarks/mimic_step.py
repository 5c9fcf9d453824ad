"""
Tokens per second of a dense-to-sparse step: forward and backward pass of one batch, without the optimiser.

    python benchmarks/mimic_step.py --size tiny [--dtype float32] [--json FILE]
    python benchmarks/mimic_step.py --size qwen2-0.5b [--layers 24]
    python benchmarks/mimic_step.py --size qwen2-1.5b --layers 4

One student, five ways, taken in turns in one process; medians. `--clock cpu` counts the seconds of all threads,
which other work on the machine changes less.

- `live`: `MimicTrainer` with the teacher in memory;
- `cached`: `MimicTrainer` with the teacher's 32 most likely tokens, which `llava-mod cache-teacher` would have read;
- `both`: the same, with the frozen encoder's features on disk (`vision_cache`), which an earlier epoch or stage has
  written: a hash of each picture and the reading of its file are part of the time;
- `authors`: full logits of student and teacher at all positions, experts one after the other, both vision towers run;
- `sft`: no teacher; the student's cross-entropy at the supervised positions.

`tiny` is a batch of `recipes/tiny/3_mimic_sparse.yaml`. The others have random weights of Qwen2-0.5B's or Qwen2-1.5B's
sizes behind CLIP-L/14-336, four experts in every second layer, and a teacher, of twice the width or of Qwen2-7B's
sizes; one row of 704 tokens, 576 of them an image's, 64 supervised. Collation is not part of the time. `small` is for
`curves.py`: width 256, and 64 tokens of an image.

The JSON has a floor too: the time of as many multiplications in products of 1,024 · 1,024 matrices, in the same turns.

`products` are the multiplications and additions of the step's matrix products, counted by torch over transformers'
`eager` experts: what the authors' way has more of them is the speed that they alone allow (`their limit`), and `vision`
is the encoder's share, which `both` saves.
"""

import argparse
import statistics
import tempfile

import torch
from measuring import CLOCKS, add_json, in_turns, measured, products_of, square_product, write_json
from torch.nn import functional as F
from transformers import CLIPVisionConfig, Qwen2Config

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, MimicConfig, MimicTrainer
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.losses.rows import TopKRows, shift_for_next_token
from llava_mod_hf.model.moe_llava_mod import router_losses
from llava_mod_hf.students.build import build_student
from llava_mod_hf.students.upcycling import upcycle
from llava_mod_hf.teachers.kept_answers import top_k_log_probs
from llava_mod_hf.teachers.unique_images import keep_features
from llava_mod_hf.teachers.vision_cache import VisionCache
from llava_mod_hf.training.trainable import set_trainable

TEACHER = "embedded:tiny-teacher"
SUPERVISED = 64
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION_SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
# student and teacher: width, FFN width, heads, heads of keys and values, and whether the head is the embeddings
SIZES = {
    "small": ((256, 1024, 4, 2, True), (512, 2048, 8, 2, True)),
    "qwen2-0.5b": ((896, 4864, 14, 2, True), (1792, 9728, 28, 4, True)),
    "qwen2-1.5b": ((1536, 8960, 12, 2, True), (3584, 18944, 28, 4, False)),
}


def tiny_models(args):
    """The embedded teacher and a student as the recipe makes it, and a batch of its rows."""
    teacher, processor = load_model_and_processor(TEACHER, attn_implementation="eager")
    student, _ = build_student(TEACHER, "embedded:tiny-student-lm")
    student.set_attn_implementation("eager")
    return upcycle(student), teacher, processor, None


def qwen_models(args):
    """Random weights of the real shapes."""
    small = args.size == "small"
    vision, image_size = (VISION_SMALL, 112) if small else (VISION, 336)
    vision_config = CLIPVisionConfig(**vision, image_size=image_size, patch_size=14, projection_dim=768)
    image_tokens = (image_size // 14) ** 2

    def model(size, **experts):
        width, ffn, heads, kv_heads, tied = size
        text_config = Qwen2Config(
            vocab_size=8192 if small else 151936,
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
        )
        config = LlavaModConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=1,
            image_seq_length=image_tokens,
            **experts,
        )
        return LlavaModForConditionalGeneration(config)

    of_student, of_teacher = SIZES[args.size]
    student = model(of_student, moe_layers=list(range(0, args.layers, 2)), num_experts=4, num_experts_per_tok=2)
    teacher = model(of_teacher)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    ids = torch.randint(2, 300, (1, args.positions))
    ids[:, 10 : 10 + image_tokens] = 1
    labels = torch.where(torch.arange(args.positions) >= args.positions - SUPERVISED, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = torch.randn(1, 3, image_size, image_size)
    return student, teacher, load_model_and_processor(TEACHER)[1], batch


class Remembered:
    """A cached teacher whose rows are in memory."""

    shared_vocab_size = None

    def __init__(self, rows):
        self.rows_ = rows

    def rows(self, student_inputs, own_inputs, labels):
        return self.rows_


def authors_step(student, teacher, batch, aux_coef, autocast):
    """The same step as the authors' code does it."""
    batch = dict(batch)
    labels = batch.pop("labels")
    with autocast():
        # around the head that TRL puts in the place of `forward`
        outputs = type(student).forward(student, **batch, output_router_logits=True, use_cache=False)
        with torch.no_grad():
            teacher_logits = teacher(**batch, use_cache=False).logits
    logits = outputs.logits.float()
    soft_targets = F.softmax(teacher_logits.float(), dim=-1)
    cross_entropy = -(soft_targets * F.log_softmax(logits, dim=-1)).sum(-1)
    mask = labels != -100
    kl = (cross_entropy * mask).sum() / mask.sum()
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    aux, _ = router_losses(outputs.router_logits, student.config.get_text_config())
    (kl + lm + aux_coef * aux).backward()


def contenders(args, folder):
    """`{name: function of no arguments}`, each of which does one step; features of pictures are kept in `folder`."""
    student, teacher, processor, batch = (tiny_models if args.size == "tiny" else qwen_models)(args)
    set_trainable(student, None)
    rows = easy_vqa.load("mixture", "train").select(range(64))
    config = MimicConfig(
        "unused",
        lm_weight=1.0,
        use_cpu=True,
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
    )
    tower = teacher.model.vision_tower
    trainer = MimicTrainer(student, teacher, config, train_dataset=rows, processing_class=processor)
    trainer.current_gradient_accumulation_steps = 1
    (live,) = trainer.teachers
    shared_tower = teacher.model.vision_tower
    if batch is None:
        batch = dict(trainer.data_collator([rows[i] for i in range(64)]))
        batch = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    _, targets = shift_for_next_token(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        answers = live.rows(inputs, {}, batch["labels"])
        index, log_probs = top_k_log_probs(answers, 32, 1.0)
    remembered = Remembered(TopKRows(index, log_probs))

    def step(teachers, kl_weight):
        trainer.teachers, trainer.teacher_weights, trainer.args.kl_weight = teachers, [1.0] * len(teachers), kl_weight
        trainer.training_step(student, dict(batch), torch.tensor(len(targets)))

    cache = VisionCache(folder)

    def both():
        keep_features(cache, student)
        step([remembered], 1.0)
        keep_features(None, student)

    def authors():
        default = student.config.get_text_config()._experts_implementation
        student.set_experts_implementation("eager")
        teacher.model.vision_tower = tower
        authors_step(student, teacher, batch, trainer.router_aux_loss_coef, trainer.accelerator.autocast)
        teacher.model.vision_tower = shared_tower
        student.set_experts_implementation(default)

    steps = {
        "live": lambda: step([live], 1.0),
        "cached": lambda: step([remembered], 1.0),
        "both": both,
        "authors": authors,
        "sft": lambda: step([], 0.0),
    }
    both()  # writes the features
    return steps, student, batch["attention_mask"].sum().item()


def count_products(steps, student):
    """`{name: (products of a step, those of vision encoders)}`, in 10⁹ multiplications with their additions."""
    found = {name: products_of(step, student) for name, step in steps.items()}
    return {name: (each["all"] / 1e9, each["vision_tower"] / 1e9) for name, each in found.items()}


def json_rows(times, count, products, tokens):
    """Seconds of each way beside the authors', fine-tuning and a floor; the authors' way computes what `live` does."""
    rows = []
    for name in products:
        needed = products["live" if name == "authors" else name][0] * 1e9
        bases = {base: times[base] for base in ("authors", "sft") if base != name}
        bases["floor"] = [seconds * needed / count for seconds in times["product"]]
        rows.append(measured(name, times[name], "s", bases, tokens=tokens, products=products[name][0]))
    return rows


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument("--layers", type=int, default=24, help="of both language models; not with --size tiny")
    parser.add_argument("--positions", type=int, default=704, help="of the row; not with --size tiny")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="bfloat16 for tiny, as its recipe, else float32"
    )
    parser.add_argument("--repeats", type=int, default=None, help="of each way; 15 for tiny, else 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    add_json(parser)
    return parser


def main():
    args = options().parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.size == "tiny" else "float32")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, folder)


def measure(args, folder):
    """Prints what `main` is asked for."""
    steps, student, tokens = contenders(args, folder)
    products = count_products(steps, student)
    product, count = square_product(args.dtype)
    times = in_turns(
        {**steps, "product": product},
        args.repeats or (15 if args.size == "tiny" else 3),
        clock=args.clock,
        before=student.zero_grad,
    )
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"{args.size}: {tokens} tokens a step, {args.threads} threads")
    print(f"{'':8} {'seconds':>9} {'tokens/s':>9} {'speed/authors':>14} {'time/sft':>9}", end="")
    print(f" {'products':>9} {'their limit':>12} {'vision':>7}")
    for name in steps:
        value, (all_products, vision) = medians[name], products[name]
        print(
            f"{name:8} {value:9.3f} {tokens / value:9.1f} {medians['authors'] / value:14.2f} "
            f"{value / medians['sft']:9.2f} {all_products:9.1f} {products['authors'][0] / all_products:12.2f} "
            f"{vision / all_products:7.2f}"
        )
    rows = json_rows(times, count, products, tokens)
    write_json(args.json, __file__, rows, dtype=args.dtype, threads=args.threads)


if __name__ == "__main__":
    main()
