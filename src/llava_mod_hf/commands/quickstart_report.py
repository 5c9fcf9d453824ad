"""What the quickstart says at the end: tables in the terminal, and of the scenes a picture and a page."""

import io
import platform
from importlib.metadata import version

from rich.table import Table

from llava_mod_hf import __version__
from llava_mod_hf.commands.quickstart_plan import console
from llava_mod_hf.evaluation.intervals import intervals
from llava_mod_hf.evaluation.marking import mark_description
from llava_mod_hf.evaluation.measures import DESCRIBE
from llava_mod_hf.publishing.summary_figure import Bars, Line, draw_summary
from llava_mod_hf.publishing.summary_page import write_page

# stage → what it is called, and its colour in the picture
MODELS = {
    "blind": ("blind", "#a8b1ba"),
    "teacher": ("teacher", "#7d8894"),
    "sft": ("supervised", "#d9822b"),
    "mimic_dense": ("distilled dense", "#8cb4e0"),
    "mimic_sparse": ("distilled", "#3b7dd0"),
    "prefer": ("preferred", "#2a9d6f"),
}

SPEAKING = ("sft", "mimic_sparse", "prefer", "teacher")  # in the picture

COMPARED = (("mimic_sparse", "sft"), ("prefer", "mimic_sparse"))

# measure → head of its column in the terminal
COLUMNS = {
    "exact_match": "all",
    "describe": "descr.",
    "random": "random",
    "popular": "popular",
    "adversarial": "advers.",
    "chair_s": "absent↓",
    "object_recall": "found",
}

MEASURES = {
    "exact_match": "right answers, all questions",
    "describe": "descriptions right, in order",
    "chair_s": "hallucinated descriptions ↓",
    "chair_i": "absent, of the things named ↓",
    "object_recall": "things found, of those there",
    "presence": "is there a …?",
    "random": "… any absent thing",
    "popular": "… absent, frequent in training",
    "adversarial": "… absent partners",
    "count": "how many?",
    "color": "what color?",
    "where": "where?",
    "size": "how big?",
    "conversation": "after a description",
}

LOWER_IS_BETTER = ("chair_s", "chair_i")

BARS = {
    "exact_match": ("Right answers", "all questions;\nmore is better"),
    "presence": ("Is it there?", "of present and of absent\nthings; more is better"),
    "chair_s": ("Hallucinations", "descriptions that name an\nabsent thing; less is better"),
    "object_recall": ("Things found", "of those that are there;\nmore is better"),
}

EXAMPLES = 4


def _results(summary):
    """`{stage: result}` of [`MODELS`]."""
    found = {"blind": summary["blind"], "teacher": summary["teacher"], **summary["stages"]}
    return {name: found[name] for name in MODELS}


def _answered(rows, given):
    columns = [rows[name][:] for name in ("question", "answer", "kind")]
    return [
        dict(zip(("question", "answer", "kind", "given"), each, strict=True))
        for each in zip(*columns, given, strict=True)
    ]


def add_intervals(summary, rows, given):
    """Puts `intervals` into what the summary says of each model, and the `differences` of [`COMPARED`] beside them."""
    answered = {name: _answered(rows, answers) for name, answers in given.items()}
    for name, result in {"blind": summary["blind"], "teacher": summary["teacher"], **summary["stages"]}.items():
        result["intervals"] = intervals(answered[name])
    summary["differences"] = {
        f"{first} - {second}": intervals(answered[first], answered[second]) for first, second in COMPARED
    }


def examples(rows, given):
    """`list[int]`: the first descriptions of which not all say the same, or where those are few the first of all."""
    described = [number for number, kind in enumerate(rows["kind"]) if kind == DESCRIBE]
    agreed = {number: len({given[name][number] for name in SPEAKING}) == 1 for number in described}
    return sorted(sorted(described, key=lambda number: (agreed[number], number))[:EXAMPLES])


