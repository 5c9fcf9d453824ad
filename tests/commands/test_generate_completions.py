"""`llava-mod generate-completions`: what it writes, that a cut-off run goes on to the same end, what trains on it."""

import json

import pytest
import yaml
from PIL import Image

from helpers.ddp_gradients import RUN
from helpers.models import sharpen
from llava_mod_cli import main
from llava_mod_hf.commands import generate_completions
from llava_mod_hf.commands.generate_completions import GenerationArguments
from llava_mod_hf.commands.generate_completions import run as run_generate_completions
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.arguments import DataArguments, PromptArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.evaluation.answers import generate_answers, sample_answers

ROWS, SHARD = 7, 3


@pytest.fixture(scope="module")
def rows():
    return easy_vqa.load("questions", "train", 0).select(range(ROWS))


@pytest.fixture(scope="module")
def model(make_student, processor, rows):
    """A random model, which never writes the end token: every fourth token stands for it as well."""
    model = sharpen(make_student(moe_layers=[]))
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *range(64, 384, 4)]
    return model


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def options(folder, output, **values):
    values = {"max_new_tokens": 4, "keep_unfinished": True, "shard_size": SHARD, "batch_size": 3, **values}
    return GenerationArguments(model=str(folder), output_dir=str(output), **values)


def data(**values):
    return PromptArguments(easy_vqa.DATASET, "questions", **{"max_samples": ROWS, **values})


def written(output):
    return load_rows(DataArguments(str(output)), columns=("prompt", "completion"))


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def texts(dataset):
    return [messages[0]["content"] for messages in dataset["completion"]]


def test_prompts_of_a_mixture_keep_their_pictures_and_tell_no_path(folder, tmp_path):
    entries = []
    for color in ("red", "blue"):
        place = tmp_path / color
        place.mkdir()
        Image.new("RGB", (8, 8), color).save(place / "x.png")
        (place / "rows.json").write_text(json.dumps([{"image": "x.png", "question": "what?", "answer": color}]))
        entries.append({"path": str(place / "rows.json"), "image_folder": str(place)})
    counts = run_generate_completions(PromptArguments(datasets=entries), options(folder, tmp_path / "set"))
    assert counts["prompts"] == 2
    rows = written(tmp_path / "set")
    colors = {image[0].getpixel((0, 0)) for image in rows["images"]}
    assert len(rows) == counts["rows"] and colors <= {(255, 0, 0), (0, 0, 255)} and len(colors) == len(rows)
    assert not {"source_dataset", "source_row"} & set(rows.column_names)
    assert not [path for path in (tmp_path / "set").iterdir() if str(tmp_path).encode() in path.read_bytes()]


def test_greedy_answers_take_the_place_of_the_data_sets(folder, model, processor, rows, tmp_path):
    counts = run_generate_completions(data(), options(folder, tmp_path / "set"))
    expected = [text.strip() for text in generate_answers(model, processor, rows, batch_size=3, max_new_tokens=4)]
    assert len(set(expected)) > ROWS // 2  # else the comparison says little
    dataset = written(tmp_path / "set")
    assert texts(dataset) == [text for text in expected if text]
    assert counts == {"prompts": ROWS, "rows": len(dataset)}
    kept = [i for i, text in enumerate(expected) if text]
    for name in ("prompt", "question", "answer", "kind"):
        assert dataset[name][:] == rows.select(kept)[name][:]
    assert dataset[0]["images"][0].tobytes() == rows[kept[0]]["images"][0].tobytes()
    shards = [path.name for path in sorted((tmp_path / "set").glob("*.parquet"))]
    assert shards == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]


def test_answers_that_spell_out_a_mark_are_left_out(folder, tmp_path, monkeypatch):
    def sample(model, processor, dataset, **kwargs):
        return [[(text, True)] for text in ("red", "an <image>", "<|user|>")[: len(dataset)]]

    monkeypatch.setattr(generate_completions, "sample_answers", sample)
    assert run_generate_completions(data(), options(folder, tmp_path / "set")) == {"prompts": ROWS, "rows": 3}
    assert set(texts(written(tmp_path / "set"))) == {"red"}


def test_a_prompt_that_spells_out_a_mark_is_named_or_left_out(folder, rows, tmp_path, monkeypatch):
    marked = [
        messages if i != 4 else [{"role": "user", "content": "<image>?"}] for i, messages in enumerate(rows["prompt"])
    ]
    other = rows.remove_columns("prompt").add_column("prompt", marked)
    monkeypatch.setattr(generate_completions, "load_rows", lambda *args, **kwargs: other)
    with pytest.raises(ValueError, match="Row 4: a text holds `<image>`"):
        run_generate_completions(data(), options(folder, tmp_path / "error"))
    counts = run_generate_completions(data(bad_rows="drop", max_bad_rows=1.0), options(folder, tmp_path / "set"))
    assert counts["prompts"] == ROWS - 1


