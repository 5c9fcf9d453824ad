"""
What the claims are made of: commands of `llava-mod` whose inputs are other commands' folders, run once each.

A [`Node`] is a command, its recipe and its options; its folder is named by a hash of all of that and of its inputs, so
that arms which begin alike share what they share, and a cut-off run goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent

RECIPES, WEIGHTS = ROOT / "recipes", ROOT / "src" / "llava_mod_hf" / "weights"

SHARDED = ("generate-completions", "make-preferences", "cache-teacher")  # which take up what they have written

DONE = "done.json"

TRAINING = ("pretrain", "adapt", "mimic", "prefer")


# options of a recipe that change no number
SAYS_NOTHING = ("output_dir", "logging_steps", "logging_first_step", "report_to", "save_strategy")


@functools.cache
def read_recipe(name):
    """What a file of `recipes/` says."""
    return yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))


@functools.cache
def weights_hash(name):
    """Of an embedded model: when it is trained anew, what was made with it is made anew. `None` of anything else."""
    path = WEIGHTS / str(name).removeprefix("embedded:") / "model.safetensors"
    return hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest() if path.is_file() else None


@dataclass(frozen=True, eq=False)
class Node:
    """
    A command to run.

    Args:
        command (`str`): of `llava-mod`, or `answers`: what a model says to test rows, written as JSON.
        recipe (`str` or `None`): file of `recipes/`, such as `scenes/2_mimic_dense.yaml`.
        options (`dict`): that the recipe's are replaced with; a value may be a [`Node`], which stands for its folder.
    """

    command: str
    recipe: str | None = None
    options: dict = field(default_factory=dict)

    @functools.cached_property
    def key(self):
        """`str`: hash of the command, its recipe with its options, its inputs' keys, and the embedded weights."""
        options = {name: value.key if isinstance(value, Node) else value for name, value in self.options.items()}
        options = {**(read_recipe(self.recipe) if self.recipe else {}), **options}
        options = {name: value for name, value in options.items() if name not in SAYS_NOTHING}
        options["weights"] = [weights_hash(value) for value in options.values() if str(value).startswith("embedded:")]
        text = json.dumps([self.command, options], sort_keys=True)
        return f"{self.command}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"

    @property
    def inputs(self):
        return [value for value in self.options.values() if isinstance(value, Node)]

    def __eq__(self, other):
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def is_done(self, root):
        return (Path(root) / self.key / DONE).is_file()


def with_inputs(nodes):
    """All nodes that some need, themselves included, each once and after its inputs."""
    ordered: dict[Node, None] = {}

    def visit(node):
        if node not in ordered:
            for each in node.inputs:
                visit(each)
            ordered[node] = None

    for node in nodes:
        visit(node)
    return list(ordered)


def _arguments(node, root, device):
    """The command line of a node."""
    argv = ["--config", str(RECIPES / node.recipe)] if node.recipe else []
    options = {"output_dir": str(Path(root) / node.key), **node.options}
    if node.command == "cache-teacher":
        options |= {"teacher_cache": options["output_dir"], "use_cpu": device == "cpu"}
    if node.command in TRAINING:
        options |= {"use_cpu": device == "cpu", "disable_tqdm": True, "logging_steps": 50}
    for name, value in options.items():
        if isinstance(value, Node):
            value = str(Path(root) / value.key)
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return argv


def _run_command(node, root, device):
    import llava_mod_cli
    from llava_mod_hf import recipes

    command = llava_mod_cli.commands()[node.command]
    groups = recipes.parse(command.groups(), _arguments(node, root, device))
    importlib.import_module(command.module).run(*groups)


def _write_answers(node, root, device):
    """What a model answers to rows of a split, with what was asked and what is right."""
    from llava_mod_hf.data import scene_rows
    from llava_mod_hf.evaluation.answers import generate_answers
    from llava_mod_hf.loading import load_model_and_processor
    from llava_mod_hf.students.quantisation import load_quantised

    options = dict(node.options)
    model, bits = options.pop("model"), options.pop("bits", None)
    path = str(Path(root) / model.key) if isinstance(model, Node) else model
    rows = scene_rows.load("mixture", options.pop("split", "test"), options.pop("seed"), options)
    loaded, processor = load_model_and_processor(path)
    if bits:
        loaded = load_quantised(path, bits=bits, dtype="float32")
    given = generate_answers(loaded.to(device), processor, rows, batch_size=256)
    columns = {name: list(rows[name]) for name in ("question", "answer", "kind")}
    folder = Path(root) / node.key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").write_text(json.dumps({**columns, "given": given}), encoding="utf-8")


def run_node(node, root, device, threads):
    """Runs a node in this process; its output goes to a file beside its folder."""
    import datasets
    import torch
    from transformers.utils import logging as hf_logging

    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    folder, start = Path(root) / node.key, time.perf_counter()
    if folder.exists() and node.command not in SHARDED:
        shutil.rmtree(folder)  # cut off
    log = folder.with_suffix(".log")
    with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            (_write_answers if node.command == "answers" else _run_command)(node, root, device)
        except BaseException:
            stream.write(traceback.format_exc())
            raise
    said = {"seconds": time.perf_counter() - start, "device": device, "threads": threads}
    (folder / DONE).write_text(json.dumps(said | {"node": describe(node)}), encoding="utf-8")
    return node.key


def describe(node):
    """`dict`: a node with its inputs' keys, as JSON."""
    options = {name: value.key if isinstance(value, Node) else value for name, value in node.options.items()}
    return dataclasses.asdict(dataclasses.replace(node, options=options))


def run_all(nodes, root, *, device="cpu", jobs=1, threads=1, minutes=None, on_done=None):
    """
    Runs nodes and what they need, several at a time, inputs first; what is done is not run again.

    Args:
        nodes (`list[Node]` or `Callable[[], list[Node]]`):
            The first are begun first. A function is asked again after each node, for what can only be known then.
        root (`Path`): where their folders are.
        device (`str`): `"cpu"` or `"cuda"`.
        jobs (`int`), threads (`int`): processes, and threads of each.
        minutes (`float`, *optional*): after these nothing is begun any more.
        on_done (`Callable[[Node], None]`, *optional*): called after each.

    Returns:
        `dict[Node, str]`: nodes that failed, and why; those that need them are not run.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    finished, failed, running, start = 0, {}, {}, time.monotonic()
    ask = nodes if callable(nodes) else lambda: nodes

    def left():
        known = {*failed, *running.values()}
        return [node for node in with_inputs(ask()) if not node.is_done(root) and node not in known]

    waiting = left()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        while waiting or running:
            late = minutes is not None and time.monotonic() - start > 60 * minutes
            for node in [] if late else list(waiting):
                if len(running) == jobs:
                    break
                lost = [each for each in node.inputs if each in failed]
                if lost:
                    failed[node] = f"needs {lost[0].key}"
                    waiting.remove(node)
                elif all(each.is_done(root) for each in node.inputs):
                    waiting.remove(node)
                    running[pool.submit(run_node, node, root, device, threads)] = node
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                node = running.pop(future)
                finished += 1
                if future.exception() is not None:
                    failed[node] = f"{type(future.exception()).__name__}: {future.exception()}"
                elif on_done is not None:
                    on_done(node)
                waiting = left()
                sys.stderr.write(
                    f"{time.monotonic() - start:6.0f} s  {finished} done, {len(waiting)} wait  {node.key}"
                    f"{'  FAILED ' + failed[node][:300] if node in failed else ''}\n"
                )
    return failed