def _line(name, given, answer):
    marked, (title, color) = mark_description(given, answer), MODELS[name]
    if marked.missing:
        note = "misses all three" if len(marked.missing) > 2 else f"misses {', '.join(marked.missing)}"
    else:
        note = f"names {', '.join(marked.repeated)} again" if marked.repeated else ""
    return Line(title, color, marked.pieces, marked.right, note)


def finding(summary):
    """`str`: what the run shows, with its numbers."""
    stages = summary["stages"]
    distilled, supervised = (100 * stages[name]["exact_match"] for name in COMPARED[0])
    return f"{distilled:.0f} % right when distilled, {supervised:.0f} % when trained on the labels"


def _terms(summary):
    minutes = f"{summary['seconds'] / 60:.1f} minutes"
    return f"{summary['num_questions']:,} balanced test questions about drawn scenes, seed {summary['seed']}, {minutes}"


def _span(interval):
    """A value and how far its interval reaches, in per cent."""
    value, low, high = interval
    value, half = 100 * value, 50 * (high - low)
    # a column of the terminal has room for 99.9±9.9
    return f"{value:.{1 if value < 99.95 else 0}f}", f"±{half:.{1 if half < 9.95 else 0}f}"


def _points(share):
    return f"{100 * share:+.1f}".replace("-", "−")


def write(summary, rows, given, output_dir):
    """Writes `summary.png` and `summary.html`."""
    texts, pictures = rows["answer"], {number: rows[number]["images"][0] for number in examples(rows, given)}
    results = _results(summary)
    drawn = {
        "title": finding(summary),
        "subtitle": f"{_terms(summary)}. In the test no kind brings along its partner, as half of them do in training.",
        "examples": [
            (picture, [_line(name, given[name][number], texts[number]) for name in SPEAKING])
            for number, picture in pictures.items()
        ],
        "bars": [
            Bars(*BARS[measure], tuple((*MODELS[name], *each["intervals"][measure]) for name, each in results.items()))
            for measure in BARS
            if measure in summary["teacher"]["intervals"]
        ],
        "loads": summary["published"]["expert_load"],
    }
    draw_summary(output_dir / "summary.png", **drawn)
    dark = io.BytesIO()
    draw_summary(dark, **drawn, dark=True)
    write_page(output_dir / "summary.html", _page(summary, output_dir), output_dir / "summary.png", dark.getvalue())


def _page(summary, output_dir):
    """What the page says, in the words of its template."""
    results = _results(summary)
    measured = [name for name in MEASURES if name in summary["teacher"]["intervals"]]
    differences = []
    for measure in measured:
        cells = []
        for each in summary["differences"].values():
            value, low, high = each[measure]
            sure = low > 0 or high < 0
            gain = sure and (value > 0) != (measure in LOWER_IS_BETTER)
            said = ("better" if gain else "worse") if sure else ""
            cells.append((_points(value), f"{_points(low)} to {_points(high)}", said))
        differences.append((MEASURES[measure], cells))
    folders = {name: (MODELS.get(name, (name,))[0], output_dir / name) for name in summary["stages"]}
    return {
        "finding": finding(summary),
        "terms": _terms(summary),
        "models": [MODELS[name][0] for name in results],
        "measures": [
            (MEASURES[measure], [_span(each["intervals"][measure]) for each in results.values()])
            for measure in measured
        ],
        "compared": [f"{MODELS[first][0]} − {MODELS[second][0]}" for first, second in COMPARED],
        "differences": differences,
        "checkpoints": [
            {
                "name": title,
                "folder": str(folder),
                "active": f"{summary['stages'][name]['language_params_active']:,}",
                "steps": summary["stages"][name]["steps"],
                "seconds": f"{summary['stages'][name]['seconds']:.0f}",
                "loss": f"{summary['stages'][name]['first_loss']:.2f} → {summary['stages'][name]['last_loss']:.2f}",
            }
            for name, (title, folder) in folders.items()
        ],
        "teacher_active": f"{summary['teacher']['language_params_active']:,}",
        "published": summary["published"]["folder"],
        "pairs": summary["make_preferences"],
        "wrong_answers": f"{100 * summary['training_rows'].get('wrong_answers', 0):.0f} %",
        "facts": {"world": summary["world"], "seed": summary["seed"], **_versions()},
        "command": f"llava-mod quickstart --world {summary['world']} --seed {summary['seed']} "
        f"--num-questions {summary['num_questions']} --output-dir {output_dir}",
    }