class Stops(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_end(folder, tmp_path, monkeypatch, temperature):
    args = options(folder, tmp_path / "whole", temperature=temperature, seed=5)
    run_generate_completions(data(), args)
    calls = []

    def sample_twice(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise Stops
        return sample_answers(*args, **kwargs)

    monkeypatch.setattr(generate_completions, "sample_answers", sample_twice)
    args = options(folder, tmp_path / "cut", temperature=temperature, seed=5)
    with pytest.raises(Stops):
        run_generate_completions(data(), args)
    assert [path.name for path in (tmp_path / "cut").glob("*.parquet")] == ["train-00000-of-00003.parquet"]
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        written(tmp_path / "cut")
    run_generate_completions(data(), args)
    assert len(calls) == 4  # the first shard is not made again
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    run_generate_completions(data(), args)
    assert len(calls) == 4


def test_sampling_follows_seed_temperature_and_top_p(model, processor, rows):
    def sample(**values):
        values = {"temperature": 1.0, "num_answers": 3, "seed": 1, **values}
        return sample_answers(model, processor, rows.select(range(4)), batch_size=2, max_new_tokens=3, **values)

    answers = sample()
    assert [len(each) for each in answers] == [3] * 4
    assert sample() == answers
    assert sample(seed=2) != answers
    assert sample(temperature=3.0) != answers
    greedy = generate_answers(model, processor, rows.select(range(4)), batch_size=2, max_new_tokens=3)
    assert [{text for text, _ in each} for each in sample(top_p=1e-6)] == [{text} for text in greedy]


@pytest.mark.slow
def test_other_settings_models_and_rows_do_not_mix(folder, make_student, processor, tmp_path):
    run_generate_completions(data(max_samples=4), options(folder, tmp_path / "set"))
    for name, value in (("temperature", 0.5), ("max_new_tokens", 3), ("shard_size", 4), ("keep_unfinished", False)):
        with pytest.raises(ValueError, match=f"was begun with `{name}`"):
            run_generate_completions(data(max_samples=4), options(folder, tmp_path / "set", **{name: value}))
    make_student(moe_layers=[], seed=2).save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was begun with `model`"):
        run_generate_completions(data(max_samples=4), options(tmp_path / "other", tmp_path / "set"))
    captions = PromptArguments(easy_vqa.DATASET, "captions", max_samples=4)
    with pytest.raises(ValueError, match="was begun with `rows`"):
        run_generate_completions(captions, options(folder, tmp_path / "set"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds other files: give an empty or a new `output_dir`"):
        run_generate_completions(data(max_samples=4), options(folder, tmp_path / "full"))


def test_answers_without_an_end_are_left_out_by_default(folder, model, processor, rows, tmp_path, caplog):
    answers = sample_answers(model, processor, rows, batch_size=3, max_new_tokens=4)
    ended = [text.strip() for ((text, ended),) in answers if ended and text.strip()]
    assert 0 < len(ended) < ROWS
    counts = run_generate_completions(data(), options(folder, tmp_path / "set", keep_unfinished=False))
    assert texts(written(tmp_path / "set")) == ended
    assert counts["rows"] == len(ended)
    assert f"{ROWS - len(ended)} of {ROWS} prompts got an answer that is empty or was cut" in caplog.text


def test_images_in_a_folder_stay_there(folder, tmp_path):
    (tmp_path / "images" / "00").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "00" / "a.png")
    turns = [("human", "<image>\nwhat is it?"), ("gpt", "x"), ("human", "and its color?"), ("gpt", "y")]
    row = {"image": "00/a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    source = PromptArguments(str(tmp_path / "rows.json"), image_folder=str(tmp_path / "images"))
    run_generate_completions(source, options(folder, tmp_path / "set"))
    found = DataArguments(str(tmp_path / "set"), image_folder=str(tmp_path / "images"))
    dataset = load_rows(found, columns=("prompt", "completion"))
    assert [len(messages) for messages in dataset["prompt"]] == [1, 3]
    assert dataset[1]["images"][0].getpixel((0, 0)) == (255, 0, 0)
    [parquet] = (tmp_path / "set").glob("*.parquet")
    assert b"00/a.png" in parquet.read_bytes() and str(tmp_path).encode() not in parquet.read_bytes()
    with pytest.raises(ValueError, match="does not exist"):
        load_rows(DataArguments(str(tmp_path / "set")), columns=("prompt", "completion"))


def test_the_command_and_a_recipe_that_trains_on_what_it_wrote(folder, tmp_path, capsys):
    recipe = {
        "model": str(folder),
        "dataset_name": easy_vqa.DATASET,
        "dataset_config": "questions",
        "max_samples": 6,
        "output_dir": str(tmp_path / "set"),
        "max_new_tokens": 4,
        "keep_unfinished": True,
    }
    (tmp_path / "generate.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["generate-completions", "--config", str(tmp_path / "generate.yaml")]) == 0
    run = {**RUN, "per_device_train_batch_size": 2, "max_steps": 1}
    run |= {"student": str(folder), "teacher": str(folder), "dataset_name": str(tmp_path / "set")}
    for name, extra in (
        ("grouped", {"train_sampling_strategy": "group_by_length"}),
        ("streamed", {"streaming": True}),
    ):
        recipe = {**run, **extra, "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["mimic", "--config", str(tmp_path / f"{name}.yaml")]) == 0, capsys.readouterr().err
        assert json.loads((tmp_path / name / "run.json").read_text())["steps"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "`temperature` is -1"),
        ({"top_p": 0}, "`top_p` 0"),
        ({"batch_size": 0}, "`batch_size` is 0: give at least 1"),
        ({"shard_size": 0}, "`shard_size` is 0"),
    ],
)
def test_bad_options_are_refused(folder, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        options(folder, tmp_path, **values)


def test_streams_whole_conversations_and_prompts_of_text_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="`streaming` is true"):
        run_generate_completions(data(streaming=True), options(folder, tmp_path))
    with pytest.raises(ValueError, match='`multi_turn` must be "expand"'):
        run_generate_completions(data(multi_turn="whole"), options(folder, tmp_path))
    (tmp_path / "rows.json").write_text(json.dumps([{"images": [], "prompt": "what?"}]))
    with pytest.raises(ValueError, match="are no messages"):
        run_generate_completions(PromptArguments(str(tmp_path / "rows.json")), options(folder, tmp_path / "set"))
