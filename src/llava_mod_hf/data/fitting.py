"""Rows that a model can train on: inside its context, with something to learn; the others are counted and left out."""

import functools
import json
import logging

from datasets import Features, IterableDataset, Value
from jinja2 import TemplateError
from PIL import Image as PILImage
from trl import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llava_mod_hf.data.conversations import as_answers, check_assistant_only, conversation_texts, expand_conversations
from llava_mod_hf.data.dropped_rows import MALFORMED, DroppedRows
from llava_mod_hf.data.formats import check_answer, check_pair
from llava_mod_hf.data.image_files import shown_size
from llava_mod_hf.data.images import filter_undecoded, map_undecoded
from llava_mod_hf.data.marks import check_marks, marks_of
from llava_mod_hf.data.mixture import SOURCE, Readings, row_name, source_names

LENGTH, NUM_IMAGES, REASON, TOLD = "length", "num_images", "reason", "told"

COLUMNS = ("images", "prompt", "completion", "chosen", "rejected", "messages", "source_row", SOURCE)

REASONS = {
    "too_long": "longer than `max_length`",
    "unsupervised": "without a supervised token",
    "ties": "pairs of equal answers",
    MALFORMED: "malformed",
}

SENTENCES = {  # of a row, behind its name; a malformed one has its own
    "too_long": " has {} tokens, and `max_length` is {}.",
    "unsupervised": " has no supervised token.",
    "ties": " is a pair of equal answers.",
}

MEASURED = Features(
    {LENGTH: Value("int64"), NUM_IMAGES: Value("int64"), REASON: Value("string"), TOLD: Value("string")}
)

MAX_SEEN = 4096

NOTED = 10_000  # rows whose reasons are in memory at a time

TEXTS = ("prompt", "messages", "text", "completion")  # where a row's images are, the last for those of later turns

CHECKED_ROWS = 8  # of a stream, whose rows are read when they are trained on

logger = logging.getLogger(__name__)


def fit_rows(
    rows,
    processor,
    *,
    max_length,
    multi_turn="whole",
    assistant_only_loss=False,
    bad_rows="error",
    num_proc=None,
    dropped=None,
):
    """
    Leaves out the rows that training would cut, skip or learn nothing from.

    A row's length is what the trainer's collator makes of it: all tokens of its template, an image with all its tokens,
    and of a pair the longer answer. TRL cuts longer rows at `max_length`, through image tokens or to an empty answer.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`):
            `images` with `prompt` and `completion`, `messages`, or `prompt`, `chosen` and `rejected`.
        processor (`ProcessorMixin`): the student's.
        max_length (`int` or `None`): tokens of the context; `None` for no limit.
        multi_turn (`str`, *optional*, defaults to `"whole"`):
            A conversation of several answers stays one row unless the chat template rewrites its history, or
            `"expand"` asks for a row for each: [`~llava_mod_hf.data.conversations.expand_conversations`].
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            As the trainer's, of rows of `messages`: the template's `{% generation %}` marks say what is supervised.
        bad_rows (`str`, *optional*, defaults to `"error"`): `"drop"` counts malformed rows and goes on.
        num_proc (`int`, *optional*): processes that tokenise.
        dropped ([`~llava_mod_hf.data.dropped_rows.DroppedRows`], *optional*):
            Where the rows that are left out are written down, by default nowhere, and which share of malformed ones is
            too many, by default more than 1 %. Rows left out for another reason are no part of it.

    Returns:
        `tuple[Dataset, dict]`: the rows that are left, with `length` (tokens) and `num_images`, by which batches are
        grouped; and `{"rows", "longest", "too_long", "unsupervised", "ties", "bad"}`: how many rows there were, tokens
        of the longest, and how many were left out for each reason. Of a stream it counts what was read so far.

    Raises:
        ValueError: if a row is malformed (an empty answer, placeholders that do not fit its images, images inside an
            answer, a missing part), if no row is left, or more are malformed than may be.
    """
    if assistant_only_loss:
        check_assistant_only(rows.column_names)
    else:
        rows = expand_conversations(rows, processor, every=multi_turn == "expand", num_proc=num_proc)
    names = rows.column_names
    measure = functools.partial(
        _measure_batch,
        processor=processor,
        image_tokens=image_token_counter(processor),
        max_length=max_length,
        by_marks=assistant_only_loss,
        bad_rows=bad_rows,
        names=source_names(rows),
        seen={},  # text → what is known of it: short questions and answers come again and again
    )
    readings = Readings(rows, DroppedRows() if dropped is None else dropped)
    report = {"rows": 0, "longest": 0, **dict.fromkeys(REASONS, 0)}
    if isinstance(rows, IterableDataset):
        return _fit_stream(rows, measure, report, readings), report

    texts = [name for name in COLUMNS if name in names]
    measured = map_undecoded(
        rows.select_columns(texts),
        measure,
        features=MEASURED,
        num_proc=num_proc,
        desc="Measuring rows",
        remove_columns=texts,
    )
    return _without_left_out(rows, measured, readings, report, max_length), report


