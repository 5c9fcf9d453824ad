"""Image features on disk: which pictures and encoders they are of, and what is never trusted."""

import json
import shutil
import threading

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, Qwen2Config

from helpers.live_teacher_cases import examples
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.data.held_out import count_pictures, shared_pictures
from llava_mod_hf.teachers import vision_cache
from llava_mod_hf.teachers.unique_images import encode_once, keep_features
from llava_mod_hf.teachers.vision_cache import VisionCache, bytes_of_picture, check_room, picture_keys
from llava_mod_hf.teachers.vision_sharing import share_vision_tower

SIZE = 16


@pytest.fixture
def make_model():
    """`make_model(**config)`: a LLaVA of a CLIP of 4 patches and a CLS, which it leaves out; frozen."""

    def make(**config):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision_config = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=8)
        text_config = Qwen2Config(vocab_size=8, num_key_value_heads=2, **sizes)
        config = LlavaModConfig(
            vision_config=vision_config, text_config=text_config, image_token_index=1, image_seq_length=4, **config
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlavaModForConditionalGeneration(config).eval().requires_grad_(False)

    return make


def pictures(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def outputs(model, pixels):
    """Hidden states, and the pictures that were encoded."""
    seen = []
    tower = model.model.vision_tower
    hook = getattr(tower, "source", tower).embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    ids = torch.ones(1, 4 * len(pixels) + 1, dtype=torch.long)
    ids[:, -1] = 2
    hidden = model.base_model(input_ids=ids, pixel_values=pixels).last_hidden_state
    hook.remove()
    return hidden, sum(seen)


def files(folder):
    return sorted(folder.glob("*/*/*.safetensors"))


@pytest.mark.parametrize("layer", [-2, 1, [-2, -1]])
def test_what_is_read_is_what_the_encoder_gives(make_model, tmp_path, layer):
    """A row of several pictures, two of which are the same."""
    model = make_model(vision_feature_layer=layer)
    pixels = pictures(3)[[0, 1, 0, 2]]
    plain, _ = outputs(model, pixels)
    keep_features(VisionCache(tmp_path), model)
    for count in (3, 0):
        found, encoded = outputs(model, pixels)
        assert encoded == count and found.equal(plain)
    layers = [layer] if isinstance(layer, int) else layer
    kept = load_file(files(tmp_path)[0])
    assert {name: states.shape for name, states in kept.items()} == {str(each): (5, 16) for each in layers}
    assert bytes_of_picture(model.config, 4) == sum(states.nbytes for states in kept.values())
    again, encoded = outputs(model, pixels[:2].flip(0))
    torch.testing.assert_close(again, outputs(make_model(vision_feature_layer=layer), pixels[:2].flip(0))[0])
    assert encoded == 0, "whatever batch they come in"


def test_a_teacher_that_shares_the_encoder_in_another_dtype_reads_and_does_not_write(make_model, tmp_path):
    student, whole = make_model(), make_model().bfloat16()
    student.model.vision_tower.bfloat16().float()  # so that both hold the same numbers
    teacher = share_vision_tower(student, whole)
    assert teacher is not whole
    keep_features(VisionCache(tmp_path), student, teacher)
    pixels = pictures(2)
    assert outputs(teacher, pixels)[0].dtype == torch.bfloat16 and not files(tmp_path)
    outputs(student, pixels)
    assert {states["-2"].dtype for states in map(load_file, files(tmp_path))} == {torch.float32}
    assert outputs(teacher, pixels)[0].dtype == torch.bfloat16 and len(files(tmp_path)) == 2


def test_keys_tell_pictures_and_ways_of_preparing_them_apart():
    pixels = pictures(3)
    keys = picture_keys(pixels)
    assert len({*keys}) == 3 and picture_keys(pixels[[2, 0]]) == [keys[2], keys[0]]
    assert picture_keys(pixels.transpose(2, 3).contiguous().transpose(2, 3)) == keys
    for other in (pixels.double(), pixels.bfloat16(), pixels * 0.5, pixels.flip(-1), pixels.view(3, 3, 8, 32)):
        assert not {*picture_keys(other)} & {*keys}
    pixels[0, 2, 15, 15] = torch.nextafter(pixels[0, 2, 15, 15], torch.tensor(9.0))
    assert picture_keys(pixels)[0] != keys[0] and picture_keys(pixels)[1:] == keys[1:]
    assert picture_keys(pixels[:0]) == []
    assert picture_keys(torch.zeros(1, 4)) != picture_keys(torch.zeros(1, 2, 2))


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "dtype", "layer", "text"])
def test_a_damaged_file_is_made_anew(make_model, tmp_path, damage):
    model, pixels = make_model(), pictures(2)
    keep_features(VisionCache(tmp_path), model)
    plain, _ = outputs(model, pixels)
    file = files(tmp_path)[0]
    whole = file.read_bytes()
    states = load_file(file)["-2"]
    if damage in ("cut", "empty", "text"):
        file.write_bytes({"cut": whole[:-1], "empty": b"", "text": b"features"}[damage])
    else:
        kinds = {"shape": {"-2": states[1:]}, "dtype": {"-2": states.half()}, "layer": {"-1": states}}
        save_file({name: each.contiguous() for name, each in kinds[damage].items()}, file)
    for count in (1, 0):
        found, encoded = outputs(model, pixels)
        assert encoded == count
        torch.testing.assert_close(found, plain)
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "gone", "transposed", "shape"])
def test_files_of_another_kind_than_the_folder_says_are_made_anew(make_model, tmp_path, content):
    model, pixels = make_model(), pictures(2)
    keep_features(VisionCache(tmp_path), model)
    plain, _ = outputs(model, pixels)
    (kind,) = tmp_path.glob("*/encoder.json")
    said = json.loads(kind.read_text())
    assert said == {"layers": [-2], "dtype": "float32", "shape": [5, 16], "transposed": False}
    if content == "transposed":  # as by a library whose encoder lays its features out in another way
        kind.write_text(json.dumps({**said, "transposed": True}))
    elif content == "shape":
        kind.write_text(json.dumps({**said, "shape": [16, 5]}))
    elif content == "gone":
        kind.unlink()
    else:
        kind.write_text(content)
    keep_features(VisionCache(tmp_path), model)
    if content == "transposed":
        outputs(model, pictures(3, seed=1))
    else:
        assert outputs(model, pixels)[1] == 2
    found, encoded = outputs(model, pixels)
    assert found.equal(plain) and encoded == 0
    assert json.loads(kind.read_text()) == said


