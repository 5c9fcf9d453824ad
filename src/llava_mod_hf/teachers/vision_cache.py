"""Features of frozen vision encoders on disk: a picture is encoded once, over epochs, stages and runs."""

import contextlib
import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LlavaModel

from llava_mod_hf.fingerprints import content_hash, tensors_hash
from llava_mod_hf.teachers.vision_sharing import DROPOUTS, vision_config_hash

logger = logging.getLogger(__name__)

KIND_FILE = "encoder.json"  # of an encoder's folder: what each of its files has to hold

RESERVE = 2**30  # bytes of the disk that are left to checkpoints and others


class VisionCache:
    """
    What frozen vision encoders make of pictures, as `folder/<encoder>/<two digits>/<picture>.safetensors`.

    An encoder is a hash of its config and weights, of the layers that are read and of the precision of autocast; a
    picture one of the bits of its pixels, with their shape and dtype. So nothing is ever stale: what differs has
    another name. Features are kept as the adaptor reads them, of autocast's dtype where that is narrower, so that
    nothing is lost. Files are written beside their place and moved into it: processes may share a folder, and a file
    that is cut off or of another shape is made anew.

    Args:
        folder (`str` or `Path`): created if missing.

    Raises:
        ValueError: if nothing can be written there.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self._names, self._kinds, self._writes = WeakKeyDictionary(), {}, True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"`vision_cache` is `{folder}`, where nothing can be written ({error}): give another folder."
            ) from error

    def features(self, tower, pixel_values, layers, **kwargs):
        """
        A tower's hidden states, of the pictures that are not kept from the tower itself.

        Args:
            tower (`nn.Module`): a vision tower, or a [`~llava_mod_hf.teachers.vision_sharing.SharedVisionTower`].
            pixel_values (`torch.Tensor` of shape `(pictures, …)`).
            layers (`tuple[int]`): of the hidden states that are asked for.
            kwargs: of the tower.

        Returns:
            `dict[int, torch.Tensor]` or `None`: layer → `(pictures, tokens, width)`; `None` where the encoder is
            trained or has no weights here, and has to be asked.
        """
        encoder = getattr(tower, "source", tower)
        weights = [*encoder.parameters()]
        if pixel_values.requires_grad or any(weight.requires_grad or weight.is_meta for weight in weights):
            return None
        narrow = _autocast_dtype(pixel_values.device.type)
        folder = self.folder / content_hash([self.encoder_name(encoder), list(layers), str(narrow)])
        keys, device = picture_keys(pixel_values), pixel_values.device
        places = {}
        for place, key in enumerate(keys):
            places.setdefault(key, place)
        kind = self._kind_of(folder)
        found = {} if kind is None else self._read(folder, places, layers, kind)

        def encode(wanted):
            few = pixel_values if len(wanted) == len(keys) else pixel_values[[places[key] for key in wanted]]
            states = tower(few, **kwargs).hidden_states
            states = [_narrowed(states[layer].detach(), narrow) for layer in layers]
            # in the order of memory: another one is another way through a matrix product, which rounds otherwise
            transposed = states[0].stride(-1) != 1
            states = [each.transpose(1, 2) for each in states] if transposed else states
            made = {key: [each[row] for each in states] for row, key in enumerate(wanted)}
            return made, _kind(layers, states[0][0], transposed)

        missing = [key for key in places if key not in found]
        if missing:
            made, new = encode(missing)
            if found and new["transposed"] != kind["transposed"]:
                missing = [*places]
                made, new = encode(missing)
            found, kind = {**found, **made}, new
            if encoder is tower:  # else in the teacher's dtype, and the student has kept it already
                self._keep(folder, made, layers, kind)
        together = [torch.stack([found[key][i].to(device if missing else "cpu") for key in keys]).to(device)
                    for i in range(len(layers))]  # fmt: skip
        together = [states.transpose(1, 2) for states in together] if kind["transposed"] else together
        if encoder is not tower:
            together = [_narrowed(states.to(tower.dtype), narrow) for states in together]
        return dict(zip(layers, together, strict=True))

    def encoder_name(self, encoder):
        """A hash of what has an influence on an encoder's features: its config, and its weights in their precision."""
        # whoever loads other weights into it, or casts them, changes one of these
        state = [(weight._version, weight.data_ptr(), weight.dtype) for weight in encoder.parameters()]
        if self._names.get(encoder, (None,))[0] != state:
            self._names[encoder] = state, content_hash([vision_config_hash(encoder), tensors_hash(encoder)])
        return self._names[encoder][1]

    def _kind_of(self, folder):
        """What the files of an encoder's folder have to hold, or `None` if nobody has said it."""
        if folder not in self._kinds:
            try:
                kind = json.loads((folder / KIND_FILE).read_text(encoding="utf-8"))
                self._kinds[folder] = kind if kind.keys() == _kind((), torch.empty(0), False).keys() else None
            except (OSError, ValueError, AttributeError):
                return None
        return self._kinds[folder]

    def _read(self, folder, keys, layers, kind):
        """`{picture: a tensor a layer}` of those pictures that have a whole file of the right kind."""
        found = {}
        for key in keys:
            try:
                with safe_open(_file(folder, key), framework="pt") as file:
                    states = [file.get_tensor(str(layer)) for layer in layers]
            except (OSError, SafetensorError):
                continue
            if all(_kind(layers, each, kind["transposed"]) == kind for each in states):
                found[key] = states
        return found

    def _keep(self, folder, made, layers, kind):
        if not self._writes:
            return
        try:
            if self._kinds.get(folder) != kind:
                with _moved_into(folder / KIND_FILE) as path:
                    path.write_text(json.dumps(kind) + "\n", encoding="utf-8")
                self._kinds[folder] = kind
            for key, states in made.items():
                size = sum(each.nbytes for each in states)
                if shutil.disk_usage(self.folder).free < RESERVE + size:
                    raise OSError(f"{RESERVE / 1e9:.1f} GB of the disk are left for the rest")
                with _moved_into(_file(folder, key)) as path:
                    tensors = zip(layers, states, strict=True)
                    save_file({str(layer): each.cpu().contiguous() for layer, each in tensors}, path)
        except (OSError, SafetensorError) as error:
            self._writes = False
            logger.warning(
                "`vision_cache`: nothing more is written to `%s` (%s): the run goes on, reads what is there, and "
                "encodes the other pictures as often as they come.",
                self.folder,
                " ".join(str(error).split()),
            )