def _without_left_out(rows, measured, readings, report, max_length):
    """The rows that have no reason to be left out, with what was measured of them; counts in the `report`."""
    lengths, reasons = measured[LENGTH][:], measured[REASON][:]
    report |= {"rows": len(lengths), "longest": max(lengths, default=0)}
    report |= {reason: reasons.count(reason) for reason in REASONS}
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    left_out = [f"{report[reason]} {text}" for reason, text in REASONS.items() if report[reason]]
    if left_out:
        _note(rows, measured, readings)
        sentence = f"{', '.join(left_out)} ({max_length}; the longest has {report['longest']} tokens)"
        if not kept:
            raise ValueError(
                f"None of the {len(lengths)} rows can be trained on: {sentence}. Raise `max_length`, or mend the rows."
            )
        logger.warning("Left out of %d rows: %s.", len(lengths), sentence)
        readings.judge()
    rows = rows.remove_columns([name for name in (LENGTH, NUM_IMAGES) if name in rows.column_names])
    rows = rows.add_column(LENGTH, lengths).add_column(NUM_IMAGES, measured[NUM_IMAGES][:])
    return rows if len(kept) == len(lengths) else rows.select(kept)


def _note(rows, measured, readings):
    """Writes down the rows that are left out."""
    place = 0
    for batch in measured.select_columns([REASON, TOLD]).iter(NOTED):
        known = readings.known(rows, range(place, place + len(batch[REASON])))
        for row, reason, told in zip(known, batch[REASON], batch[TOLD], strict=True):
            readings.note(place, row, reason, told)
            place += 1


def _fit_stream(rows, measure, report, readings):
    def keep(length, reason, told, *known):
        *known, place = known
        readings.note_streamed(place, dict(zip(readings.columns, known, strict=True)), reason, told)
        report["rows"] += 1
        report["longest"] = max(report["longest"], length)
        if reason is not None:
            report[reason] += 1
            if report[reason] == 1:
                logger.warning("Left out a row that is %s (%d tokens); there may be more.", REASONS[reason], length)
        return reason is None

    def measure_all(batch, indices):
        return {**batch, **measure(batch, indices)}

    rows = map_undecoded(rows, measure_all, features=Features({**rows.features, **MEASURED}), batch_size=16)
    columns = [LENGTH, REASON, TOLD, *readings.columns]
    rows = filter_undecoded(rows, keep, input_columns=columns, with_indices=True)
    return rows.remove_columns([REASON, TOLD])


