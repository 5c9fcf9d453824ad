"""The benchmark of pictures: a stream decodes them as often as its docs say, and all ways make all of them ready."""

import runpy
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "data_loading.py"


def test_each_way_decodes_as_often_as_is_said(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    found = runpy.run_path(str(BENCHMARK))["measure"](pictures=8, size=(64, 48), repeats=1)
    assert {way: decodings for way, (_, decodings) in found.items()} == {"floor": 1, "rows": 2, "a stream": 3}
    assert all(seconds > 0 for seconds, _ in found.values())
