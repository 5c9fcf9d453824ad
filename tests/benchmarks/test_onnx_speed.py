"""The benchmark of PyTorch, onnxruntime and WebAssembly: what it compares and reports, not how fast that is."""

import json

import pytest

from helpers.onnx_cases import libraries_or_skip


@pytest.mark.slow
def test_engines_are_timed_and_reported(monkeypatch, capsys):
    libraries_or_skip()
    import onnx_speed

    monkeypatch.setattr("sys.argv", ["onnx_speed.py", "--tokens", "3", "--repeats", "1"])
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)  # of the whole process
    turns = []

    def kept(run):
        return lambda *args: turns.append(run(*args)) or turns[-1]

    for name in ("in_torch", "in_onnxruntime"):
        monkeypatch.setattr(onnx_speed, name, kept(getattr(onnx_speed, name)))
    onnx_speed.main()
    *rows, machine = map(json.loads, capsys.readouterr().out.splitlines())
    assert [row["engine"] for row in rows] == ["torch", "onnxruntime"] and machine.keys() >= {"torch", "load_average"}
    assert rows[0]["times_torch"] == 1.0 and all(row["tokens_per_second"] > 0 < row["prompt_seconds"] for row in rows)
    # a turn that warms up and one that counts, each begun, then the prompt's token, then two more
    assert len(turns) == 4 and all(len(times) == 4 and times == sorted(times) for times in turns)