def test_some_of_a_batch_laid_out_in_another_way(make_model, tmp_path):
    model, pixels = make_model(), pictures(3)
    plain, _ = outputs(model, pixels)
    keep_features(VisionCache(tmp_path), model)
    outputs(model, pixels[:2])
    (kind,) = tmp_path.glob("*/encoder.json")
    kind.write_text(json.dumps({**json.loads(kind.read_text()), "transposed": True}))
    keep_features(VisionCache(tmp_path), model)
    found, encoded = outputs(model, pixels)
    assert found.equal(plain) and encoded == 4, "the new one, and then all of them"


def test_what_has_a_gradient_goes_through_the_encoder(make_model, tmp_path):
    model, pixels = make_model(), pictures(2)
    keep_features(VisionCache(tmp_path), model)
    outputs(model, pixels)
    assert outputs(model, pixels.clone().requires_grad_())[0].requires_grad
    weight = next(model.model.vision_tower.parameters())
    weight.requires_grad_(True)
    assert outputs(model, pixels)[1] == 2
    weight.requires_grad_(False)
    assert outputs(model, pixels)[1] == 0
    with torch.inference_mode():
        assert outputs(model, pixels)[1] == 0
    keep_features(None, model)
    assert outputs(model, pixels)[1] == 2


def test_changed_weights_are_another_encoder(make_model, tmp_path):
    model, pixels = make_model(), pictures(1)
    keep_features(VisionCache(tmp_path), model)
    outputs(model, pixels)
    tower = model.model.vision_tower
    tower.load_state_dict({name: 2 * value for name, value in tower.state_dict().items()})
    plain = make_model()
    plain.model.vision_tower.load_state_dict(tower.state_dict())
    found, encoded = outputs(model, pixels)
    assert encoded == 1 and found.equal(outputs(plain, pixels)[0])
    assert outputs(model.bfloat16(), pixels)[1] == 1  # it casts the same pixels itself
    model.float()
    assert outputs(model, pixels)[1] == 1, "rounded weights are other weights"
    tower.config.layer_norm_eps = 0.1
    keep_features(VisionCache(tmp_path), model)
    assert outputs(model, pixels)[1] == 1
    assert len([*tmp_path.iterdir()]) == 5


