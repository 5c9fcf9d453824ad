"""The benchmarks of the mixture-of-experts block, of a pair's prompt, of loading and of the command line's start."""

import importlib.util

import compression
import load_memory
import pytest
import startup


def test_moe_block(measure, capsys):
    """Tiny sizes: what is compared and reported, not how fast it is; the outputs are compared inside."""
    sizes = "--hidden 128 --intermediate 64 --repetitions 4 --seconds 0 --threads 1"
    rows = {row["name"]: row for row in measure("moe_block", f"--tokens 8 1 {sizes}")["rows"]}
    assert rows.keys() == {f"{way}, {n} tokens" for way in ("ours", "eager", "grouped_mm", "floor") for n in (8, 1)}
    assert rows["ours, 8 tokens"]["work"] == "forward and backward" and rows["ours, 1 tokens"]["work"] == "forward"
    assert rows["ours, 8 tokens"]["ratios"].keys() == {"floor", "eager", "grouped_mm"}
    assert "grouped_mm" in capsys.readouterr().out
    low_rank = measure("moe_block", f"--tokens 8 --expert-rank 2 {sizes}")["rows"]
    assert [row["name"] for row in low_rank] == ["ours, 8 tokens", "floor, 8 tokens"]


def test_preference_prefix(measure, capsys):
    """Tiny sizes: what is compared and reported, not how fast it is."""
    sizes = "--layers 2 --vocabulary 64 --image-tokens 5 --prompt-tokens 3 --response-tokens 2 --rounds 1 --threads 1"
    rows = {row["name"]: row for row in measure("preference_prefix", sizes)["rows"]}
    assert rows["shared: tokens"]["value"] == 12 / 20
    ways = {"two sequences", "shared", "head"}
    assert rows.keys() == {"shared: tokens"} | ways | {f"{way}: peak memory" for way in ways}
    assert rows["shared"]["ratios"].keys() == {"two sequences", "floor"}
    assert "shared / two sequences: tokens 0.600" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["package", "remote-code"])
def test_peak_of_loading_1_gb(remote):
    (found,) = load_memory.measure(layers=4, remote=remote)["student"]
    assert 0.9e9 < found["checkpoint"] < 1.1e9
    assert 4 * found["parameters"] == pytest.approx(found["checkpoint"], rel=0.01)
    # what the system cannot take back; the mapped file's pages it can
    assert 0.5 < found["ratio_anonymous"] <= 1.3


def test_startup(measure, capsys):
    """Quick lines: what is compared and reported, not how fast it is."""
    names = ["python -c pass", "llava-mod --help", "llava-mod mimc"]
    rows = measure("startup", "--rounds 1 --only " + " ".join(f"'{name}'" for name in names))["rows"]
    assert [row["name"] for row in rows] == names
    assert all(f"| `{name}` |" in capsys.readouterr().out for name in names[:1])
    # the other bases were left out
    assert [list(row["ratios"]) for row in rows] == [[], ["python -c pass"], ["python -c pass"]]
    assert startup.BASES == ("import transformers", "trl sft --help")


@pytest.mark.slow
def test_compression(make_student, processor, tmp_path, monkeypatch, capsys):
    """Each form that can be written here is, loaded again and asked; 8 bits where there is torchao."""
    make_student().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["compression.py", "--model", str(tmp_path), "--questions", "3"])
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    compression.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {name: [float(value) for value in values] for name, *values in lines[1:]}
    eight = () if importlib.util.find_spec("torchao") else tuple(name for name in compression.FORMS if "8 bits" in name)
    assert found.keys() == {name for name in compression.FORMS if "llama.cpp" not in name and name not in eight}
    whole = found["float32"]
    assert whole[2] == 1.0
    assert found["bfloat16"][0] == pytest.approx(whole[0] / 2, rel=0.05)
    assert found["2 experts, others merged"][0] < found["3 experts, others merged"][0] < whole[0]
    assert all(0 <= exact <= 1 and 0 <= same <= 1 for _, exact, same in found.values())