def _versions():
    installed = {name: version(name) for name in ("torch", "transformers", "trl", "datasets")}
    return {"llava_mod_hf": __version__, "Python": platform.python_version(), **installed}


def show(summary, output_dir):
    """The tables at the end, of 80 columns, and where everything is."""
    (_show_scenes if "differences" in summary else _show_easy_vqa)(summary)
    more = " summary.html and summary.png," if "differences" in summary else ""
    console.print(
        f"{summary['seconds'] / 60:.1f} minutes. Everything is in [bold]{output_dir}[/]: a checkpoint per stage,{more} "
        f"summary.json, and the published student in {summary['published']['folder']}."
    )


def _show_scenes(summary):
    table = Table(title=_terms(summary), box=None, padding=(0, 1, 0, 0))
    table.add_column("%", no_wrap=True)
    measured = [name for name in COLUMNS if name in summary["teacher"]["intervals"]]
    for name in measured:
        table.add_column(COLUMNS[name], justify="right", no_wrap=True)
    for name, result in _results(summary).items():
        table.add_row(MODELS[name][0], *("".join(_span(result["intervals"][each])) for each in measured))
    console.print(table)
    paired = Table(title="differences in points, with their 95 % intervals", box=None, padding=(0, 2, 0, 0))
    paired.add_column("")
    for first, second in COMPARED:
        paired.add_column(f"{MODELS[first][0]} − {MODELS[second][0]}", justify="right")
    for name in MEASURES:
        if name in (*COLUMNS, "presence") and name in summary["teacher"]["intervals"]:
            ends = [each[name] for each in summary["differences"].values()]
            paired.add_row(
                MEASURES[name],
                *(f"{_points(value)} [{_points(low)}, {_points(high)}]" for value, low, high in ends),
            )
    console.print(paired)
    console.print(
        "all, descr.: exact match. random, popular, advers.: right on questions whether a thing is there, by which "
        "absent ones are asked for. absent: descriptions that name an absent thing. found: of the things that are "
        "there. ±: 95 % over the questions, not over seeds. supervised: the same student, rows and steps, labels only."
    )


def _show_easy_vqa(summary):
    kinds = sorted(summary["blind"]["exact_match_by_kind"])
    title = f"{summary['num_questions']} test questions, balanced by answer; seed {summary['seed']}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))  # fits 80 columns
    table.add_column("", no_wrap=True)
    for header in ["all", *kinds, "hall.", "miss", "bal.", "KL", "active", "steps", "s"]:
        table.add_column(header, justify="right", no_wrap=True)
    models = {"blind": summary["blind"], "teacher": summary["teacher"], **summary["stages"]}
    for name, result in models.items():
        scores = [result["exact_match"], *(result["exact_match_by_kind"][kind] for kind in kinds)]
        scores += [result[key] for key in ("hallucination_rate", "miss_rate", "balanced_accuracy")]
        cells = [f"{score:.3f}" for score in scores]
        divergence, active = result.get("kl_to_teacher"), result.get("language_params_active")
        cells.append("" if divergence is None else f"{divergence:.3f}")
        cells.append("" if active is None else f"{active / 1e3:.0f}k")
        cells.append(str(result.get("steps", "")))
        cells.append(f"{result['seconds']:.0f}" if "seconds" in result else "")
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        "all, "
        + ", ".join(kinds)
        + ": exact match. hall.: absent things claimed. miss: present things not seen. bal.: balanced accuracy. "
        "KL: to the teacher, nats per token. active: parameters of language model and adaptor that a token uses."
    )