def test_models_that_read_other_layers_keep_their_own(make_model, tmp_path):
    models, pixels = [make_model(vision_feature_layer=layer) for layer in (-2, -1)], pictures(2)
    keep_features(VisionCache(tmp_path), *models)
    assert [outputs(model, pixels)[1] for model in models * 2] == [2, 2, 0, 0]


def test_two_that_write_the_same_leave_whole_files(make_model, tmp_path):
    pixels = pictures(16)
    models = [make_model() for _ in range(2)]
    for model in models:
        keep_features(VisionCache(tmp_path), model)
    threads = [threading.Thread(target=outputs, args=(model, pixels)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files(tmp_path)) == 16 and not [*tmp_path.glob("**/.*")]
    reader = make_model()
    keep_features(VisionCache(tmp_path), reader)
    assert outputs(reader, pixels)[1] == 0


def test_a_model_has_one_that_stands_for_its_encoder(make_model):
    model = make_model()
    assert encode_once(model) is encode_once(model)
    assert encode_once(torch.nn.ModuleDict({"base_model": torch.nn.Linear(1, 1)})) is None


def test_room_is_that_of_the_pictures_that_are_missing(tmp_path, monkeypatch):
    free = vision_cache.RESERVE + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    folder = tmp_path / "cache"
    assert check_room(folder, 10, [60, 40]) == (1000, 1000)
    assert check_room(folder, 0, [60]) == (0, 1000)
    with pytest.raises(
        ValueError, match=r"takes 1.1e-06 GB more for 11 pictures, and 1e-06 GB are free at .*1.1 GB for"
    ):
        check_room(folder, 11, [60, 40])
    (folder / "a" / "00").mkdir(parents=True)
    for name in range(2):
        (folder / "a" / "00" / f"{name}.safetensors").touch()
    assert check_room(folder, 11, [60, 40]) == (1000, 1000)


def test_pictures_are_counted_once(tmp_path):
    rows = [dict(row) for row in examples(3)]
    features = Features({"images": List(Image()), "name": Value("string")})
    images = [rows[0]["images"], [*rows[1]["images"], *rows[0]["images"]], [], rows[1]["images"]]
    dataset = Dataset.from_dict({"images": images, "name": [*"abcd"]}, features=features)
    assert count_pictures(dataset) == 2
    for name in ("a.png", "b.png"):
        rows[0]["images"][0].save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "a.png")]
    single = Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    assert count_pictures(single) == 2, "nobody has read them"
    assert count_pictures(single.to_iterable_dataset()) is None
    assert count_pictures(dataset.remove_columns("images")) is None
    assert count_pictures(None) is None
    others = dataset.select([0, 2])
    assert (shared_pictures(dataset, others), shared_pictures(others, dataset)) == ((1, 1), (1, 2))
    assert shared_pictures(dataset, single) == (0, 2), "a copy in a file is another picture"
    streamed = dataset.to_iterable_dataset()
    assert shared_pictures(dataset, streamed) is None and shared_pictures(streamed, dataset) is None
