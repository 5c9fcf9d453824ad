"""The benchmark of pictures: a stream decodes them as often as its docs say, and all ways make all of them ready."""

import runpy
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "data_loading.py"


def test_each_way_decodes_as_often_as_is_said(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    times, decodings = runpy.run_path(str(BENCHMARK))["measure"](pictures=8, size=(64, 48), repeats=2)
    assert decodings == {"floor": 1, "rows": 2, "a stream": 3, "trl": 2}
    assert times.keys() == decodings.keys()
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times.values())
