"""Which tokens of a response two chat templates have in common: the positions that a teacher can speak about."""

import itertools
from collections import Counter

import torch
from torch.nn import functional as F

from llava_mod_hf.losses.rows import shift_for_next_token

ALIGNMENT_VERSION = 2  # to be raised with every change of which positions `align_labels` finds: caches hold them

# Of the words of the sampled responses, the share that may lack a counterpart in the teacher's: a template that puts a
# space before the answer costs its first token, which is a small part of a sentence and all of a one-word answer.
MAX_UNALIGNED = 0.25


def align_response(ours, theirs):
    """
    Which tokens of a response stand at the same place of the text for both templates.

    A template may put a space before the answer, or end the turn in its own way. The shift in characters that most
    tokens agree upon is taken; tokens that then differ, or are cut differently, have no counterpart.

    Args:
        ours, theirs (`list[str]`): the tokens of one response, as the tokenizer spells them.

    Returns:
        `list[tuple[int, int]]`: places in `ours` and in `theirs`, in order.
    """
    starts, their_starts = ([0, *itertools.accumulate(map(len, tokens))] for tokens in (ours, theirs))
    places: dict[str, list[int]] = {}
    for place, token in enumerate(theirs):
        places.setdefault(token, []).append(place)
    shifts = Counter(starts[i] - their_starts[j] for i, token in enumerate(ours) for j in places.get(token, ()))
    if not shifts:
        return []
    # a word that is repeated agrees with itself upon several: the smallest is the template's
    shift = min(shifts, key=lambda value: (-shifts[value], abs(value)))
    at = {start + shift: j for j, start in enumerate(their_starts[:-1])}
    return [(i, j) for i, token in enumerate(ours) if (j := at.get(starts[i])) is not None and theirs[j] == token]


def align_labels(labels, their_labels, tokenizer):
    """
    The positions that predict the same token of the same response, for the student and for the teacher.

    Args:
        labels (`torch.LongTensor` of shape `(batch, sequence)`): the student's, unshifted; −100 is not supervised.
        their_labels (`torch.LongTensor` of shape `(batch, teacher sequence)`): the teacher's of the same rows.
        tokenizer (`PreTrainedTokenizerBase`): what both are made by.

    Returns:
        `tuple[torch.BoolTensor, torch.BoolTensor]`: of the shapes of `labels` and `their_labels`, with equally many
        marked positions, in the same order. Of a row with another number of responses, as `max_length` cuts the
        student's last ones, the first are marked as long as their texts are the same.
    """
    aligned, keep = (torch.zeros_like(values, dtype=torch.bool) for values in (labels, their_labels))
    for row in range(len(labels)):
        runs, their_runs = _responses(labels[row]), _responses(their_labels[row])
        for (start, ids), (their_start, their_ids) in _common_responses(runs, their_runs, tokenizer):
            pairs = align_response(tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(their_ids))
            for i, j in pairs:
                # the position before a token predicts it; nothing predicts the first of a sequence
                if start + i and their_start + j:
                    aligned[row, start + i - 1] = True
                    keep[row, their_start + j - 1] = True
    return aligned, keep


def _common_responses(runs, their_runs, tokenizer):
    """Pairs of runs that are the same turn's."""
    pairs = list(zip(runs, their_runs, strict=False))
    if len(runs) == len(their_runs):
        return pairs
    return list(itertools.takewhile(lambda pair: _same_text(*(ids for _, ids in pair), tokenizer), pairs))


def _same_text(ids, their_ids, tokenizer):
    """Whether one response begins with the other: the last may be cut, and a template may write its own end."""
    texts = (tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in (ids, their_ids))
    shorter, longer = sorted(texts, key=len)
    return longer.startswith(shorter) and bool(shorter) == bool(longer)


def check_responses(labels, their_labels, tokenizer):
    """
    Refuses a teacher whose responses are not the student's.

    Args:
        labels, their_labels (`torch.LongTensor`), tokenizer (`PreTrainedTokenizerBase`): as for [`align_labels`].

    Returns:
        `float`: share of the response tokens, ends of turns included, that have no counterpart.

    Raises:
        ValueError: if more than `MAX_UNALIGNED` of the words, special tokens apart, have none.
    """
    aligned, _ = align_labels(labels, their_labels, tokenizer)
    keep, targets = shift_for_next_token(labels)
    missing = ~aligned[keep]
    words = ~torch.isin(targets, torch.tensor(tokenizer.all_special_ids, device=targets.device))
    share = (missing & words).sum().item() / max(1, words.sum().item())
    if share > MAX_UNALIGNED:
        row, place = (keep & ~aligned).nonzero()[0].tolist()
        runs, their_runs = _responses(labels[row]), _responses(their_labels[row])
        number = sum(start <= place + 1 for start, _ in runs) - 1
        ours, theirs = (tokenizer.decode(each[number][1]) if number < len(each) else "" for each in (runs, their_runs))
        raise ValueError(
            f"{share:.0%} of the words of the responses have no counterpart in the teacher's, and at most "
            f"{MAX_UNALIGNED:.0%} may: the first differing response is {ours!r} for the student and {theirs!r} for the "
            "teacher, so make the chat templates write the answers alike."
        )
    return missing.sum().item() / max(1, len(missing))


def _responses(labels):
    """`(start, token ids)` of each run of supervised positions of a row."""
    edges = F.pad((labels != -100).int(), (1, 1)).diff()
    starts, ends = ((edges == value).nonzero().flatten().tolist() for value in (1, -1))
    return [(start, labels[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]
