"""How large a stage is: parameters, steps, memory and disk, from its rows and its student on the meta device."""

import math
import shutil
from pathlib import Path

from transformers import LlavaModel

from llava_mod_hf.data.fitting import LENGTH, NUM_IMAGES
from llava_mod_hf.data.held_out import count_pictures
from llava_mod_hf.students.parameter_counts import count_parameters
from llava_mod_hf.teachers.protocol import row_sets
from llava_mod_hf.teachers.vision_cache import bytes_of_picture, check_cacheable, check_room
from llava_mod_hf.teachers.vision_sharing import vision_config_hash
from llava_mod_hf.training.stage_memory import GB, adapted, count, stage_memory
from llava_mod_hf.training.trainable import train_only

PARALLEL = {
    "whole": "one GPU, or DDP",
    "zero2": "ZeRO-2",
    "fsdp2": "FSDP2, ZeRO-3",
    "shard_teacher": "FSDP2, `shard_teacher`",
}


def amount(number, unit=""):
    """A large number as one reads it: 12.3 M, 1.2 GB."""
    for size, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}{unit}"
    return f"{number:.0f} {unit}".rstrip()


class SizesOfStage:
    """The part of [`~llava_mod_hf.commands.check_stage.StageCheck`] that counts, once rows and models are known."""

    def _sizes(self):
        if self.student is None:
            return
        total, active = count_parameters(self.student)
        self.model, self.sums = adapted(self.student, self.args)
        modules = getattr(self.args, "train_modules", None)
        train_only(self.model, modules, ["adaptor"] if self.stage == "adapt" else None)
        trained = count(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self._tell(
            "parameters", f"{amount(total)}, {amount(active)} active, {amount(trained)} trained",
            total=total, active=active, trained=trained,
        )  # fmt: skip
        if "rows" not in self.found:
            return
        args = self.args
        budget = getattr(args, "max_tokens_per_batch", None)
        rows = args.per_device_train_batch_size * self.processes if budget is None else len(self.rows) / self.batches
        batch = rows * args.gradient_accumulation_steps
        steps = args.max_steps if args.max_steps > 0 else math.ceil(len(self.rows) / batch * args.num_train_epochs)
        seen = min(steps * batch, len(self.rows) * args.num_train_epochs) if args.max_steps <= 0 else steps * batch
        tokens = sum(self.rows[LENGTH][:]) / len(self.rows) * seen
        self._tell(
            "steps",
            f"{steps:,} of {batch:,.0f} rows: {amount(tokens)} tokens",
            steps=steps,
            rows_per_step=batch,
            tokens=tokens,
        )

    def _memory(self, gpu_memory):
        if self.model is None or "rows" not in self.found:
            return
        args, longest = self.args, self.found["rows"]["tokens"]["most"]
        sequences = args.per_device_train_batch_size * (2 if self.stage == "prefer" else 1)
        if getattr(args, "max_tokens_per_batch", None) is not None:
            sequences = args.max_tokens_per_batch / longest
        images = (self.student.config.image_seq_length or 0) * max(self.rows[NUM_IMAGES][:], default=0)
        supervised = self.found["rows"].get("supervised", 1.0) * sequences * longest
        rows = min(args.rows_per_chunk, math.ceil(supervised)) if self.stage == "mimic" else 0
        small = getattr(self.who, "teacher_dtype", "float32") in ("bfloat16", "float16")
        found = stage_memory(
            self.model, self.teacher, tokens=sequences * longest, image_tokens=sequences * images, rows=rows,
            teacher_bytes=2 if small else 4, processes=self.processes, sums=self.sums,
        )  # fmt: skip
        ways = {name: text for name, text in PARALLEL.items() if name != "shard_teacher" or self.stage == "mimic"}
        ways = ways if self.processes > 1 else {"whole": "one GPU"}
        told = ", ".join(f"{amount(found[name], 'B')} ({text})" for name, text in ways.items())
        self._tell("memory", f"of each process, estimated: {told}", **{name: found[name] for name in ways})
        least = min(found[name] for name in ways)
        if gpu_memory is not None and least > gpu_memory * GB:
            raise ValueError(
                f"The stage takes {least / GB:.1f} GB of each GPU at least, and there are {gpu_memory:g}: give a "
                "smaller batch, more processes, `use_peft`, a `teacher_cache`, or a larger GPU."
            )

    def _disk(self):
        """Weights of each checkpoint in float32, and what the optimiser keeps of what is trained."""
        if self.model is None or "steps" not in self.found:
            return
        args, sizes = self.args, self.found["parameters"]
        saved = 4 * (sizes["trained"] if args.use_peft else sizes["total"])
        whole = saved + 8 * sizes["trained"]
        kept, steps = 0, self.found["steps"]["steps"]
        if args.save_strategy == "steps":
            every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)  # or a share
            kept = steps // max(1, int(every))
        elif args.save_strategy == "epoch":
            kept = math.ceil(args.num_train_epochs)
        if args.save_total_limit:
            kept = min(kept, args.save_total_limit + 1)  # the new one is there before an old one goes
        needed = kept * whole + saved
        folder = Path(args.output_dir).resolve()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        self._tell(
            "disk", f"{kept} checkpoints of {amount(whole, 'B')} and the model: {amount(needed, 'B')}; "
            f"{amount(free, 'B')} are free", checkpoints=kept, bytes=needed, free=free,
        )  # fmt: skip
        if needed > free:
            raise ValueError(
                f"Checkpoints take {amount(needed, 'B')}, and {amount(free, 'B')} are free at `{folder}`: give "
                "`save_total_limit`, another `output_dir`, or make room."
            )

    def _features(self):
        """What a cache of image features takes, of each encoder that differs by its config: no weights are read."""
        args = self.args
        if args.vision_cache is None or self.model is None or "rows" not in self.found:
            return
        check_cacheable(self.student)
        models = [model.base_model for model in (self.student, self.teacher) if model is not None]
        sizes = {
            vision_config_hash(base.vision_tower): bytes_of_picture(base.config, 2 if args.bf16 or args.fp16 else 4)
            for base in models
            if isinstance(base, LlavaModel)
        }
        pictures = sum(count_pictures(rows) or 0 for rows in row_sets(self.rows, self.eval_rows))
        needed, free = check_room(args.vision_cache, pictures, list(sizes.values()))
        self._tell(
            "features", f"{pictures:,} pictures of {' and '.join(amount(size, 'B') for size in sizes.values())}: "
            f"{amount(needed, 'B')} more at most; {amount(free, 'B')} are free",
            pictures=pictures, bytes=needed, free=free,
        )  # fmt: skip
