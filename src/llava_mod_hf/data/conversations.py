"""Conversations of several answers: one row and one pass, of which every answer is supervised, or a row for each."""

import functools
import itertools
import logging

import torch
from datasets import Features, IterableDataset, Value
from jinja2 import TemplateError
from trl import apply_chat_template, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llava_mod_hf.data.formats import answer_places, each_answer, one_row, pictures_of
from llava_mod_hf.data.images import map_undecoded

ROWS = "rows"  # column: how many rows a row becomes

ADDED = ("length", "num_images")  # columns of a row's own, which are another's for its parts

SHOWN = 40  # characters of a text in a message

logger = logging.getLogger(__name__)


class RewrittenHistory(ValueError):
    """A chat template writes a turn otherwise once others follow, so no text holds all answers as they are asked."""


def supervises_answers(args, columns):
    """
    Whether the loss is on the answers alone: as TRL decides, but of rows of `messages` too.

    Args:
        args ([`~trl.SFTConfig`]): `completion_only_loss` and `assistant_only_loss`; `false` of the first supervises
            questions as well, and the second finds the answers by the template's `{% generation %}` marks.
        columns (`Iterable[str]`): of the rows.

    Returns:
        `bool`.
    """
    if args.completion_only_loss is None:
        return {"prompt", "completion"} <= set(columns) or ("messages" in columns and not args.assistant_only_loss)
    return args.completion_only_loss


def check_assistant_only(columns):
    """
    Refuses `assistant_only_loss` where TRL's collator would, at the first batch.

    Raises:
        ValueError: if the rows are not of `messages`.
    """
    if "messages" not in columns:
        raise ValueError(
            "`assistant_only_loss` is true, and it is of rows of `messages`, given in Python: leave it out, every "
            "answer of a conversation is supervised without it."
        )


def is_whole(row):
    """Whether a row's completion, messages, is more than an answer."""
    return isinstance(row.get("completion"), list) and len(row["completion"]) > 1


def as_answers(row):
    """A row of `messages` as one of `prompt` and `completion`, which begins with the first answer; others as is."""
    if row.get("messages") is None:
        return row
    return {**{name: value for name, value in row.items() if name != "messages"}, **one_row(row["messages"], "a row")}


