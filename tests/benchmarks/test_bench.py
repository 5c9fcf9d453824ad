"""All benchmarks at once: what is run again, what fails, and figures and page from the JSON alone."""

import json
import time
from pathlib import Path

import bench
import bench_figure
import bench_page
import bench_things
import curves
import measuring
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
PAGE = ROOT / "docs" / "speed.md"

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from measuring import measured, write_json
with open({log!r}, "a") as file:
    file.write(Path(sys.argv[0]).name + "\\n")
if "--fail" in sys.argv:
    raise SystemExit("no such thing")
if "--silent" not in sys.argv:
    write_json(Path(sys.argv[-1]), __file__, [measured("ours", [2.0, 3.0], "s", {{"floor": [1.0, 2.0]}})])
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Three scripts in the place of the benchmarks, of which one fails; gives the list of those that ran."""
    log = tmp_path / "log"
    for name in ("one", "two", "three"):
        source = SCRIPT.format(folder=str(ROOT / "benchmarks"), log=str(log))
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(
        bench, "RUNS", {"one": ("one.py", "--x 1"), "two": ("two.py", "--fail"), "three": ("three.py", "")}
    )

    def ran():
        lines = log.read_text().split() if log.is_file() else []
        log.unlink(missing_ok=True)
        return lines

    return ran


def test_what_failed_does_not_stop_the_rest_and_is_run_again(scripts, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1 of the benchmarks failed: two.") as found:
        bench.main(["--out", str(out)])
    assert found.value.code and scripts() == ["one.py", "two.py", "three.py"]
    assert sorted(path.name for path in out.iterdir()) == ["one.json", "three.json"]
    assert json.loads((out / "one.json").read_text())["command"] == "python benchmarks/one.py --x 1"
    assert "two: failed with exit status 1" in capfd.readouterr().out
    # goes on where it was: two alone, which now ends well
    monkeypatch.setitem(bench.RUNS, "two", ("two.py", ""))
    bench.main(["--out", str(out)])
    assert scripts() == ["two.py"]
    # other settings are another measurement, and what is asked anew is too
    monkeypatch.setitem(bench.RUNS, "one", ("one.py", "--x 2"))
    bench.main(["--out", str(out)])
    assert scripts() == ["one.py"]
    bench.main(["--out", str(out), "--only", "three", "--again"])
    assert scripts() == ["three.py"]
    # a failure leaves what was there
    monkeypatch.setitem(bench.RUNS, "one", ("one.py", "--fail"))
    with pytest.raises(SystemExit, match="one"):
        bench.main(["--out", str(out)])
    assert json.loads((out / "one.json").read_text())["command"] == "python benchmarks/one.py --x 2"


def test_a_result_that_was_not_written_is_a_failure(scripts, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench, "RUNS", {"one": ("one.py", "--silent")})
    with pytest.raises(SystemExit, match="one"):
        bench.main(["--out", str(tmp_path / "out")])
    assert "one: wrote no file" in capfd.readouterr().out


def test_an_unknown_benchmark_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="There is no benchmark `startups`: give some of startup, "):
        bench.main(["--out", str(tmp_path), "--only", "startups"])


def test_medians_and_ranges_are_of_rounds():
    row = measuring.measured("ours", [2.0, 6.0, 3.0], "s", {"floor": [1.0, 2.0, 3.0], "slow": [4.0]}, x=5)
    assert (row["value"], row["low"], row["high"], row["unit"], row["x"]) == (3.0, 2.0, 6.0, "s", 5)
    assert row["ratios"] == {
        "floor": {"value": 2.0, "low": 1.0, "high": 3.0},  # of 2, 3, 1
        "slow": {"value": 0.5, "low": 0.5, "high": 0.5},  # of the round that both have
    }
    assert measuring.measured("ours", 3, "MiB", {"floor": 2})["ratios"]["floor"]["high"] == 1.5
    # of many rounds, one that the system held up is no range
    many = [1.0] * 99 + [50.0]
    assert (measuring.spread(many)["high"], measuring.spread([1.0, 50.0])["high"]) == (1.0, 50.0)


def test_ways_take_turns_and_the_first_round_warms_up():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measuring.in_turns(steps, 2, before=lambda: order.append("-"), most={"b": 1})
    assert order == ["-", "a", "-", "b"] * 2 + ["-", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 1}


def test_clocks():
    assert measuring.seconds_of(lambda: time.sleep(0.05)) >= 0.05
    assert measuring.seconds_of(lambda: time.sleep(0.2), clock="cpu") < 0.1


def test_products_are_counted():
    one, two = torch.randn(3, 4), torch.randn(4, 5)
    assert measuring.products_of(lambda: one @ two)["all"] == 3 * 4 * 5
    product, count = measuring.square_product(size=8)
    assert measuring.products_of(product)["all"] == count == 8**3
    assert product().shape == (8, 8)


def test_a_command_has_no_path_of_the_machine(tmp_path):
    argv = ["--model", str(tmp_path / "student"), "--json", "a.json", "--json=b.json", "--data", "a b"]
    assert measuring.command_of("/somewhere/x.py", argv) == "python benchmarks/x.py --model student --data 'a b'"


def result_of(rows):
    machine = measuring.machine(threads=2) | {"cpu": "EPYC", "cores": 2, "load": 1.5}
    return {"benchmark": "x", "command": "python benchmarks/x.py", "machine": machine, "rows": rows}


@pytest.fixture
def results():
    """Everything that is shown: ours takes twice its floor, and every rival three times ours."""
    found = {}
    for thing in (*bench_things.TIME, *bench_things.SIZE):
        bases = {name: [3.0, 6.0] for name in thing.rivals} | ({thing.floor[0]: [0.5, 1.0]} if thing.floor else {})
        found.setdefault(thing.result, []).append(measuring.measured(thing.row, [1.0, 2.0], "s", bases))
    found["curves"] = [
        measuring.measured(way, [x / 100, x / 50], "s", {}, curve=curve, x=x)
        for curve, (*_, ways) in bench_figure.CURVES.items()
        for way in ways
        for x in curves.POINTS[curve]
    ]
    return {name: result_of(rows) for name, rows in found.items()}


def test_the_page_says_what_the_json_says(results):
    text = "\n".join(bench_page.block_lines(results))
    assert "| mimic loss | 2.00, matrix products | 3.00, TRL's kernel on the response; 3.00, the authors' " in text
    assert "| Mimic loss: length | 256–4,096 | ours 16.0; " in text
    assert "| Processes, batch of each fixed | 1–2 | ours, live teacher 2.00; TRL's SFTTrainer 2.00 |" in text
    assert "Measured on 2 cores, EPYC, torch " in text and text.count("Measured on") == 1
    results["curves"]["machine"]["cpu"] = "another"
    text = "\n".join(bench_page.block_lines(results))
    assert ": curves. Load of the machine, one minute: 1.5 to 1.5." in text and text.count("Measured on") == 2


def test_ranges_turn_around_with_their_ratio():
    thing = bench_things.TIME[2]
    row = measuring.measured("ours", [1.0, 1.0, 1.0], "s", {"authors": [2.0, 4.0, 5.0], "floor": [0.5, 0.25, 1.0]})
    assert bench_things.against(thing, row) == {"authors": pytest.approx((4.0, 2.0, 5.0))}
    assert bench_things.over_floor(thing, row) == (2.0, 1.0, 4.0)
    assert bench_page.with_range((4.0, 2.0, 123.4)) == "4.00 (2.00–123)"


def test_figures_are_made_of_what_is_there(results, tmp_path):
    bench_figure.draw_speed({}, tmp_path / "none.png")
    bench_figure.draw_curves({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    few = {"mimic_loss": results["mimic_loss"]}
    for name, given in (("few", few), ("all", results)):
        bench_figure.draw_speed(given, tmp_path / f"{name}.png")
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("few", "all")]
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]
    bench_figure.draw_curves(results, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    first = (tmp_path / "all.png").read_bytes()
    bench_figure.draw_speed(results, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes() == first


def test_the_figure_shows_each_ratio(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(bench_figure.Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    bench_figure.draw_speed({"mimic_loss": results["mimic_loss"]}, tmp_path / "speed.png")
    floors, _ = drawn
    assert [text.get_text() for text in floors.get_yticklabels()] == ["mimic loss", "mimic loss, memory"]
    points = [[line.get_xdata()[0] for line in axes.lines if line.get_marker() in "oD"] for axes in drawn]
    assert points == [[2.0] * 2, pytest.approx([3.0] * 6, rel=1e-4)]
    drawn.clear()
    bench_figure.draw_curves(results, tmp_path / "curves.png")
    shown = [axes for axes in drawn if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [title for title, *_ in bench_figure.CURVES.values()]
    assert [text.get_text() for text in shown[0].get_xticklabels()] == ["256", "512", "1k", "2k", "4k"]


def test_a_page_without_a_block_is_refused(results, tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"before\n\n{bench_page.BEGIN}\nold\n{bench_page.END}\nafter\n")
    for name, result in results.items():
        measuring.write(tmp_path / "results" / f"{name}.json", json.dumps(result))
    bench.main(["--out", str(tmp_path / "results"), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"speed.png", "curves.png"}
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="has no block to replace"):
        bench.main(["--out", str(tmp_path / "results"), "--page", str(page)])


def test_the_docs_say_what_the_committed_json_says():
    text = PAGE.read_text(encoding="utf-8")
    block = "\n".join(bench_page.block_lines(bench_page.read_results(RESULTS)))
    assert text.count(bench_page.BEGIN) == text.count(bench_page.END) == 1
    assert block in text
    for name, result in bench_page.read_results(RESULTS).items():
        script, options = bench.RUNS[name]
        assert bench.is_measured(RESULTS / f"{name}.json", script, options), result["command"]
