"""`llava-mod publish`: write a whole Hub repository, and push it."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from llava_mod_hf.publishing.destination import check_names
from llava_mod_hf.publishing.family import add_to_collection
from llava_mod_hf.publishing.harness_results import read_harness_results
from llava_mod_hf.publishing.provenance import RESULTS_FILE, RUN_FILE, gather_facts, read_fields, stage_runs
from llava_mod_hf.publishing.push import push_checkpoint
from llava_mod_hf.publishing.repository import publish

OPTIONS = ("commands.publish:PublishCommand",)

PUSHED = ("private", "revision", "mirror", "tag", "gated")  # options of the push

logger = logging.getLogger(__name__)


@dataclass
class PublishCommand:
    """
    Args:
        checkpoint (`str`): output folder of a stage, with the `results.json` of `llava-mod evaluate`.
        output_dir (`str`): where the repository is built.
        push_to (`str`, *optional*): Hub repository that it is pushed to, in one commit.
        private (`bool`, *optional*, defaults to `False`): create that repository private.
        revision (`str`, *optional*): branch to push to.
        mirror (`bool`, *optional*, defaults to `False`): delete the repository's files that others put there.
        tag (`str`, *optional*): name for the commit, which stays when others follow.
        gated (`str`, *optional*): `auto` or `manual`: who downloads has to ask, and is let in at once or by you.
        collection (`str`, *optional*): title of the owner's collection that it is put into, made if there is none.
        license (`str`, *optional*): of the weights, as the Hub names it; without it the card says that none was stated.
        harness_results (`list[str]`, *optional*): results of lm-eval and lmms-eval, files or folders, for the card.
    """

    checkpoint: str = field(metadata={"help": "output folder of a stage"})
    output_dir: str = field(metadata={"help": "where the repository is built"})
    push_to: str | None = None
    private: bool = False
    revision: str | None = None
    mirror: bool = False
    tag: str | None = None
    gated: str | None = None
    collection: str | None = None
    license: str | None = None
    harness_results: list[str] | None = None

    def __post_init__(self):
        check_names(revision=self.revision, tag=self.tag, gated=self.gated)
        unread = [
            name for name in (*PUSHED, "collection") if getattr(self, name) not in (None, False) and not self.push_to
        ]
        if unread:
            raise ValueError(
                f"`{unread[0]}` is {getattr(self, unread[0])!r}, which does nothing without `push_to`: give that too, "
                "or neither."
            )


def run(args: PublishCommand):
    """Builds the Hub repository of a trained student, and pushes it if a name is given."""
    checkpoint = Path(args.checkpoint)
    runs = stage_runs(checkpoint, log_history=list)
    if not runs:
        raise ValueError(f"`{checkpoint}` has no `{RUN_FILE}`: give the output folder of a finished stage.")
    if not (checkpoint / RESULTS_FILE).is_file():
        raise ValueError(f"`{checkpoint}` has no `{RESULTS_FILE}`: run `llava-mod evaluate --model …` on it.")
    loads = read_fields(checkpoint / RESULTS_FILE, student=dict, dataset=str, expert_load=dict)["expert_load"]
    for layer, shares in loads.items():
        if not (layer.isdigit() and isinstance(shares, list)):
            raise ValueError(
                f"`{layer}: {shares}` in the `expert_load` of `{RESULTS_FILE}` is no layer with its shares."
            )
    repo_id = args.push_to or Path(args.output_dir).name
    figures = read_harness_results(args.harness_results or [], [args.checkpoint, repo_id])
    folder = publish(
        checkpoint,
        args.output_dir,
        gather_facts(checkpoint, repo_id, license=args.license, harness_figures=figures),
        history={stage: run["log_history"] for stage, run in runs.items()},
        loads={int(layer): shares for layer, shares in loads.items()},
    )
    if args.push_to:
        commit = push_checkpoint(folder, args.push_to, **{name: getattr(args, name) for name in PUSHED})
        logger.warning("Pushed `%s` to %s.", folder, commit.commit_url)
        if args.collection:
            note = f"The last stage was {list(runs)[-1]}."
            address = add_to_collection(commit.repo_url.repo_id, args.collection, private=args.private, note=note)
            logger.warning("It is in the collection %s.", address)
    return folder
