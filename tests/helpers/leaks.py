"""What must not leave a machine, looked for in every byte of what was written or sent."""

import getpass
import gzip
import io
import re
import socket
import zipfile
import zlib
from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"


def private_words(monkeypatch, home, token):
    """
    Gives this process a user, a host and a home that occur nowhere else, and a Hub token.

    Args:
        monkeypatch: pytest's.
        home (`Path`): an existing folder under which everything of the test lies, such as `tmp_path`.
        token (`str`): the Hub token that the process gets, such as `hub.token`.

    Returns:
        `list[str]`: what [`find_leaks`] should not find: token, user, host, home.
    """
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "qzuser")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HOSTNAME", "qzhost")
    monkeypatch.setattr(socket, "gethostname", lambda: "qzhost")
    assert (getpass.getuser(), socket.gethostname(), Path.home()) == ("qzuser", "qzhost", Path(home))
    return [token, "qzuser", "qzhost", str(home)]


def find_leaks(files, words):
    """
    Where one of the words occurs: in a file's name, in its bytes, or in what is packed inside it.

    Zip archives (PyTorch's pickles are some), gzip files and the compressed chunks of PNG images are unpacked; the
    headers of safetensors files are plain bytes.

    Args:
        files (`Path` or `dict[str, bytes]`): a folder, or name → content, such as what a server received.
        words (`list[str]`): as of [`private_words`].

    Returns:
        `list[str]`: `"<file>: <word>"` of each.
    """
    if not isinstance(files, dict):
        folder = Path(files)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = []
    for name, content in files.items():
        for data in [name.encode(), *_unpacked(content)]:
            for word in words:
                if any(form in data for form in (word.encode(), word.encode("utf-16-le"), word.encode("utf-16-be"))):
                    found.append(f"{name}: {word}")
    return found


def _unpacked(data):
    yield data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from _unpacked(archive.read(name))
    if data.startswith(b"\x1f\x8b"):
        yield from _unpacked(gzip.decompress(data))
    if data.startswith(PNG):
        yield from _png_texts(data)


def _png_texts(data):
    """The compressed text of `zTXt` and `iTXt` chunks; the pixels are no text."""
    for kind in re.finditer(rb"zTXt|iTXt", data):
        length = int.from_bytes(data[kind.start() - 4 : kind.start()], "big")
        chunk = data[kind.end() : kind.end() + length]
        for start in (part.end() for part in re.finditer(rb"\0", chunk)):
            try:
                yield zlib.decompressobj().decompress(chunk[start:])
            except zlib.error:
                continue
