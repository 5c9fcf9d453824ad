"""`llava-mod report`: the curves of runs side by side, with their last numbers and answers."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from llava_mod_hf.publishing.router_figure import ALL, draw_routers
from llava_mod_hf.publishing.run_figure import draw_runs, is_curve
from llava_mod_hf.publishing.summary_page import data_uri, fill_template
from llava_mod_hf.training.logs import TOKENS
from llava_mod_hf.training.run_history import read_run

OPTIONS = ("commands.report:ReportCommand",)

POSITIONAL = "runs"  # what first arguments without a name are

TEMPLATE = Path(__file__).parents[1] / "publishing" / "run_page.html.j2"

SHOWN = 50  # example answers on the page

logger = logging.getLogger(__name__)


@dataclass
class ReportCommand:
    """
    Args:
        runs (`list[str]`): folders of runs, finished or not, of checkpoints of them, or of students that `evaluate`
            has measured.
        output (`str`, *optional*): folder for `report.html`, `report.png` and `report_routers.png`; of one run, its
            own by default.
    """

    runs: list[str] = field(default_factory=list)
    output: str | None = None

    def __post_init__(self):
        if not self.runs:
            raise ValueError("There is no run to report on: give the `output_dir` of one or more.")
        resolved = [Path(run).resolve() for run in self.runs]
        twice = [run for run, path in zip(self.runs, resolved, strict=True) if resolved.count(path) > 1]
        if twice:
            raise ValueError(f"`{twice[0]}` stands twice among the runs: give it once.")
        if self.output is None and len(self.runs) > 1:
            raise ValueError(f"There are {len(self.runs)} runs: give the folder for their report as `output`.")
        if self.output is not None and Path(self.output).is_file():
            raise ValueError(f"`output` is `{self.output}`, which is a file: give a folder.")


def names_of(folders):
    """`list[str]`: of each run, its folder's name, or the whole path where another has the same."""
    names = [Path(folder).resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _number(value):
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def last_numbers(runs):
    """
    Args:
        runs (`dict[str, RunHistory]`): by name.

    Returns:
        `list[tuple[str, list[str]]]`: what it is, and each run's.
    """
    found = []
    if any(run.steps for run in runs.values()):
        found.append(("steps", [f"{_number(run.steps)}{_of(run)}" for run in runs.values()]))
    for name in ("seconds", "seconds_per_step"):
        if any(run.finished for run in runs.values()):
            found.append((name.replace("_", " "), [_number(run.finished.get(name)) for run in runs.values()]))
    curves = [run.curves() for run in runs.values()]
    shown = {name for each in curves for name in each if is_curve(name) or name == TOKENS}
    names = sorted(shown, key=lambda name: (name.startswith("eval_"), name))
    return found + [
        (name, [_number(each[name][-1][1]) if name in each else _number(None) for each in curves]) for name in names
    ]


def _of(run):
    return f" of {_number(run.max_steps)}" if run.max_steps and run.max_steps > run.steps else ""


def options_of(runs):
    """Options that somebody chose, by [`last_numbers`]' layout; of several finished runs those that differ."""
    chosen = [run.finished.get("recipe") or {} for run in runs.values()]
    names = sorted({name for each in chosen for name in each} - {"output_dir"})  # which names the run
    rows = [(name, [json.dumps(each[name]) if name in each else "–" for each in chosen]) for name in names]
    return rows if len(runs) == 1 else [(name, cells) for name, cells in rows if len(set(cells)) > 1]


def last_routers(runs):
    """Rows of the table of routers: each run's layers at its last log."""
    rows = []
    for name, run in runs.items():
        for layer, figures in (run.routers[-1]["layers"] if run.routers else {}).items():
            rows.append([name, layer, *_router_cells(figures)])
    return rows


def _router_cells(figures):
    percent = [
        f"{100 * figures[name]:.3g}" if name in figures else "–" for name in ("dead_experts", "overloaded_experts")
    ]
    return [_percents(figures["load"]), _number(figures["load_entropy"]), _number(figures["entropy"]), *percent]


def _percents(shares):
    return ", ".join(f"{100 * share:.1f}" for share in shares)


def measured_routers(runs):
    """Rows of the table of what `evaluate` counted: each run's layers, of all tokens, each modality and each task."""
    rows = []
    for name, run in runs.items():
        for layer, figures in run.measured.get("layers", {}).items():
            groups = {ALL: figures, **figures["by_modality"], **figures.get("by_task", {})}
            rows += [[name, layer, group, *_router_cells(each)] for group, each in groups.items()]
    return rows


def measured_experts(runs):
    """Rows of the table of each layer's experts: how far they have moved apart, in percent, and whether all is lost."""
    return [
        [
            name,
            layer,
            "–" if figures["distance"] is None else _percents(figures["distance"]),
            "collapsed" if int(layer) in run.measured["collapsed"] else "",
        ]
        for name, run in runs.items()
        for layer, figures in run.measured.get("layers", {}).items()
    ]


def measured_paths(runs):
    """Rows of the table of the paths that were taken most often."""
    return [
        [
            name,
            " → ".join(map(str, path["experts"])),
            f"{path['share']:.1%}",
            _number(run.measured["paths"]["distinct"]),
        ]
        for name, run in runs.items()
        for path in run.measured.get("paths", {}).get("most_frequent", [])
    ]


def last_examples(runs):
    """
    Rows of the table of answers: question and expected answer, and what each run says at its last evaluation; questions
    of other runs' samples stand behind those of the first.
    """
    rows = {}
    for number, run in enumerate(runs.values()):
        step = max((line["step"] for line in run.examples), default=None)
        seen = {}  # a question may be asked of several pictures
        for line in (line for line in run.examples if line["step"] == step):
            asked = (line["set"], line["question"], line["answer"])
            seen[asked] = seen.get(asked, 0) + 1
            rows.setdefault((*asked, seen[asked]), ["–"] * len(runs))[number] = line["prediction"]
    return [[question, answer, *predictions] for (_, question, answer, _), predictions in rows.items()]


def run(args):
    """
    Writes `report.png` and `report.html` of one run or of several side by side, and of measured routers
    `report_routers.png`.

    Returns:
        `Path`: the page.

    Raises:
        ValueError: if a folder is no run, or has logged nothing.
    """
    histories = [read_run(folder) for folder in args.runs]
    runs = dict(zip(names_of(args.runs), histories, strict=True))
    output = Path(args.output or args.runs[0])
    output.mkdir(parents=True, exist_ok=True)
    picture, routers, page = output / "report.png", output / "report_routers.png", output / "report.html"
    curves = {name: history.curves() for name, history in runs.items() if history.logs}
    measured = {name: history.measured for name, history in runs.items() if history.measured}
    if curves:
        draw_runs(curves, {name: history.routers for name, history in runs.items()}, picture)
    if measured:
        draw_routers(measured, routers)
    examples = last_examples(runs)
    fill_template(
        TEMPLATE,
        page,
        title=", ".join(runs),
        picture=data_uri(picture.read_bytes()) if curves else None,
        names=list(runs),
        numbers=last_numbers(runs),
        options=options_of(runs),
        options_title="Options that were given" if len(runs) == 1 else "Options that differ",
        routers=last_routers(runs),
        routers_picture=data_uri(routers.read_bytes()) if measured else None,
        measured=measured_routers(runs),
        experts=measured_experts(runs),
        paths=measured_paths(runs),
        examples=examples[:SHOWN],
        shown=f"{min(SHOWN, len(examples))} of {len(examples)}",
    )
    written = [page, *([picture] if curves else []), *([routers] if measured else [])]
    logger.warning("Wrote %s.", " and ".join(f"`{path}`" for path in written))
    return page
