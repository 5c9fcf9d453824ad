"""Every benchmark of speed at tiny settings: the JSON it writes, and that it has what figure and page show of it."""

import shlex

import bench
import bench_figure
import bench_things
import curves
import mimic_loss
import pytest

MIX = "--conversations 40"
LOSS = "--vocabulary 512 --width 32 --teacher-width 48 --positions 96 --supervised 8 --repeats 4 --threads 1"

# result, and options in the place of those of `bench.RUNS`
FAST = {
    "multi_turn": MIX,
    "padding": f"{MIX} --batch 4",
    "data_loading": "--pictures 8 --size 64 48 --repeats 2",
    "moe_block": "--tokens 704 4096 1 --hidden 64 --intermediate 64 --repetitions 3 --seconds 0 --threads 1",
}
SLOW = {
    "mimic_step_tiny": "--size tiny --dtype float32 --repeats 2 --threads 1",
    "preference_prefix": "--layers 2 --vocabulary 64 --image-tokens 5 --prompt-tokens 3 --response-tokens 2 --rounds 2",
    "startup": "--rounds 1",
    "mimic_loss": LOSS,
    "mimic_step_0.5b": "--size small --layers 1 --positions 128 --repeats 1 --threads 1",
    "pictures_encoded": "--layers 1 --rounds 2",
    "preference_step": "--rounds 1 --steps 2 --batch 1 --width 64 --layers 2 --threads 1",
    "decoding": '--layers 1 --tokens 3 --repeats 1 --without "teacher of 7B\'s widths"',
    "load_memory": "--layers 1",
    "streaming_memory": "--rows 64 128",
    "teacher_cache": "--rows 16 --rounds 2",
}
CASES = [*FAST.items(), *(pytest.param(*case, marks=pytest.mark.slow, id=case[0]) for case in SLOW.items())]


def things_of(result):
    """What is shown of a result, at the sizes above."""
    found = [thing for thing in (*bench_things.TIME, *bench_things.SIZE) if thing.result == result]
    assert found
    if result == "streaming_memory":
        found = [thing._replace(row=thing.row.replace("20000", "128").replace("2000", "64")) for thing in found]
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("result", "options"), CASES)
def test_it_writes_what_is_shown_of_it(measure, result, options):
    script, _ = bench.RUNS[result]
    found = measure(script.removesuffix(".py"), options)
    rows = {row["name"]: row for row in found["rows"]}
    for thing in things_of(result):
        assert thing.row in rows, thing
        expected = {*thing.rivals, *([thing.floor[0]] if thing.floor else [])}
        assert expected <= rows[thing.row]["ratios"].keys(), thing
    assert shlex.split(found["command"]) == ["python", f"benchmarks/{script}", *shlex.split(options)]


def test_every_run_has_a_case():
    assert {*FAST, *SLOW, "curves"} == bench.RUNS.keys()
    assert {thing.result for thing in (*bench_things.TIME, *bench_things.SIZE)} == {*FAST, *SLOW}
    assert {kind for thing in bench_things.TIME for kind, _ in thing.rivals.values()} <= bench_things.KINDS.keys()


def test_the_losses_that_are_timed_are_one():
    args = mimic_loss.options().parse_args(shlex.split(LOSS))
    times, losses = mimic_loss.times_of(["floor", "ours", "selection", "trl_response", "trl"], args, {"trl": 1})
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(times, 4) | {"trl": 1}
    assert losses.pop("floor") is None
    assert list(losses.values()) == pytest.approx([losses["ours"]] * 4, rel=1e-4)


CURVES = ["experts", *(pytest.param(name, marks=pytest.mark.slow) for name in curves.CURVES if name != "experts")]


@pytest.mark.parametrize("only", CURVES)
def test_curves(measure, only):
    rows = measure("curves", f"--only {only} --smallest --rounds 1 --threads 1")["rows"]
    ways, points = set(bench_figure.CURVES[only][2]), curves.POINTS[only][:2]
    assert {(row["curve"], row["name"], row["x"]) for row in rows} == {(only, way, x) for way in ways for x in points}
    assert len(rows) == len(ways) * len(points)
