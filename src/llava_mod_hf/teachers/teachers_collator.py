"""The student's tensors of a batch, and with them what each teacher makes of the same rows."""


class TeachersCollator:
    """
    The student's collator, and after it each teacher's own tensors under `teacher_<i>`.

    Args:
        collator: makes the student's tensors.
        teachers (`list`): each with `collate(examples, batch)`.
        keep_examples (`bool`): whether the rows themselves are passed on, for the student to answer.
    """

    def __init__(self, collator, teachers, keep_examples):
        self.collator, self.teachers, self.keep_examples = collator, teachers, keep_examples

    def __call__(self, examples):
        # TRL's collator writes into the rows
        batch = dict(self.collator([dict(example) for example in examples]))
        own = [teacher.collate(examples, batch) for teacher in self.teachers]
        batch.update({f"teacher_{i}": tensors for i, tensors in enumerate(own) if tensors})
        return {**batch, "examples": examples} if self.keep_examples else batch
