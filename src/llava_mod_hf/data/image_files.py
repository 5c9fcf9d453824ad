"""Image files that rows name: inside their folder, whole, and no decompression bombs."""

import io
import struct
import warnings
import zlib
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

TURNED = (5, 6, 7, 8)  # EXIF orientations whose width is the file's height

DEEP_MODES = ("I", "F")

CHUNK = 1 << 20  # bytes of an image that are unpacked at a time

# of an interlaced PNG's passes: first column and row, and their steps
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, steps


def resolve_image(image, root, where, *, whole=True):
    """
    Checks an undecoded image.

    Args:
        image (`dict`): `{"bytes", "path"}`; without bytes the path is relative to `root`.
        root (`Path`): a resolved folder.
        where (`str`): the row, for messages.
        whole (`bool`, *optional*, defaults to `True`): as in [`check_image`].

    Returns:
        `dict`: the image, its path absolute.

    Raises:
        ValueError: if the path leaves the folder, or as [`check_image`].
    """
    if image["bytes"] is not None:
        check_image(io.BytesIO(image["bytes"]), f"{where}: image `{image['path'] or 'in the file'}`", whole=whole)
        return image
    try:
        path = (root / image["path"]).resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{where}: image `{image['path']:.200}` is a link to itself ({error}): mend it.") from error
    except ValueError as error:  # a null character
        raise ValueError(f"{where}: image {image['path']!r:.200} is no name of a file ({error}): mend it.") from error
    if not path.is_relative_to(root):
        raise ValueError(f"{where}: image `{path}` lies outside the image folder `{root}`.")
    try:
        is_file = path.is_file()
    except OSError as error:
        raise ValueError(f"{where}: image `{image['path']:.200}` cannot be looked at ({error.strerror}).") from error
    if not is_file:
        raise ValueError(f"{where}: image `{path}` does not exist.")
    check_image(path, f"{where}: `{path}`", whole=whole)
    return {"bytes": None, "path": str(path)}


def _png_lacks_rows(file):
    """Whether the data of a PNG, whose chunks are whole, ends before its last row."""
    data = file.getvalue() if hasattr(file, "getvalue") else Path(file).read_bytes()
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]  # grey, colours, palette, and the first two with alpha
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in passes]
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    inflate, start = zlib.decompressobj(), 8
    while missing > 0 and start + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[start : start + 8])
        piece = data[start + 8 : start + 8 + length] if name == b"IDAT" else b""
        while piece and missing > 0:
            missing -= len(inflate.decompress(piece, CHUNK))
            piece = inflate.unconsumed_tail
        start += length + 12
    return missing > 0


def open_image(image):
    """An undecoded image `{"bytes", "path"}` as a PIL image, not yet read."""
    return Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))


def shown_size(image):
    """`(width, height)` of an undecoded image as it is shown, and decoded: turned as its EXIF orientation says."""
    with open_image(image) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation) in TURNED
        return opened.size[::-1] if turned else opened.size


LEAVE_OUT = " or leave out the row"


def check_image(file, where, *, whole=True, otherwise=LEAVE_OUT):
    """
    Reads an image, to its end or its header only.

    Args:
        file (`Path` or a file object).
        where (`str`): what the message starts with.
        whole (`bool`, *optional*, defaults to `True`): without it a truncated image is not noticed.
        otherwise (`str`, *optional*): what may be done about it besides replacing it, for messages.

    Raises:
        ValueError: if it is no image, truncated, deeper than 8 bits, or larger than Pillow's limit against
            decompression bombs.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if image.mode in DEEP_MODES or image.mode.startswith("I;16"):
                    raise ValueError(
                        f"{where} has more than 8 bits a value (mode {image.mode}), which would become white or black: "
                        f"scale it to 8 bits{otherwise}."
                    )
                if not whole:
                    return
                if image.format == "PNG":
                    image.verify()  # checksums, and then no reading
                else:
                    image.draft("RGB", (1, 1))  # JPEG: decode an eighth of the size; others ignore it
                    image.load()
        if whole and image.format == "PNG" and _png_lacks_rows(file):  # which Pillow leaves black
            raise ValueError(f"{where} is not a whole image (its data has too few rows): replace it{otherwise}.")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where} is not a whole image ({error}): replace it{otherwise}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{where} is refused as a decompression bomb ({error}).") from error
