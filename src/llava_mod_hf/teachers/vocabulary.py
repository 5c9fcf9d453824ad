"""Which tokens a teacher shares with its student; one that does not fit is refused."""

from llava_mod_hf.teachers.cached_teacher import CachedTeacher


def shared_vocab_size(student, teacher, processor, teacher_processor=None):
    """
    How many tokens the two models share: the rows of their heads that can be compared.

    Heads are often padded to a round number of rows; those beyond the tokenizers' own tokens mean nothing. Tokens that
    one tokenizer alone has, after all the others, such as an added `<image>`, are left out as well.

    Args:
        student, teacher (`PreTrainedModel`).
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's; without it the sizes have to be equal.

    Returns:
        `int` or `None`: the first ids that are shared; `None` if all of both heads are.

    Raises:
        ValueError: if a token has another id, or an id another token, for the teacher.
    """
    size, teacher_size = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if teacher_processor is None:
        if size != teacher_size:
            raise ValueError(
                f"The teacher's vocabulary has {teacher_size} entries and the student's {size}: distillation compares "
                "distributions over the same tokens, so give the teacher's processor too, which tells whether they "
                "differ in padding alone, or take a teacher and a language model of the same tokenizer."
            )
        return None
    ours, theirs = ({i: token for token, i in p.tokenizer.get_vocab().items()} for p in (processor, teacher_processor))
    shared = max(ours.keys() & theirs.keys(), default=-1) + 1
    for index in range(shared):
        if ours.get(index) != theirs.get(index):
            _refuse_token(ours.get(index) or theirs.get(index), index)
    names, their_names = set(ours.values()), set(theirs.values())
    for index, token in sorted([*ours.items(), *theirs.items()]):
        if index >= shared and token in names and token in their_names:
            _refuse_token(token, index)
    if shared > min(size, teacher_size):
        raise ValueError(
            f"The tokenizers share {shared} tokens, the student's head has {size} rows and the teacher's "
            f"{teacher_size}: a processor does not belong to its model."
        )
    return None if size == teacher_size and ours == theirs else shared


def compared_vocab_size(student, teachers, compat):
    """
    How many tokens the divergence compares: those that the student shares with all of its teachers.

    Args:
        student (`PreTrainedModel`).
        teachers (`list`): as [`~llava_mod_hf.teachers.protocol.Teacher`].
        compat ([`~llava_mod_hf.training.authors_behaviour.ReferenceCompat`]): may ask for fewer.

    Returns:
        `int`.

    Raises:
        ValueError: if a cache's probabilities are over other tokens, which nothing can normalise anew.
    """
    sizes = [teacher.shared_vocab_size for teacher in teachers if teacher.shared_vocab_size]
    size = compat.shared_vocab_size(min([student.config.get_text_config().vocab_size, *sizes]))
    for teacher in teachers:
        if isinstance(teacher, CachedTeacher) and teacher.shared_vocab_size not in (None, size):
            raise ValueError(
                f"The cache `{teacher.folder}` has probabilities over {teacher.shared_vocab_size} tokens, and the "
                f"first {size} are compared, which student, other teachers and `reference_vocab_size` allow: take the "
                "live teacher, or a cache for this student, and no smaller vocabulary beside it."
            )
    return size


def _refuse_token(token, index):
    raise ValueError(
        f"The tokenizers of teacher and student differ, first at token {token!r} with id {index}: take a teacher and "
        "a language model of the same tokenizer."
    )


def check_teacher(student, teacher, processor, teacher_processor=None):
    """
    Refuses a teacher that cannot read the very tensors that the student reads.

    Args:
        student, teacher (`PreTrainedModel`): LLaVA-like models.
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's; without it only the models are compared.

    Raises:
        ValueError: if vocabulary, image token or the number of image tokens differ.
    """
    shared_vocab_size(student, teacher, processor, teacher_processor)
    if teacher_processor is not None:
        vocabulary, other = processor.tokenizer.get_vocab(), teacher_processor.tokenizer.get_vocab()
        for token, index in sorted(vocabulary.items() ^ other.items(), key=lambda entry: (entry[1], entry[0])):
            _refuse_token(token, index)
    for name in ("image_token_id", "image_seq_length"):
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise ValueError(
                f"The teacher has `{name}` {theirs} and the student {ours}: both read the same token ids, so they must "
                "write the same placeholders for an image; or give the teacher's own processor."
            )
