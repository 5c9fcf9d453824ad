"""The benchmarks of the mixture-of-experts block, of loading and of the command line's start."""

import json
import runpy
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_moe_block(capsys):
    """Tiny sizes: what is compared and reported, not how fast it is; the outputs are compared inside."""
    threads = torch.get_num_threads()
    benchmark = runpy.run_path(str(BENCHMARKS / "moe_block.py"))
    sizes = ["--hidden", "128", "--intermediate", "64", "--repetitions", "3", "--seconds", "0"]
    try:
        results = benchmark["main"](["--tokens", "8", "1", *sizes, "--threads", "1", "--json"])
        low_rank = benchmark["main"](["--tokens", "8", *sizes, "--threads", "1", "--expert-rank", "2"])
    finally:
        torch.set_num_threads(threads)
    assert set(low_rank[0]["seconds"]) == {"ours", "floor"}
    assert json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "}")["results"] == results
    assert [(result["tokens"], result["work"]) for result in results] == [(8, "forward and backward"), (1, "forward")]
    for result in results:
        assert set(result["seconds"]) == {"ours", "eager", "grouped_mm", "floor"}
        assert result["ratio_to_floor"]["floor"] == 1.0 < 1e6 * result["ratio_to_floor"]["ours"]
        better = min(result["seconds"]["eager"], result["seconds"]["grouped_mm"])
        assert result["ours_to_better"] == result["seconds"]["ours"] / better


def test_preference_prefix(tmp_path, monkeypatch, capsys):
    """Tiny sizes: what is compared and reported, not how fast it is."""
    threads = torch.get_num_threads()
    benchmark = runpy.run_path(str(BENCHMARKS / "preference_prefix.py"))
    sizes = ["--layers", "2", "--vocabulary", "64", "--image-tokens", "5", "--prompt-tokens", "3"]
    sizes += ["--response-tokens", "2", "--rounds", "1", "--threads", "1", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr("sys.argv", ["preference_prefix.py", *sizes])
    try:
        benchmark["main"]()
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens_ratio"] == 12 / 20
    assert found["seconds"].keys() == found["peak_mib"].keys() == {"two sequences", "shared", "head"}
    assert min(*found["seconds"].values(), *found["peak_mib"].values(), found["body_ratio"]) > 0
    assert "shared / two sequences: tokens 0.600" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["package", "remote-code"])
def test_peak_of_loading_1_gb(remote):
    found = runpy.run_path(str(BENCHMARKS / "load_memory.py"))["measure"](layers=4, remote=remote)
    assert 0.9e9 < found["checkpoint"] < 1.1e9
    assert 4 * found["parameters"] == pytest.approx(found["checkpoint"], rel=0.01)
    # what the system cannot take back; the mapped file's pages it can
    assert 0.5 < found["ratio_anonymous"] <= 1.3


def test_startup(capsys):
    """Two quick lines: what is compared and reported, not how fast it is."""
    benchmark = runpy.run_path(str(BENCHMARKS / "startup.py"))
    names = ["llava-mod --help", "llava-mod mimc"]
    results = benchmark["main"](["--rounds", "1", "--only", *names, "--json"])
    assert json.loads(capsys.readouterr().out) == results
    assert list(results) == names
    assert all(0 < result["range"][0] <= result["seconds"] <= result["range"][1] for result in results.values())
    assert all(result["ratios"] == {} for result in results.values())  # their bases were left out
    assert benchmark["BASES"] == ("import transformers", "trl sft --help") == tuple(benchmark["LINES"])[:2]
