"""Options of pushes to the Hub, apart from what does them, so that `--help` need not import that."""

from dataclasses import dataclass, field

from llava_mod_hf.publishing.destination import check_names


@dataclass
class HubOptions:
    """
    Where a stage is pushed with `push_to_hub`, beside [`~transformers.TrainingArguments`]' `hub_model_id`,
    `hub_revision` (a branch, begun from `main` if missing), `hub_private_repo` and `hub_strategy`.

    Args:
        hub_tag (`str`, *optional*): name for the commit of the finished stage, which stays when others follow.
        hub_gated (`str`, *optional*):
            `"auto"` or `"manual"`: who downloads has to ask, and is let in at once or by you.
    """

    hub_tag: str | None = field(default=None)
    hub_gated: str | None = field(default=None)


def check_hub(args):
    """
    Raises:
        ValueError: if a name is none that the Hub takes, or nothing would read it.
    """
    for name in ("hub_tag", "hub_gated"):
        if getattr(args, name) is not None and not args.push_to_hub:
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, which does nothing without `push_to_hub`: give that too, or "
                "neither."
            )
    check_names(revision=args.hub_revision, tag=args.hub_tag, gated=args.hub_gated)