def conversation_texts(row, images, processor):
    """
    What a conversation is as text, cut where answers begin and end.

    Each piece is that of TRL's row with this answer as its completion: what is supervised, end of turn included, is
    what it would be there.

    Args:
        row (`dict`): `prompt` and `completion`, messages; an answer in the prompt is not supervised.
        images (`list`): of the row, in the order of their turns.
        processor (`ProcessorMixin`): with the chat template.

    Returns:
        `list[str]`: what comes before an answer, and the answer, by turns.

    Raises:
        RewrittenHistory: if what came before an answer is not how the text of the whole begins.
        ValueError: if there is no answer, or one holds a picture.
    """
    first = len(row["prompt"])
    messages = prepare_multimodal_messages([*row["prompt"], *row["completion"]], images=images)
    places = answer_places(messages, first)
    if not places:
        raise ValueError("a row has no answer: give it one, or leave it out.")
    if any(part["type"] == "image" for place in places for part in messages[place].get("content") or ()):
        raise ValueError("an answer holds a picture: put it into a question.")
    options = {name: row[name] for name in ("chat_template_kwargs",) if row.get(name) is not None}
    texts, written = [], ""
    for place in places:
        turn = {"prompt": messages[:place], "completion": messages[place : place + 1]}
        turn = apply_chat_template({**turn, **options}, processor)
        if not turn["prompt"].startswith(written):
            pairs = zip(turn["prompt"], written, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise RewrittenHistory(
                f"the chat template writes a turn as {written[same:][:SHOWN]!r} that is "
                f"{turn['prompt'][same:][:SHOWN]!r} once others follow"
            )
        texts += [turn["prompt"][len(written) :], turn["completion"]]
        written = turn["prompt"] + turn["completion"]
    return texts


def expand_conversations(rows, processor, *, every=False, num_proc=None):
    """
    Rows for each answer of the conversations that one pass cannot read, since the chat template rewrites their history.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): of a trainer; other rows are left as they are.
        processor (`ProcessorMixin`): the student's.
        every (`bool`, *optional*, defaults to `False`): of all conversations, as `multi_turn: expand` asks.
        num_proc (`int`, *optional*): processes that render.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: `rows` itself if nothing is to be done.
    """
    names = rows.column_names or []
    texts = [name for name in ("prompt", "completion", "messages", "chat_template_kwargs") if name in names]
    if rows.features is None or not ("messages" in names or {"prompt", "completion"} <= set(names)):
        return rows
    told: list[str] = []
    streamed = isinstance(rows, IterableDataset)
    if not streamed:
        counted = map_undecoded(
            rows.select_columns(texts),
            functools.partial(_count, processor=processor, every=every),
            features=Features({ROWS: Value("int64"), "reason": Value("string")}),
            num_proc=num_proc,
            desc="Looking for conversations",
            remove_columns=texts,
        )
        if all(count == 1 for count in counted[ROWS][:]):
            return rows
        reasons = [reason for reason in counted["reason"][:] if reason is not None]
        if reasons:
            logger.warning(
                "%d of %d rows cannot be read in one pass and become a row for each answer, as with "
                "`multi_turn: expand`, since %s.",
                len(reasons),
                len(rows),
                reasons[0],
            )
            told.append(reasons[0])
    features = {name: feature for name, feature in rows.features.items() if name not in (*ADDED, "messages")}
    if "messages" in names:
        features |= dict.fromkeys(("prompt", "completion"), rows.features["messages"])
    found = map_undecoded(
        rows,
        functools.partial(_expand, names=list(features), processor=processor, every=every, told=told),
        features=Features(features),
        num_proc=num_proc,
        desc="Expanding conversations",
        remove_columns=[name for name in names if name not in features],
    )
    return found.decode() if streamed else found  # what a stream maps it takes for decoded


def _rows_of(row, processor, every):
    """`(rows, reason)`: what a row becomes, and why, if the chat template is to blame."""
    try:
        whole = as_answers(row)
        if not is_whole(whole):
            return [whole], None
        messages, first = [*whole["prompt"], *whole["completion"]], len(whole["prompt"])
        if not every and len(answer_places(messages, first)) > 1:
            pictures = [part for m in messages for part in _parts(m) if part["type"] == "image"]
            conversation_texts(whole, [None] * len(pictures), processor)
        turns, reason = each_answer(messages, first) if every else [], None
    except RewrittenHistory as error:
        turns, reason = each_answer(messages, first), str(error)
    except (ValueError, KeyError, TypeError, TemplateError):  # who reads the row says so
        return [row], None
    return [one_turn(whole, turn) for turn in turns] or [whole], reason


def one_turn(row, turn):
    """A conversation as a row of one of its turns ([`~llava_mod_hf.data.formats.each_answer`]), with its pictures."""
    return {**row, **turn, **({"images": pictures_of(turn["prompt"], row["images"])} if row.get("images") else {})}


def _parts(message):
    return message["content"] if isinstance(message["content"], list) else ()


def _as_rows(batch):
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _count(batch, indices, *, processor, every):
    found = [_rows_of(row, processor, every) for row in _as_rows(batch)]
    return {ROWS: [len(rows) for rows, _ in found], "reason": [reason for _, reason in found]}


def _expand(batch, indices, *, names, processor, every, told):
    found = []
    for row in _as_rows(batch):
        rows, reason = _rows_of(row, processor, every)
        if reason is not None and not told:
            told.append(reason)
            logger.warning(
                "A row cannot be read in one pass and becomes a row for each answer, as with `multi_turn: expand`, "
                "since %s; there may be more.",
                reason,
            )
        found += rows
    return {name: [row.get(name) for row in found] for name in names}


class AnswersCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator, of whose rows every answer is supervised: `messages`, or a `completion` of several turns.

    A row of one answer is TRL's own. A longer one is, for the parent, a row for each answer: what comes before it since
    the last one, with the pictures that are there, and the answer, each tokenised by itself. Put behind each other they
    are one row again, whose supervised tokens are those of a row for each answer. With `completion_only_loss=False` all
    is the parent's, except where a later turn has a picture.
    """

    def torch_call(self, examples):
        if self.completion_only_loss and not self.assistant_only_loss:
            examples = [as_answers(example) for example in examples]
        return super().torch_call(examples)

    def _collate_prompt_completion(self, examples):
        if not any(map(is_whole if self.completion_only_loss else _has_later_picture, examples)):
            return super()._collate_prompt_completion(examples)
        turns, counts = [], []
        for example in examples:
            try:
                found = self._turns(example)
            except RewrittenHistory as error:
                raise RewrittenHistory(
                    f"A conversation cannot be read in one pass, since {error}: take `multi_turn: expand`, which makes "
                    "a row of each answer, or another chat template."
                ) from error
            turns += found
            counts.append(len(found))
        batch = super()._collate_prompt_completion(turns)
        for name, values in self._joined(batch, counts).items():
            batch[name] = values[:, : self.max_length]
        return batch

    def _turns(self, example):
        """A row as one of texts for each answer: what comes before it, the answer, and the pictures of the former."""
        images = example["images"] if "images" in example else [example["image"]]
        texts, turns, start = conversation_texts(example, images, self.processor), [], 0
        for before, answer in zip(texts[::2], texts[1::2], strict=True):
            end = start + before.count(self.processor.image_token)
            turns.append({"prompt": before, "completion": answer, "images": images[start:end]})
            start = end
        if start != len(images):
            raise ValueError(
                f"a conversation has {len(images)} pictures, and its questions {start} places for them: mend the row."
            )
        return turns

    def _joined(self, batch, counts):
        """What the batch has for each token, the rows of each conversation (`counts` of them) behind each other."""
        mask = batch["attention_mask"].bool()
        groups = mask.sum(1).split(counts)
        width, fill = max(int(group.sum()) for group in groups), {"input_ids": self.processor.tokenizer.pad_token_id}
        found, fill = {}, fill | {"labels": -100}
        for name, values in batch.items():
            if torch.is_tensor(values) and values.shape == mask.shape:
                found[name] = values.new_full((len(counts), width), fill.get(name, 0))
                for row, own in enumerate(zip(values.split(counts), mask.split(counts), strict=True)):
                    tokens = own[0][own[1]]  # in order, row by row
                    found[name][row, : len(tokens)] = tokens
        return found


def _has_later_picture(row):
    return is_whole(row) and any(
        part.get("type") == "image" for message in row["completion"] for part in _parts(message)
    )
