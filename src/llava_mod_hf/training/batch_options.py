"""Options of the batches of a stage whose loss is a sum over tokens."""

import dataclasses
from dataclasses import dataclass


@dataclass
class BatchOptions:
    """
    Args:
        max_tokens_per_batch (`int`, *optional*):
            Tokens that a process reads at a time, padding included: a batch has as many rows of similar length as these
            hold, in place of `per_device_train_batch_size`. With `train_sampling_strategy: group_by_length`.
    """

    max_tokens_per_batch: int | None = None


def check_batches(args):
    """
    Raises:
        ValueError: if `max_tokens_per_batch` is below 1, or beside an option of batches of as many rows each.
    """
    budget = args.max_tokens_per_batch
    if budget is None:
        return
    if budget < 1:
        raise ValueError(f"`max_tokens_per_batch` is {budget}: give at least 1, or leave it out.")
    defaults = {item.name: item.default for item in dataclasses.fields(args)}
    for name in ("per_device_train_batch_size", "auto_find_batch_size", "dataloader_drop_last"):
        if getattr(args, name) != defaults[name]:
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, which does nothing with `max_tokens_per_batch`, whose batches "
                f"have as many rows as its tokens hold: give one of the two; {defaults[name]!r} is the default."
            )
