"""Batches of one modality and of similar length: the sampler, two processes, and a trainer that is interrupted."""

import inspect
import itertools
import random

import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.grouping import GroupedBatches, ModalityLengthSampler, TokenBatches

RNG = random.Random(0)
LENGTHS = [RNG.randrange(10, 500) for _ in range(403)]
HAS_IMAGES = [RNG.random() < 0.7 for _ in LENGTHS]


def order(unit, *, epoch=0, seed=0):
    return list(ModalityLengthSampler(LENGTHS, HAS_IMAGES, unit=unit, seed=seed, epoch=lambda: epoch))


def spread(batches):
    """Mean over batches of what the shorter rows are padded by."""
    padded = [max(LENGTHS[i] for i in batch) - LENGTHS[j] for batch in batches for j in batch]
    return sum(padded) / len(padded)


@pytest.mark.parametrize("unit", [1, 8, 30, 500])
def test_every_row_comes_once_and_one_batch_at_most_has_both_kinds(unit):
    rows = order(unit)
    assert sorted(rows) == list(range(len(LENGTHS)))
    batches = list(BatchSampler(rows, unit, drop_last=False))
    mixed = [batch for batch in batches if len({HAS_IMAGES[i] for i in batch}) > 1]
    assert len(mixed) <= 1
    assert all(batch in batches[-2:] for batch in mixed)


def test_batches_are_of_similar_length_and_come_in_no_order():
    batches = list(BatchSampler(order(8), 8, drop_last=False))
    at_random = list(range(len(LENGTHS)))
    random.Random(1).shuffle(at_random)
    assert spread(batches) < 0.3 * spread(list(BatchSampler(at_random, 8, drop_last=False)))
    assert max(LENGTHS) == max(LENGTHS[i] for i in batches[0])
    kinds = [HAS_IMAGES[batch[0]] for batch in batches]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes > 10  # not all images first
    firsts = [LENGTHS[batch[0]] for batch in batches[1:-2]]
    assert firsts != sorted(firsts, reverse=True)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert order(8) == order(8)
    assert len({tuple(order(8, epoch=epoch, seed=seed)) for epoch, seed in ((0, 0), (1, 0), (0, 7))}) == 3


def test_two_processes_take_batches_of_one_kind_at_the_same_time():
    size = 4
    sampler = BatchSampler(order(2 * size), size, drop_last=False)
    first, second = (list(BatchSamplerShard(sampler, 2, rank)) for rank in range(2))
    assert sorted({*itertools.chain(*first, *second)}) == list(range(len(LENGTHS)))
    together = [a + b for a, b in zip(first, second, strict=True)]
    assert sum(len({HAS_IMAGES[i] for i in batch}) > 1 for batch in together) <= 2
    assert spread(together) < 0.5 * spread(list(BatchSampler(range(len(LENGTHS)), 2 * size, drop_last=False)))


def token_batches(budget, *, processes=1, epoch=0, seed=0, lengths=LENGTHS, has_images=HAS_IMAGES):
    """Of each process."""
    samplers = [
        TokenBatches(lengths, has_images, budget=budget, processes=processes, process=i, seed=seed, epoch=lambda: epoch)
        for i in range(processes)
    ]
    found = [list(sampler) for sampler in samplers]
    assert [len(batches) for batches in found] == [len(sampler) for sampler in samplers] == [len(found[0])] * processes
    return found


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("budget", [500, 2000, 7777, 10**6])
def test_batches_of_tokens_have_every_row_once_and_no_more_tokens_than_they_may(budget, processes):
    of_each = token_batches(budget, processes=processes)
    batches = list(itertools.chain(*of_each))
    assert sorted(itertools.chain(*batches)) == list(range(len(LENGTHS)))
    assert all(len(batch) * max(LENGTHS[i] for i in batch) <= budget for batch in batches)
    assert all(len({HAS_IMAGES[i] for i in batch}) == 1 for batch in batches)
    steps = [list(itertools.chain(*step)) for step in zip(*of_each, strict=True)]
    assert sum(len({HAS_IMAGES[i] for i in step}) > 1 for step in steps) <= 1
    assert max(LENGTHS) == max(LENGTHS[i] for i in steps[0])
    if budget < 10**6:
        firsts = [max(LENGTHS[i] for i in step) for step in steps[1:]]
        assert firsts != sorted(firsts, reverse=True)


def test_batches_of_tokens_are_full():
    """Of as few batches as whole budgets make, but for what rounding and the two modalities leave over."""
    (batches,) = token_batches(4000)
    padded = [len(batch) * max(LENGTHS[i] for i in batch) for batch in batches]
    assert sum(LENGTHS) / sum(padded) > 0.9
    assert len(batches) <= 1.15 * sum(LENGTHS) / 4000 + 2