def picture_keys(pixel_values):
    """
    What pictures are found by: a hash of their bits, shape and dtype.

    Args:
        pixel_values (`torch.Tensor` of shape `(pictures, …)`).

    Returns:
        `list[str]`: 32 hexadecimal digits each.
    """
    kind = f"{pixel_values.dtype} {[*pixel_values.shape[1:]]}".encode()
    rows = pixel_values.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    # no hash for secrets: at its speed the features of a picture are read in the time that sha256 takes of its pixels
    return [xxhash.xxh3_128_hexdigest(row.tobytes() + kind) for row in rows]


def check_cacheable(model):
    """
    Refuses a student whose features are not the same whenever it sees a picture.

    Args:
        model (`PreTrainedModel`): the student, what it does not train frozen.

    Raises:
        ValueError: if it is no LLaVA, or its encoder is trained or draws dropout.
    """
    if not isinstance(model.base_model, LlavaModel):
        raise ValueError(
            f"`vision_cache` keeps the features of a LLaVA's encoder, and the student is a {type(model).__name__}: "
            "leave it out."
        )
    tower = model.base_model.vision_tower
    trained = [name for name, weight in tower.named_parameters() if weight.requires_grad]
    if trained:
        raise ValueError(
            f"`vision_cache` keeps the features of a frozen encoder, and {len(trained)} tensors of this one are "
            f"trained (`{trained[0]}`): leave it out, or freeze the encoder."
        )
    dropout = next((name for name in DROPOUTS if getattr(tower.config, name, 0)), None)
    if dropout is not None:
        raise ValueError(
            f"`vision_cache` keeps the features of a picture, and the encoder draws others each time (its config has "
            f"`{dropout}` {getattr(tower.config, dropout)}): leave it out, or set that to 0."
        )


def bytes_of_picture(config, itemsize):
    """
    Args:
        config (`LlavaConfig`): with `image_seq_length`.
        itemsize (`int`): bytes of a number.

    Returns:
        `int`: that the features of one picture take on disk, about.
    """
    layers = config.vision_feature_layer
    tokens = config.image_seq_length + (config.vision_feature_select_strategy == "default")
    return (1 if isinstance(layers, int) else len(layers)) * tokens * config.vision_config.hidden_size * itemsize


def check_room(folder, pictures, sizes):
    """
    Args:
        folder (`str` or `Path`): of the cache; it may be missing yet. What it has of whichever encoder is not counted.
        pictures (`int`): that will be read.
        sizes (`list[int]`): bytes of a picture, of each encoder.

    Returns:
        `tuple[int, int]`: bytes that are to be written at most, and those that may be.

    Raises:
        ValueError: if there is no room for them.
    """
    folder = Path(folder)
    files = pictures * len(sizes)
    kept = sum(1 for _ in folder.glob("*/*/*.safetensors"))
    needed = pictures * sum(sizes) * max(0, files - kept) // max(1, files)
    disk = folder.resolve()
    while not disk.exists():
        disk = disk.parent
    free = max(0, shutil.disk_usage(disk).free - RESERVE)
    if needed > free:
        raise ValueError(
            f"`vision_cache` takes {needed / 1e9:.3g} GB more for {pictures:,} pictures, and {free / 1e9:.3g} GB are "
            f"free at `{folder}` beside {RESERVE / 1e9:.1f} GB for the rest: make room, give a folder on another "
            "disk, or leave it out."
        )
    return needed, free


def _autocast_dtype(device_type):
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _narrowed(states, dtype):
    """As a matrix product under autocast reads them."""
    return states if dtype is None or states.dtype.itemsize <= dtype.itemsize else states.to(dtype)


def _kind(layers, states, transposed):
    dtype, shape = str(states.dtype).removeprefix("torch."), list(states.shape)
    return {"layers": list(layers), "dtype": dtype, "shape": shape, "transposed": transposed}


def _file(folder, key):
    return folder / key[:2] / f"{key}.safetensors"


@contextlib.contextmanager
def _moved_into(path):
    """A path beside another, whose file takes that place once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