def check_images_fit(rows, processor, *, max_length, num_proc=None):
    """
    Refuses a `max_length` that cuts through an image's tokens, which the model would find out at some step.

    For rows that did not go through [`fit_rows`], which leaves them out. A row without images, or one whose answer
    alone is cut, is as TRL has it. Of a stream the first rows are measured.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`).
        processor (`ProcessorMixin`): the student's.
        max_length (`int` or `None`): tokens of the context; `None` for no limit.
        num_proc (`int`, *optional*): processes that tokenise.

    Raises:
        ValueError: naming the first such row, and how many tokens would do.
    """
    names = rows.column_names or []
    images = next((name for name in ("images", "image") if name in names), None)
    streamed = isinstance(rows, IterableDataset)
    if max_length is None or images is None:
        return
    if LENGTH in names and (streamed or max(rows[LENGTH], default=0) <= max_length):
        return
    rows = rows.take(CHECKED_ROWS) if streamed else rows
    measured = map_undecoded(
        rows.select_columns([images, *(name for name in TEXTS if name in names)]),
        functools.partial(_image_ends, images=images, processor=processor, image_tokens=image_token_counter(processor)),
        features=Features({LENGTH: Value("int64")}),
        num_proc=num_proc,
        desc="Measuring images",
        remove_columns=[name for name in names if name in (images, *TEXTS)],
    )
    ends = [row[LENGTH] for row in measured]
    longest = max(range(len(ends)), key=ends.__getitem__, default=None)
    if longest is not None and ends[longest] > max_length:
        count = sum(end > max_length for end in ends)
        raise ValueError(
            f"`max_length` is {max_length}, which cuts through the images of {count} of the {len(ends)} rows; those of "
            f"row {longest} end at token {ends[longest]}: give at least that, or leave such rows out with "
            "`llava_mod_hf.data.fitting.fit_rows`."
        )


def _image_ends(batch, indices, *, images, processor, image_tokens):
    """Tokens of each row up to the last one of its images; 0 of a row without any, or that no template fits."""
    ends = []
    for place, found in enumerate(batch[images]):
        found = found if isinstance(found, list) else [found] if found else []
        text = next((batch[name][place] for name in TEXTS[:-1] if name in batch), "")
        try:
            if found and not isinstance(text, str):
                text = [*text, *_later_turns(batch, place)]
                messages = prepare_multimodal_messages(text, images=[None] * len(found))
                text = processor.apply_chat_template(messages, tokenize=False)
        except (ValueError, KeyError, TypeError, TemplateError):  # the collator says so of a row that is read
            text = ""
        before, mark, _ = text.rpartition(processor.image_token) if found else ("", "", "")
        if not mark:
            ends.append(0)
            continue
        tokens = processor.tokenizer(before + mark, add_special_tokens=False)["input_ids"]
        ends.append(len(tokens) + sum(image_tokens(image) - 1 for image in found))
    return {LENGTH: ends}


def _later_turns(batch, place):
    """A conversation's turns from its first answer on, if one of them has a picture."""
    turns = batch["completion"][place] if "completion" in batch else None
    parts = [m.get("content") for m in turns if isinstance(m.get("content"), list)] if isinstance(turns, list) else []
    return turns if any(part.get("type") == "image" for each in parts for part in each) else []


def image_token_counter(processor):
    """
    How many tokens an image becomes.

    Returns:
        `Callable[[dict], int]`: of an undecoded image. Only for a processor whose count depends on the image's size is
        the image opened, and its header read.
    """

    @functools.lru_cache(maxsize=4096)
    def count(size):
        inputs = processor(images=[PILImage.new("RGB", size)], text=[processor.image_token], add_special_tokens=False)
        return len(inputs["input_ids"][0])

    if count((64, 64)) == count((64, 192)):
        return functools.partial(_constant, count((64, 64)))

    def of_image(image):
        return count(shown_size(image))

    return of_image


def _constant(value, _):
    return value