def test_batches_of_tokens_depend_on_seed_and_epoch_and_are_as_many_in_each():
    def drawn(**options):
        return [tuple(sorted(batch)) for batch in token_batches(3000, processes=2, **options)[1]]

    assert drawn() == drawn()
    others = [drawn(), drawn(epoch=1), drawn(epoch=2), drawn(seed=7)]
    assert len({len(batches) for batches in others}) == 1
    assert len({tuple(batches) for batches in others}) == 4
    assert len({frozenset(batches) for batches in others}) == 4, "not the same batches in another order"


def test_a_row_comes_twice_only_where_there_are_too_few():
    (first,), (second,), (third,) = token_batches(20, processes=3, lengths=[10, 20], has_images=[True, True])
    assert sorted([first, second, third]) == [[0], [1], [1]] or sorted([first, second, third]) == [[0], [0], [1]]
    assert token_batches(20, processes=2, lengths=[10, 10], has_images=[True, True]) in ([[[0]], [[1]]], [[[1]], [[0]]])


def test_a_row_longer_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="A row has 20 tokens, and `max_tokens_per_batch` is 19: give at least"):
        token_batches(19, lengths=[10, 20], has_images=[True, True])


class GroupedTrainer(GroupedBatches, SFTTrainer):
    pass


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module")
def rows(processor):
    image = Image.new("RGB", (8, 8))
    texts = [f"question {i}: " + "what " * RNG.randrange(1, 20) for i in range(12)]
    messages = [{"role": Value("string"), "content": Value("string")}]
    dataset = Dataset.from_dict(
        {
            "images": [[image] if i % 2 else [] for i in range(12)],
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "completion": [[{"role": "assistant", "content": "red"}] for _ in texts],
        },
        features=Features({"images": List(ImageFeature()), "prompt": messages, "completion": messages}),
    )
    return fit_rows(dataset, processor, max_length=None)[0]


def make_trainer(make_student, processor, rows, folder, stop=None, **options):
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        train_sampling_strategy="group_by_length",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=4,
        seed=3,
        **options,
    )
    trainer = GroupedTrainer(
        make_student(moe_layers=[]), args, train_dataset=rows, eval_dataset=rows, processing_class=processor
    )
    if stop:
        trainer.add_callback(StopsAt(stop))
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda examples: (
        seen.append([example["prompt"][0]["content"] for example in examples]) or collate(examples)
    )
    return trainer, seen


def test_a_trainer_groups_and_goes_on_where_it_stopped(make_student, processor, rows, tmp_path):
    numbers = {row["prompt"][0]["content"]: i for i, row in enumerate(rows.remove_columns("images"))}
    trainer, seen = make_trainer(make_student, processor, rows, tmp_path / "whole")
    trainer.train()
    assert len(seen) == 6  # 12 rows, twice
    for epoch in (seen[:3], seen[3:]):
        assert {text for batch in epoch for text in batch} == set(numbers)
        assert sum(len({numbers[text] % 2 for text in batch}) > 1 for batch in epoch) <= 1
    assert seen[:3] != seen[3:]

    cut, before = make_trainer(make_student, processor, rows, tmp_path / "cut", stop=4)
    cut.train()
    resumed, after = make_trainer(make_student, processor, rows, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert before[:4] + after[-2:] == seen

    evaluated = len(after)
    resumed.evaluate()
    assert [text for batch in after[evaluated:] for text in batch] == list(numbers)


def test_rows_that_were_not_measured_are_refused(make_student, processor, rows, tmp_path):
    trainer, _ = make_trainer(make_student, processor, rows.remove_columns("length"), tmp_path)
    with pytest.raises(ValueError, match="the rows have no length: pass them through `fit_rows`"):
        trainer.get_train_dataloader()


def test_another_strategy_is_the_parents(make_student, processor, rows, tmp_path):
    trainer, _ = make_trainer(make_student, processor, rows, tmp_path)
    trainer.args.train_sampling_strategy = "sequential"
    assert list(trainer._get_train_sampler()) == list(range(12))


def test_the_parents_methods_are_as_they_were():
    assert list(inspect.signature(Trainer._get_train_sampler).parameters) == ["self", "train_dataset"]
    assert list(inspect.signature(Trainer._get_eval_sampler).parameters) == ["self", "eval_dataset"]
    assert "self._train_batch_size" in inspect.getsource(Trainer.get_train_dataloader)
    # a sampler of whole batches of one process, known by this class alone
    loader = inspect.getsource(Trainer._get_dataloader)
    assert "if isinstance(sampler, BatchRebalanceSampler):" in loader and '["batch_sampler"] = sampler' in loader
    assert "prepared_bs.num_processes = 1" in loader
