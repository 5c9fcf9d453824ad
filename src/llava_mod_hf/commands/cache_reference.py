"""`llava-mod cache-reference`: the teacher's log-probabilities of the pairs of a recipe, computed once."""

import logging
from dataclasses import dataclass

import torch
from datasets import Dataset, Features, Value
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import add_fused_lm_head

from llava_mod_hf.commands.arguments import DistillArguments
from llava_mod_hf.commands.cache_teacher import ShardArguments, load_for_cache, write_cache
from llava_mod_hf.commands.stage_parts import settings_of_teacher
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.fingerprints import row_key
from llava_mod_hf.losses.preference_losses import response_sums
from llava_mod_hf.teachers.answer_cache import preference_settings
from llava_mod_hf.teachers.reference_model import REFERENCE_COLUMNS, TAIL_COLUMNS, own_reading
from llava_mod_hf.teachers.shared_prefix import sharing
from llava_mod_hf.training.preference_config import PreferenceConfig
from llava_mod_hf.training.preference_trainer import CHECKED_ROWS

OPTIONS = (
    "data.arguments:DataArguments",
    "commands.arguments:DistillArguments",
    "training.preference_config:PreferenceConfig",
    "commands.cache_reference:ReferenceCommand",
)

NUMBERS = REFERENCE_COLUMNS + TAIL_COLUMNS

FEATURES = Features({"key": Value("string"), "row": Value("int64"), **{name: Value("float32") for name in NUMBERS}})

logger = logging.getLogger(__name__)


@dataclass
class ReferenceCommand(ShardArguments):
    """[`ShardArguments`]: which shards this process writes, and where the whole is pushed."""


class ReferenceWriter:
    """
    Makes rows of a cache out of pairs.

    Args:
        teacher (`PreTrainedModel`): reads the pairs; its output head is replaced by TRL's, which never builds logits.
        collate (`Callable`): how it reads them.
        rows (`datasets.Dataset`): the pairs.
        args ([`~llava_mod_hf.PreferenceConfig`]): batch size, precision.
    """

    def __init__(self, teacher, collate, rows, args):
        self.teacher, self.collate, self.rows, self.args = teacher.eval(), collate, rows, args
        add_fused_lm_head(teacher)
        self.shared = sharing(teacher, teacher) if args.share_prefix else teacher

    def _collate(self, numbers):
        examples = [self.rows[number] for number in numbers]
        return [row_key(example) for example in examples], dict(self.collate([dict(example) for example in examples]))

    @torch.no_grad()
    def __call__(self, numbers):
        """
        The cache's rows for a range of the pairs.

        Raises:
            ValueError: if a log-probability is not finite.
        """
        keys: list[str] = []
        found = []
        batches = DataLoader(
            numbers,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self._collate,
        )
        for batch_keys, batch in tqdm(batches, desc=f"Pairs from {numbers[0]}", disable=self.args.disable_tqdm or None):
            keys += batch_keys
            found.append(self._log_probs(batch).reshape(len(NUMBERS), -1))  # (numbers, pairs)
        values = torch.cat(found, dim=1)
        if not values.isfinite().all():
            raise ValueError(
                f"The teacher's log-probabilities are not finite for {(~values.isfinite()).any(0).sum()} of "
                f"{len(keys)} pairs: its weights are broken, or `teacher_dtype` cannot hold its activations."
            )
        columns = dict(zip(NUMBERS, values.tolist(), strict=True))
        return Dataset.from_dict({"key": keys, "row": list(numbers), **columns}, features=FEATURES)

    def _log_probs(self, batch):
        """
        Summed over the response, in float32, then over its tail: what TRL's `compute_ref_log_probs` computes in
        training, for any `ld_alpha`.
        """
        device, args = self.teacher.device, self.args
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        mask = batch.pop("completion_mask")
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        precision = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(device.type, precision, enabled=args.bf16 or args.fp16):
            log_probs = self.shared(**batch, labels=labels, fused_lm_head=True).log_probs
        return torch.cat(response_sums(log_probs, mask[:, 1:])).float().cpu()


def run(data_args: DataArguments, distill_args: DistillArguments, args: PreferenceConfig, cache_args: ReferenceCommand):
    """
    Writes the teacher's log-probabilities of the pairs of a preference recipe into its `teacher_cache`.

    Returns:
        `Path`: the cache's folder.
    """
    if args.reference != "teacher":
        raise ValueError(f"`reference` is `{args.reference}`, and a cache is of the teacher: leave it out.")
    (student, processor), (teacher, teacher_processor), rows = load_for_cache(
        data_args, distill_args, args, cache_args, columns=("prompt", "chosen", "rejected")
    )
    collate = DataCollatorForVisionPreference(processor, max_length=args.max_length)
    examples = [rows[number] for number in range(min(CHECKED_ROWS, len(rows)))]
    own = own_reading(student, teacher, processor, teacher_processor, collate=collate, examples=examples)

    settings = {**preference_settings(args, processor), **settings_of_teacher(distill_args, args.trust_remote_code)}
    make = ReferenceWriter(teacher, collate if own is None else own.collator, rows, args)
    card = {"title": "Reference", "template": "reference_cache.md.j2"}
    return write_cache(data_args, distill_args, cache_args, len(rows), settings, make, **card)