# parameters: what holds for all rows is bound once, and the rest is the batch
def _measure_batch(batch, indices, *, processor, image_tokens, max_length, bad_rows, seen, by_marks=False, names=()):
    """`length`, `num_images` and the reason to leave a row out, for a batch of rows with undecoded images."""
    columns = {name: values for name, values in batch.items() if name in COLUMNS}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if len(seen) > MAX_SEEN:
        seen.clear()
    keys, new = [], {}
    for row, index in zip(rows, indices, strict=True):
        texts = {name: value for name, value in row.items() if name not in ("images", "source_row", SOURCE)}
        num_images = len(row["images"] or [])
        key = json.dumps([num_images, texts], default=str)
        keys.append(key)
        if key not in seen and key not in new:
            where = row_name(row, index, names)
            try:
                new[key] = _render(texts, num_images, processor, where, by_marks)
            except ValueError as error:
                if bad_rows == "error":
                    raise
                seen[key] = str(error).removeprefix(where)  # the same of the next row of these texts
    seen |= zip(new, _count_tokens(list(new.values()), processor), strict=True)
    lengths, reasons, told = [], [], []
    for row, index, key in zip(rows, indices, keys, strict=True):
        length, reason = sum(image_tokens(image) - 1 for image in row["images"] or []), MALFORMED
        sentence = seen[key]
        if not isinstance(sentence, str):
            tokens, supervised, equal = seen[key]
            length += tokens
            too_long = max_length is not None and length > max_length
            reason = "ties" if equal else "unsupervised" if supervised == 0 else "too_long" if too_long else None
            sentence = SENTENCES.get(reason, "").format(length, max_length)
        lengths.append(length)
        reasons.append(reason)
        told.append(None if reason is None else row_name(row, index, names) + sentence)
    return {LENGTH: lengths, NUM_IMAGES: [len(row["images"] or []) for row in rows], REASON: reasons, TOLD: told}


def _count_tokens(rendered, processor):
    """For each row: its tokens, an image as one; those of its answers; whether both of a pair are equal."""
    texts = [text for row in rendered for text in row.values() if isinstance(text, str)]
    tokens = iter(processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    found = []
    for row in rendered:
        counts = {name: len(next(tokens)) if isinstance(text, str) else text for name, text in row.items()}
        if "supervised" in counts:
            found.append((counts["messages"], counts["supervised"], False))
        elif "chosen" in row:
            answers = counts["chosen"], counts["rejected"]
            found.append((counts["prompt"] + max(answers), min(answers), row["chosen"] == row["rejected"]))
        else:  # by turns, what comes before an answer and the answer
            found.append((sum(counts.values()), sum([*counts.values()][1::2]), False))
    return found


def _render(row, num_images, processor, where, by_marks):
    """The texts that the collator tokenises, an image as one token; of marked `messages` the numbers of tokens."""
    if "prompt" in row and not row["prompt"]:
        raise ValueError(f"{where} has no `prompt`: give it one, or leave out the row.")
    if "chosen" in row:
        check_pair(row, where)
    else:
        check_answer(row.get("messages") or row.get("completion"), where)
    if is_conversational(row):
        for messages in row.values():
            check_marks(messages, marks_of(processor), where)
        images = [None] * num_images
        try:
            if by_marks and "messages" in row:
                return _count_messages(prepare_multimodal_messages(row["messages"], images=images), processor)
            if "chosen" in row:
                row = apply_chat_template(
                    {
                        name: prepare_multimodal_messages(messages, images=images if name == "prompt" else None)
                        for name, messages in row.items()
                    },
                    processor,
                )
            else:
                texts = conversation_texts(as_answers(row), images, processor)
                row = {f"turn {i}" if i else "prompt": text for i, text in enumerate(texts)}
        except (ValueError, KeyError, TypeError, TemplateError) as error:
            raise ValueError(f"{where} does not fit the chat template: {error}") from error
    places = [text.count(processor.image_token) for text in row.values()]
    asked = places[:1] if "chosen" in row else places[::2]  # by turns, what comes before an answer and the answer
    if sum(asked) != num_images or sum(places) != num_images:
        raise ValueError(
            f"{where} has {num_images} images, and its texts do not name `{processor.image_token}` as often in the "
            "prompt and never in an answer: name it once for each image, or give messages, where the template does."
        )
    return row


def _count_messages(messages, processor):
    template = processor.chat_template
    if not has_generation_markers(template):
        template = get_training_chat_template(processor)  # TRL's own look-up, as in its trainer
    encoded = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return {"messages": len(encoded["input_ids"]), "supervised": sum(encoded["assistant_masks"])}
