"""What a student's routers do with the tokens of pictures, prompts and answers, and of each task, in one pass."""

from collections import Counter

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llava_mod_hf.evaluation.answers import response_batches
from llava_mod_hf.evaluation.expert_load import (
    MODALITIES,
    choices_of,
    count_choices,
    has_collapsed,
    modalities,
    router_figures,
    sum_entropy,
)
from llava_mod_hf.evaluation.generating import evaluating, inputs_for
from llava_mod_hf.students.router_bias import router_biases
from llava_mod_hf.students.stock_export import expert_weights

ROWS = 512  # of a data set, which say enough of the routers

PATHS = 10  # of those most often taken that are told


def sample(rows):
    """At most [`ROWS`] rows, from all over a data set: some have one task after the other."""
    return rows if len(rows) <= ROWS else rows.select([place * len(rows) // ROWS for place in range(ROWS)])


class _Sums:
    """
    Sums over the batches of a data set.

    Args:
        biases (`list`): of [`~llava_mod_hf.students.router_bias.router_biases`].
        num_experts, top_k (`int`): of each sparse layer.
        num_tasks (`int`).
    """

    def __init__(self, biases, num_experts, top_k, num_tasks):
        self.biases, self.num_experts, self.top_k = biases, num_experts, top_k
        self.num_groups, num_layers = len(MODALITIES) * num_tasks, len(biases)
        self.choices = torch.zeros(num_layers, self.num_groups, num_experts, dtype=torch.int64)
        self.entropy = torch.zeros(num_layers, self.num_groups, dtype=torch.float64)
        self.tokens = torch.zeros(self.num_groups, dtype=torch.int64)
        self.together = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.int64)
        self.paths = Counter()

    def note(self, router_logits, tokens_are, tasks):
        """
        Adds a batch.

        Args:
            router_logits (`tuple[torch.FloatTensor]`): per layer `(batch * sequence, experts)`.
            tokens_are (`torch.LongTensor` of shape `(batch * sequence,)`): as
                [`~llava_mod_hf.evaluation.expert_load.modalities`] says.
            tasks (`torch.LongTensor` of shape `(batch,)`): of each row.
        """
        counted = tokens_are < len(MODALITIES)
        groups = tasks.repeat_interleave(len(tokens_are) // len(tasks)) * len(MODALITIES) + tokens_are
        groups = groups[counted]
        router_logits = [logits.to(counted.device)[counted] for logits in router_logits]
        chosen = choices_of(router_logits, self.top_k, self.biases)  # of each layer (tokens, k)
        self.choices += count_choices(chosen, self.num_experts, groups, self.num_groups).cpu()
        self.entropy += sum_entropy(router_logits, groups, self.num_groups).cpu()
        self.tokens += torch.bincount(groups, minlength=self.num_groups).cpu()
        for layer, indices in enumerate(chosen):
            given = torch.zeros_like(router_logits[layer]).scatter_(1, indices, 1.0)  # (tokens, experts)
            self.together[layer] += (given.T @ given).long().cpu()
        paths, counts = torch.stack([indices[:, 0] for indices in chosen], dim=1).unique(dim=0, return_counts=True)
        self.paths.update(dict(zip(map(tuple, paths.tolist()), counts.tolist(), strict=True)))


def _figures(sums, layer, groups):
    """[`router_figures`] of some of the groups, or `None` without a token of theirs."""
    tokens = sums.tokens[groups].sum().item()
    if not tokens:
        return None
    return router_figures(sums.choices[layer, groups].sum(0).tolist(), sums.entropy[layer, groups].sum().item(), tokens)


def _split(sums, layer, groups_of):
    found = {name: _figures(sums, layer, groups) for name, groups in groups_of.items()}
    return {name: figures for name, figures in found.items() if figures is not None}


def _next_choices(paths, place, num_experts):
    """Rows: the first choice in a sparse layer; columns: that in the next one; shares of all tokens."""
    counts = [[0] * num_experts for _ in range(num_experts)]
    for path, count in paths.items():
        counts[path[place]][path[place + 1]] += count
    total = paths.total()
    return [[count / total for count in row] for row in counts]


@torch.no_grad()
def expert_distances(experts):
    """
    How far the experts of a layer have moved apart since upcycling, where it is 0: ‖W_e − W̄‖ / ‖W̄‖ over all weights of
    an expert. W̄ is the mean of the experts; the dense FFN that they began as is in no checkpoint.

    Args:
        experts (`LlavaModExperts` or `LlavaModLowRankExperts`): of a layer.

    Returns:
        `list[float]`, or `None` of quantised ones, whose steps are of the size of the differences.
    """
    parts = list(expert_weights(experts).values())
    if any(is_traceable_wrapper_subclass(part) or not part.is_floating_point() for part in parts):
        return None
    distances, norm = torch.zeros(experts.num_experts, dtype=torch.float64), 0.0
    for part in parts:
        mean = part.float().mean(dim=0)
        norm += mean.norm().item() ** 2
        distances += torch.tensor([(weight.float() - mean).norm().item() ** 2 for weight in part], dtype=torch.float64)
    return (distances / norm).sqrt().tolist()


def router_use(model, processor, dataset, *, tasks=None, batch_size=128):
    """
    What a student's routers do with every token of prompts, pictures and answers; padding makes no choice.

    Args:
        model (`LlavaModForConditionalGeneration`): a student; a dense one has no routers.
        processor (`ProcessorMixin`): its processor.
        dataset (`datasets.Dataset`): columns `images`, `prompt` and `completion`.
        tasks (`list[str]`, *optional*): of each row, by which the figures are told apart as well.
        batch_size (`int`, *optional*, defaults to 128).

    Returns:
        `dict`, empty for a dense model: `rows`; `tokens` of each of
        [`~llava_mod_hf.evaluation.expert_load.MODALITIES`]; `layers`, by index, each
        [`~llava_mod_hf.evaluation.expert_load.router_figures`], the same `by_modality` and, with tasks, `by_task`;
        `together`, the share of the tokens that chose both experts (on the diagonal: the one); `next_layer`, the share
        of the tokens whose first choices here and in the next sparse layer are those of row and column; and `distance`
        of [`expert_distances`]; `paths` of first choices through all layers, how many and which most often; and
        `collapsed`, the layers whose choice is the same for all tokens.
    """
    layers = getattr(model.config, "moe_layers", [])
    if not layers:
        return {}
    tasks = list(tasks or [""] * len(dataset))
    names = sorted(set(tasks))
    task_of = torch.tensor([names.index(task) for task in tasks])
    num_experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    sums, start = _Sums(router_biases(model), num_experts, top_k, len(names)), 0
    with evaluating(model):
        for batch in response_batches(processor, dataset, batch_size=batch_size, description="Counting choices"):
            outputs = model(**inputs_for(model, batch), output_router_logits=True, logits_to_keep=1)
            tokens_are = modalities(
                batch["input_ids"], batch["attention_mask"], batch["labels"] != -100, model.config.image_token_index
            )
            here, rows = outputs.router_logits[0].device, len(batch["input_ids"])
            sums.note(outputs.router_logits, tokens_are.to(here), task_of[start : start + rows].to(here))
            start += rows
    return {"rows": start, **_told(sums, layers, names, model)}


def _told(sums, layers, names, model):
    groups = torch.arange(sums.num_groups).view(len(names), len(MODALITIES))
    by_modality = dict(zip(MODALITIES, groups.T, strict=True))
    by_task = dict(zip(names, groups, strict=True)) if names != [""] else {}
    total, num_experts = sums.tokens.sum().item(), sums.choices.shape[-1]
    told = {}
    for place, layer in enumerate(layers):
        told[layer] = _figures(sums, place, groups.flatten())
        told[layer]["by_modality"] = _split(sums, place, by_modality)
        if by_task:
            told[layer]["by_task"] = _split(sums, place, by_task)
        told[layer]["together"] = (sums.together[place].double() / total).tolist()
        if place + 1 < len(layers):
            told[layer]["next_layer"] = _next_choices(sums.paths, place, num_experts)
        told[layer]["distance"] = expert_distances(model.model.language_model.layers[layer].mlp.experts)
    often = [{"experts": list(path), "share": count / total} for path, count in sums.paths.most_common(PATHS)]
    return {
        "tokens": {name: sums.tokens[places].sum().item() for name, places in by_modality.items()},
        "layers": told,
        "paths": {"distinct": len(sums.paths), "most_frequent": often},
        "collapsed": [layer for layer in layers if has_collapsed(told[layer]["load"], sums.top_k)],
    }


def loads_of(used):
    """
    Each expert's share of the choices; 1/E for each of E experts is perfect balance.

    Args:
        used (`dict`): of [`router_use`].

    Returns:
        `dict[int, list[float]]`: by index of the layer; empty for a dense model.
    """
    return {layer: figures["load"] for layer, figures in used.get("layers", {}).items()}
