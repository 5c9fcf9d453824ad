"""
A student sharded over two processes as it is loaded: logits, gradients and a step are those of one process.

As a script it is one process of several: `python test_parallel.py FOLDER MODE…` reads the student and `inputs.pt`
there, without the package, and writes what it finds to `MODE.RANK.pt`.
"""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

# what `from_pretrained(distributed_config=DistributedConfig(…))` is given
MODES = {
    "tensor": {"tp_size": 2},
    "fsdp": {"fsdp_size": 2},
    "fsdp and experts": {"fsdp_size": 2, "ep_size": 2},
}
PROCESSES = 2
LEARNING_RATE = 0.1

pytestmark = pytest.mark.slow  # `make test-launched` runs it


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shape_on_this_process(parameter):
    return tuple((parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape)


def step(folder, mode, rank):
    """Logits, loss, gradients and one step of gradient descent; with FSDP each process has half of the rows."""
    from transformers import AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    config = {"distributed_config": DistributedConfig(**MODES[mode])} if mode in MODES else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **config)
    inputs = torch.load(Path(folder) / "inputs.pt", weights_only=True)
    if mode.startswith("fsdp"):
        inputs = {name: value[rank::PROCESSES] for name, value in inputs.items()}
    shapes = {name: shape_on_this_process(value) for name, value in model.named_parameters()}
    with torch.no_grad():
        logits = whole(model(**inputs).logits)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    with torch.no_grad():
        after = whole(model(**inputs).logits)
    return {"logits": logits, "loss": loss.item(), "gradients": gradients, "after": after, "shapes": shapes}


def main(folder, *modes):
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    for mode in modes:
        torch.save(step(folder, mode, rank), Path(folder) / f"{mode}.{rank}.pt")
    torch.distributed.destroy_process_group()


def run_processes(folder, modes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "PYTHONWARNINGS": "ignore",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *modes],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()
    return {
        mode: [torch.load(folder / f"{mode}.{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
        for mode in modes
    }


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def found(request, make_student, tokenizer, tmp_path_factory):
    """What one process and what two find, of a student that is loaded with remote code."""
    folder = tmp_path_factory.mktemp(request.param)
    student = make_student(text_model_type=request.param)
    student.lm_head.weight.data.mul_(10)  # random weights give almost uniform distributions, and small gradients
    student.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(8, 300, (2, 24), generator=generator)
    input_ids[:, 1:17] = tokenizer.convert_tokens_to_ids("<image>")
    pixel_values = torch.randn(2, 3, 64, 64, generator=generator)
    torch.save({"input_ids": input_ids, "pixel_values": pixel_values}, folder / "inputs.pt")
    return step(folder, "one process", 0), run_processes(folder, MODES)


def close(actual, expected, scale=None):
    scale = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * scale)


def rows(mode, rank):
    return slice(rank, None, PROCESSES) if mode.startswith("fsdp") else slice(None)


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_one_process(found, mode):
    one, several = found
    assert one["logits"].abs().max() > 0.5
    for rank, process in enumerate(several[mode]):
        close(process["logits"], one["logits"][rows(mode, rank)])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_one_process(found, mode):
    one, several = found
    largest = max(gradient.abs().max().item() for gradient in one["gradients"].values())
    assert largest > 1e-3
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        assert one["gradients"][f"model.language_model.layers.0.mlp.{name}"].abs().max() > 1e-5
    assert sum(process["loss"] for process in several[mode]) / PROCESSES == pytest.approx(one["loss"], rel=1e-5)
    for process in several[mode]:
        assert process["gradients"].keys() == one["gradients"].keys()
        for name, expected in one["gradients"].items():
            close(process["gradients"][name], expected, largest)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_leads_where_it_leads_one_process(found, mode):
    one, several = found
    assert not torch.allclose(one["after"], one["logits"], atol=1e-2)
    for rank, process in enumerate(several[mode]):
        torch.testing.assert_close(process["after"], one["after"][rows(mode, rank)], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_each_process_holds_its_part_of_the_experts(found, mode):
    one, several = found
    packed = ("gate_up_proj", "down_proj")
    for layer, part in itertools.product((0, 2), packed):
        name = f"model.language_model.layers.{layer}.mlp.experts.{part}"
        experts, rows_, columns = one["shapes"][name]
        for process in several[mode]:
            found_shape = process["shapes"][name]
            if mode == "tensor":  # half of every expert's intermediate size
                expected = (experts, rows_ // 2, columns) if part == "gate_up_proj" else (experts, rows_, columns // 2)
            else:  # half of the experts
                expected = (experts // 2, rows_, columns)
            assert found_shape == expected


if __name__ == "__main__":
    sys.modules["llava_mod_hf"] = None  # type: ignore[assignment]  # the code of the checkpoint has to do
    main(*sys.argv[1:])
