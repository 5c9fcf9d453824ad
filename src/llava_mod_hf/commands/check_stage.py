"""What `llava-mod check` looks at, part by part: each writes its lines, its figures, and what is to be mended."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import statistics
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from llava_mod_hf.commands.arguments import UpcycleArguments
from llava_mod_hf.commands.check_sizes import SizesOfStage, amount
from llava_mod_hf.commands.info import experts_of, recipe_chain, upcycled_config
from llava_mod_hf.commands.parts import check_experts
from llava_mod_hf.commands.stage_parts import (
    fit_to_recipe,
    load_eval_rows,
    refuse_adapter_of_new_student,
    settings_of_teacher,
)
from llava_mod_hf.data.conversations import AnswersCollator, supervises_answers
from llava_mod_hf.data.fitting import LENGTH, NUM_IMAGES
from llava_mod_hf.data.grouping import TokenBatches
from llava_mod_hf.data.held_out import shared_pictures
from llava_mod_hf.data.load import image_root, load_rows
from llava_mod_hf.data.row_files import files_of
from llava_mod_hf.loading import resolve
from llava_mod_hf.students.build import plan_student
from llava_mod_hf.students.vision_layout import load_part
from llava_mod_hf.teachers.cached_teacher import CachedTeacher
from llava_mod_hf.teachers.live_teacher import LiveTeacher
from llava_mod_hf.teachers.reference_model import CachedReference, own_reading
from llava_mod_hf.training.given import given
from llava_mod_hf.training.output_folder import check_output_dir
from llava_mod_hf.training.trainer_options import check_libraries

PICTURES = 1000  # that are opened, unless all are asked for

SAMPLE = 64  # rows that are collated

STREAMED = 1000  # rows that are read of a stream

COLUMNS = {
    "adapt": ("prompt", "completion"),
    "mimic": ("prompt", "completion"),
    "prefer": ("prompt", "chosen", "rejected"),
}


class StageCheck(SizesOfStage):
    """
    Looks at everything that a stage would find out later.

    Args:
        stage (`str`): `adapt`, `mimic` or `prefer`.
        groups (`tuple`): the argument dataclasses of the stage, the trainer's last.
        recipe (`str`, *optional*): its path, beside which those of earlier stages are looked for.
        processes (`int`, *optional*, defaults to 1).
        models (`str`, *optional*): folder of models by their names.
        every_picture (`bool`, *optional*, defaults to `False`).

    Attributes:
        lines (`list[str]`): what is told, for a terminal.
        found (`dict`): the same as figures.
        problems (`list[str]`): a sentence each.
    """

    def __init__(self, stage, groups, *, recipe=None, processes=1, models=None, every_picture=False):
        self.stage, self.recipe, self.processes, self.models = stage, recipe, processes, models
        self.data_args, self.who, *more, self.args = groups
        self.upcycle_args = more[0] if more else UpcycleArguments()
        self.every_picture = every_picture
        self.data_args = dataclasses.replace(self.data_args, check_images="all" if every_picture else "header")
        self.lines, self.found, self.problems = [], {}, []
        self.rows = self.eval_rows = self.student = self.processor = self.teacher = None
        self.model, self._last = None, ""

    def run(self, *, gpu_memory=None):
        """
        Args:
            gpu_memory (`float`, *optional*): GB of one GPU, that the stage has to fit.

        Returns:
            `tuple[dict, list[str]]`: `found` and `problems`.
        """
        memory = functools.partial(self._memory, gpu_memory)
        for part in (
            self._options, self._data, self._student, self._rows, self._teacher, self._sizes, memory, self._disk,
            self._features,
        ):  # fmt: skip
            with self._noting():
                part()
        return self.found, list(dict.fromkeys(self.problems))

    @contextlib.contextmanager
    def _noting(self):
        try:
            yield
        except (ValueError, OSError) as error:
            self.problems.append(" ".join(str(error).split()))

    def _tell(self, name, text, **figures):
        self.lines.append(f"{name:12}{text}")
        self.found.setdefault(name.strip() or self._last, {}).update(figures)
        self._last = name.strip() or self._last

    def _local(self, name):
        """A model's name, or its folder among `models`."""
        local = Path(self.models) / name if self.models else None
        return str(local) if local and local.exists() else name

    # -- what the command checks before it reads anything

    def _options(self):
        check_experts(self.upcycle_args)
        if self.stage == "adapt":
            refuse_adapter_of_new_student(self.args, "makes the student")
        elif self.upcycle_args.moe_layers is not None:
            refuse_adapter_of_new_student(self.args, "makes a sparse student (`moe_layers`)")
        check_libraries(self.args)
        check_output_dir(self.args.output_dir)

    # -- data

    def _data(self):
        columns = COLUMNS[self.stage]
        for source in self.data_args.sources():
            root = image_root(source)
            name = source.label or source.dataset_name
            if root is None:
                self._tell("data", f"{name}, not of this machine, or embedded")
                continue
            for file in files_of(Path(source.dataset_name), source.dataset_train_split):
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                self._tell("data", f"{file}  {amount(file.stat().st_size, 'B')}, sha256 {digest[:16]}…")
                self.found["data"].setdefault("files", []).append(
                    {"file": str(file), "bytes": file.stat().st_size, "sha256": digest}
                )
        num_proc = self.args.dataset_num_proc
        rows = load_rows(self.data_args, columns=columns, seed=self.args.seed, num_proc=num_proc)
        if isinstance(rows, IterableDataset):
            if self.args.max_steps <= 0:
                raise ValueError("`streaming` is true, so nobody knows how many rows come: give `max_steps`.")
            rows = Dataset.from_generator(lambda: rows.take(STREAMED), features=rows.features)
            self._tell("", f"streamed: the first {len(rows):,} rows stand for the rest")
        self.rows = rows
        self._tell("", f"{len(rows):,} rows", rows=len(rows), columns=rows.column_names)
        self._pictures()
        self.eval_rows = load_eval_rows(self.data_args, self.args, columns)
        if self.eval_rows is not None:
            self._tell("", f"{len(self.eval_rows):,} rows of evaluation", eval_rows=len(self.eval_rows))
            if (found := shared_pictures(rows, self.eval_rows)) is not None:
                shared, pictures = found
                told = f"{shared:,} of their {pictures:,} pictures are trained on too"
                self._tell("", told, eval_pictures=pictures, eval_pictures_trained=shared)

    def _pictures(self):
        """Opens pictures to their ends; those of local files were all looked at when the rows were loaded."""
        rows, opened, broken = self.rows, 0, []
        wanted = len(rows) if self.every_picture else min(PICTURES, len(rows))
        for number in (round(i * (len(rows) - 1) / max(1, wanted - 1)) for i in range(wanted)):
            try:
                for image in rows[number].get("images") or ():
                    image.load()
                    opened += 1
            except (OSError, ValueError, SyntaxError) as error:
                broken.append(f"row {number} ({' '.join(str(error).split())[:120]})")
        self._tell("", f"{opened:,} pictures opened", pictures_opened=opened, pictures_broken=len(broken))
        if broken:
            raise ValueError(
                f"{len(broken)} of {wanted} rows have a picture that cannot be read: {', '.join(broken[:8])}; mend "
                "them, or give `bad_rows: drop`."
            )

    # -- the student

    def _student(self):
        if self.stage == "adapt":
            self._plan(self.who.vision_tower, self.who.language_model, self.args.chat_template_path)
            return
        name, experts = self.who.student, self.upcycle_args
        local, chain = self._local(name), []
        if local == name and self.recipe:
            chain = recipe_chain(self.recipe, {"student": name})
        if chain and "language_model" in chain[-1]:
            made = chain[-1]
            self._tell("student", f"{name}, which earlier recipes here will make", planned=True)
            self._plan(made["vision_tower"], made["language_model"], made.get("chat_template_path"))
            experts = experts if experts.moe_layers is not None else experts_of(chain)
        else:
            self.student, self.processor = self._on_meta("student", name)
        if experts.moe_layers is not None:
            with torch.device("meta"):
                self.student = AutoModelForImageTextToText.from_config(upcycled_config(self.student, experts))
        self.student.name_or_path = name

    def _plan(self, vision_tower, language_model, template):
        self.student, self.processor = plan_student(
            self._local(vision_tower),
            self._local(language_model),
            chat_template=Path(template).read_text(encoding="utf-8") if template else None,
            trust_remote_code=self.args.trust_remote_code,
        )

    def _on_meta(self, role, name):
        """A model without weights, and its processor."""
        path, remote = resolve(self._local(name)), {"trust_remote_code": self.args.trust_remote_code}
        config = load_part(role, name, AutoConfig.from_pretrained, path, **remote)
        with torch.device("meta"):
            model = load_part(role, name, AutoModelForImageTextToText.from_config, config, **remote)
        return model, load_part(f"processor of the {role}", name, AutoProcessor.from_pretrained, path, **remote)

    # -- rows

    def _rows(self):
        if self.rows is None or self.student is None:
            return
        fit_to_recipe(self.eval_rows, self.student, self.processor, self.data_args, self.args)
        before = len(self.rows)
        rows = fit_to_recipe(self.rows, self.student, self.processor, self.data_args, self.args)
        self.rows = given(self.args, type(self.args), self.student, train_dataset=rows)["train_dataset"]
        lengths = sorted(self.rows[LENGTH][:])
        at_95 = lengths[math.ceil(0.95 * len(lengths)) - 1]
        cuts = {"least": lengths[0], "median": statistics.median(lengths), "at 95 %": at_95, "most": lengths[-1]}
        self._tell(
            "rows",
            f"{len(self.rows):,} of {before:,} are trained on; tokens: "
            + ", ".join(f"{value:,.0f} {name}" for name, value in cuts.items())
            + f"; `max_length` {self.args.max_length}",
            trained=len(self.rows), left_out=before - len(rows), held_out=len(rows) - len(self.rows), tokens=cuts,
        )  # fmt: skip
        if before > len(rows):
            self._tell("", f"{before - len(rows):,} are left out: too long, nothing to learn, or malformed")
        self._padding()
        self._supervised()

    def _padding(self):
        batch, budget = self.args.per_device_train_batch_size, getattr(self.args, "max_tokens_per_batch", None)
        lengths = self.rows[LENGTH][:]
        if budget is None:
            order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
            batches = [order[i : i + batch] for i in range(0, len(order[: 1000 * batch]), batch)]
            told = f"of a batch of {batch} are padding, in random order"
        else:
            has_images = [count > 0 for count in self.rows[NUM_IMAGES]]
            batches = list(
                TokenBatches(lengths, has_images, budget=budget, processes=self.processes, seed=0, epoch=lambda: 0)
            )
            told = f"of batches of up to {max(map(len, batches))} rows and {budget:,} tokens are padding"
            self.batches = len(batches)  # of a process in an epoch
        padded = sum(max(lengths[row] for row in rows) * len(rows) for rows in batches)
        share = 1 - sum(lengths[row] for rows in batches for row in rows) / padded
        self._tell("", f"{share:.0%} {told}", padding=share)

    def _collator(self):
        if self.stage == "prefer":
            return DataCollatorForVisionPreference(self.processor, max_length=self.args.max_length)
        supervised = supervises_answers(self.args, self.rows.column_names)
        return AnswersCollator(self.processor, max_length=self.args.max_length, completion_only_loss=supervised)

    def _examples(self):
        return [self.rows[i] for i in range(min(SAMPLE, len(self.rows)))]

    def _labels(self, batch):
        if self.stage != "prefer":
            return batch["labels"]
        return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def _supervised(self):
        """What of the first rows is learnt from, and the first of them as it is read."""
        batch = self._collator()(self._examples())
        labels = self._labels(batch)
        share = ((labels != -100).sum() / batch["attention_mask"].sum()).item()
        empty = int(((labels != -100).sum(1) == 0).sum())
        tokens = int(sum(self.rows[LENGTH][:]))
        self._tell("", f"{share:.1%} of the tokens are supervised, in the first {len(labels)}", supervised=share)
        self.found["rows"]["supervised_tokens"] = round(share * tokens)
        text = self._rendered(batch["input_ids"][0], batch["attention_mask"][0], labels[0])
        self._tell("", f"the first row, ⟦supervised⟧: {text}", first=text)
        if empty:
            raise ValueError(f"{empty} of the first {len(labels)} rows have no supervised token: mend or drop them.")

    def _rendered(self, ids, mask, labels):
        """A row's text, its supervised parts in brackets, an image as one mark."""
        pieces, tokenizer = [], self.processor.tokenizer
        image = self.processor.image_token_id
        for token, there, label in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True):
            kind = None if not there else "image" if token == image else "supervised" if label != -100 else "read"
            if kind is not None:
                if not pieces or pieces[-1][0] != kind:
                    pieces.append((kind, []))
                pieces[-1][1].append(token)
        marks = {"image": lambda tokens: f"<image × {len(tokens)}>"}
        marks |= {"supervised": lambda tokens: f"⟦{tokenizer.decode(tokens)}⟧", "read": tokenizer.decode}
        return "".join(marks[kind](tokens) for kind, tokens in pieces).replace("\n", "⏎")

    # -- the teacher

    def _teacher(self):
        name = getattr(self.who, "teacher", None)
        needed = (self.stage == "mimic" and self.args.kl_weight) or (
            self.stage == "prefer" and self.args.reference == "teacher"
        )
        if name is None or not needed or self.student is None:
            return
        if self.who.teacher_cache:
            cached = CachedTeacher if self.stage == "mimic" else CachedReference
            settings = settings_of_teacher(self.who, self.args.trust_remote_code)
            cache = cached(self.who.teacher_cache, expected=settings)
            if self.rows is not None:
                cache.check_run(self.args, self.processor, self.rows)
            self._tell("teacher", f"the cache `{self.who.teacher_cache}`, which has all rows", cached=True)
            return
        self.teacher, processor = self._on_meta("teacher", name)
        same = processor.tokenizer.get_vocab() == self.processor.tokenizer.get_vocab()
        self._tell(
            "teacher", f"{name}: {'the same' if same else 'another'} tokenizer; its own template and images"
            if self.processor.chat_template != processor.chat_template else f"{name}: the student's template",
            same_tokenizer=same,
        )  # fmt: skip
        if self.rows is not None:
            self._align(processor)

    def _align(self, processor):
        examples, collator = self._examples(), self._collator()
        if self.stage == "prefer":
            own_reading(self.student, self.teacher, self.processor, processor, collate=collator, examples=examples)
            self._tell("", "its responses are the student's")
            return
        live = LiveTeacher(
            self.teacher, student=self.student, processor=self.processor, teacher_processor=processor, collator=collator
        )
        share = live.check_alignment(examples, collator([dict(each) for each in examples]))
        self._tell("", f"it says nothing about {share:.1%} of the response tokens", unaligned=share)
