"""What a trainer logs: its own sums, which a callback's logs leave alone."""

from collections import defaultdict
from typing import NamedTuple

import torch

from llava_mod_hf.losses.chunked_mimic import MimicTerms
from llava_mod_hf.losses.rows import shift_for_next_token

TOKENS = "num_tokens"  # of all processes, as TRL's trainers count them and ours


def kind_of_logs(logs):
    """
    What a call of `Trainer.log` is about.

    Args:
        logs (`dict`): what is to be logged.

    Returns:
        `tuple[str, str]` or `None`: `"train"` or `"eval"`, and what names begin with; `None` of a callback's own logs.
    """
    if "loss" in logs or "train_loss" in logs:
        return "train", ""
    losses = [name for name in logs if name.endswith("_loss")]
    return ("eval", min(losses, key=len).removesuffix("loss")) if losses else None


class KeepsMetrics:
    """Keeps TRL's metrics for the trainer's own logs: a callback's would be written with them, and clear them."""

    def log(self, logs, start_time=None):
        kept = self._metrics
        if kind_of_logs(logs) is None:
            self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            super().log(logs, start_time)
        finally:
            self._metrics = kept


class BatchTerms(NamedTuple):
    """
    What the loss of a batch is made of.

    Args:
        terms ([`~llava_mod_hf.losses.chunked_mimic.MimicTerms`]).
        router (`tuple[torch.FloatTensor, torch.FloatTensor]`, *optional*): load-balancing loss and z-loss.
        labels (`torch.LongTensor` of shape `(batch, sequence)`): −100 in rows that do not count, too.
        rows (`int`): how many of them count, which are the first.
        unaligned (`list[torch.LongTensor]`): per teacher the supervised tokens that it says nothing about.
    """

    terms: MimicTerms
    router: tuple | None
    labels: torch.Tensor
    rows: int
    unaligned: list


class MimicLog:
    """
    Sums of this process over the batches since the last log, and the ratios that are logged of all processes' sums.

    TRL averages per-batch means; these count each token once.

    Args:
        args ([`~llava_mod_hf.MimicConfig`]).
        teacher_weights (`list[float]`): one per teacher.
    """

    def __init__(self, args, teacher_weights):
        self.args, self.teacher_weights = args, teacher_weights
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._read = 0  # tokens of all training batches

    def note(self, mode, batch, *, on_policy=False, tokens_read=0):
        """
        Adds a batch, if any of its rows counts.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            batch ([`BatchTerms`]).
            on_policy (`bool`, *optional*, defaults to `False`): whether its labels are the student's own answers.
            tokens_read (`int`, *optional*, defaults to 0): of the batch, prompts and images too, in training.

        Returns:
            `int`: rows without a supervised token.
        """
        self._read += tokens_read
        if not batch.rows:
            return 0
        sums, terms = self._sums[mode], batch.terms
        keep, targets = shift_for_next_token(batch.labels[: batch.rows])
        empty = int((~keep.any(1)).sum())
        sums["empty"] += empty
        sums["batches"] += 1
        sums["tokens"] += len(targets)
        sums["entropy"] += terms.entropy
        for i, (kl, unaligned) in enumerate(zip(terms.kl, batch.unaligned, strict=True)):
            sums[f"kl_{i}"] += kl
            sums["unaligned"] += unaligned / len(batch.unaligned)
        if on_policy:
            sums["on_policy"] += 1
        else:
            sums["labels"] += len(targets)
            sums["lm"] += terms.lm
            sums["correct"] += terms.correct
        for name, value in zip(("aux", "z"), batch.router or (), strict=False):
            sums[name] += value.detach()
        return empty

    def take(self, mode, accelerator, router_term=None):
        """
        What is logged of a mode; its sums start anew.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            accelerator (`Accelerator`): that adds the sums of all processes, which have to call this together.
            router_term (`callable`, *optional*): the term of the loss, from load-balancing loss and z-loss.

        Returns:
            `dict[str, float]`: empty without a token since the last time.
        """
        sums = self._sums[mode]
        names = [f"kl_{i}" for i in range(len(self.teacher_weights))]
        names += ["lm", "correct", "entropy", "tokens", "labels", "unaligned"]
        names += ["aux", "z", "batches", "empty", "on_policy"]
        local = torch.tensor([float(sums[name]) for name in names], device=accelerator.device)
        total = dict(zip(names, accelerator.reduce(local).tolist(), strict=True))
        # in whole numbers, as it only grows
        read = accelerator.reduce(torch.tensor(self._read, device=accelerator.device)).item()
        sums.clear()
        if not total["tokens"]:
            return {}
        return {**self._terms(total, router_term), "num_tokens": read}

    def _terms(self, total, router_term):
        tokens, count = total["tokens"], len(self.teacher_weights)
        terms = {"loss": self.args.lm_weight * total["lm"] / tokens, "entropy": total["entropy"] / tokens}
        if total["labels"]:
            terms["lm_loss"] = total["lm"] / total["labels"]
            terms["mean_token_accuracy"] = total["correct"] / total["labels"]
        divergences = [total[f"kl_{i}"] / tokens for i in range(count)]
        if divergences:
            terms["kl"] = sum(w * value for w, value in zip(self.teacher_weights, divergences, strict=True))
            terms["loss"] += self.args.kl_weight * terms["kl"]
        if count > 1:
            terms.update({f"kl_teacher_{i}": value for i, value in enumerate(divergences)})
        if router_term is not None:
            terms["aux_loss"], terms["z_loss"] = (total[name] / total["batches"] for name in ("aux", "z"))
            terms["loss"] += router_term(terms["aux_loss"], terms["z_loss"])
        if total["empty"]:
            terms["rows_without_tokens"] = total["empty"]
        if total["unaligned"]:
            terms["unaligned"] = total["unaligned"] / tokens
        if self.args.on_policy_share:
            terms["on_policy"] = total["on_policy"] / total["batches"]
        return terms
