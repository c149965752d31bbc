"""What a file is by its first bytes, whatever it is called.

Downloads go wrong in ways that leave a file under the right name: a git-LFS pointer, a login page,
an answer of a server in JSON. What they are is said here, instead of "damaged".
"""

from __future__ import annotations

import codecs
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import Literal

from motionmerge.errors import CheckpointError

Format = Literal["safetensors", "torch"]

PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin"})
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file."""

_LOOKED_AT = 1024
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_TAR_MAGIC = slice(257, 262)
_NO_WEIGHTS = "Give a .safetensors file, a folder of them, or a .ckpt/.pt/.pth/.bin file."
_LOOK_AT_IT = "Look at it with a text editor, and download the weights again."
_EXTRACT = "Extract it, and give the weights in it."

_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"GGUF",
        "a GGUF file, whose weights are quantised in blocks",
        "Merge the unquantised safetensors of the model. For a tool that reads GGUF, write the "
        "experts as LoRAs (`motionmerge export loras`) and load them there on the GGUF file.",
    ),
    (b"\x1f\x8b", "an archive (gzip)", _EXTRACT),
    (b"BZh", "an archive (bzip2)", _EXTRACT),
    (b"\xfd7zXZ\0", "an archive (xz)", _EXTRACT),
    (b"\x28\xb5\x2f\xfd", "an archive (zstd)", _EXTRACT),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z)", _EXTRACT),
    (b"Rar!", "an archive (rar)", _EXTRACT),
    (b"\x89HDF\r\n", "an HDF5 file", "Give the model's weights for PyTorch."),
    (b"\x93NUMPY", "an array of NumPy", _NO_WEIGHTS),
    (b"\x89PNG", "a picture", _NO_WEIGHTS),
    (b"\xff\xd8\xff", "a picture", _NO_WEIGHTS),
    (b"GIF8", "a picture", _NO_WEIGHTS),
    (b"RIFF", "a picture or video", _NO_WEIGHTS),
    (b"%PDF", "a PDF document", _NO_WEIGHTS),
    (b"\x7fELF", "a program", _NO_WEIGHTS),
)


def weights_format(path: Path) -> Format:
    """Return how the weights in a file are stored, by its first bytes, then by its name.

    Raises:
        CheckpointError: It is missing, empty, or something else than weights, which is named; or
            it is a pickle that is called `.safetensors`.
    """
    size, begin = _begin(path)
    suffix = path.suffix.lower()
    if not size:
        raise _refused(path, "empty (0 bytes)", "Download or export it again.")
    if _is_safetensors(begin, size):
        return "safetensors"
    _refuse_text(path, begin)
    for magic, kind, fix in _OTHERS:
        if begin.startswith(magic):
            raise _refused(path, kind, fix)
    if begin[_TAR_MAGIC] == b"ustar":
        raise _refused(path, "an archive (tar)", _EXTRACT)
    is_zip = begin.startswith(b"PK\x03\x04")
    if is_zip:
        _refuse_other_zip(path)
    if is_zip or begin.startswith(_PICKLES):
        if suffix == ".safetensors":
            raise _refused(
                path,
                f"{'a zip archive' if is_zip else 'a pickle'} as `torch.save` writes it, and no "
                "safetensors file",
                "Get the safetensors version; or, if you trust it, rename it to .pt.",
            )
        return "torch"
    if suffix == ".safetensors":
        return "safetensors"  # the reader says what is wrong with it
    if suffix in PICKLE_SUFFIXES:
        return "torch"
    raise CheckpointError(f"{path} has the unknown ending `{path.suffix}`.", fix=_NO_WEIGHTS)


def _begin(path: Path) -> tuple[int, bytes]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise _refused(path, "no plain file", _NO_WEIGHTS)
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(_LOOKED_AT)
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise _refused(
                path, f"a link to {path.readlink()}, which is not there", "Download it again."
            ) from error
        raise CheckpointError(f"Cannot open {path}: {error}", fix="Check the path.") from error


def _is_safetensors(begin: bytes, size: int) -> bool:
    if len(begin) < 10 or begin[8:9] != b"{":
        return False
    header = int.from_bytes(begin[:8], "little")
    return 2 <= header <= min(MAX_HEADER_BYTES, size - 8)


def _refuse_text(path: Path, begin: bytes) -> None:
    """Refuse what is text: pointers, web pages, JSON, a server's answer."""
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        begin = begin.decode("utf-16", "replace").encode()
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"version https://git-lfs", b"version https://hawser")):
        words = begin.decode("ascii", "replace").split()
        size = words[words.index("size") + 1] if "size" in words[:-1] else "unknown"
        raise _refused(
            path,
            f"a git-LFS pointer: a few lines of text in place of a file of {size[:20]} bytes, "
            "which was not downloaded",
            "Run `git lfs pull` in its folder, or download the file with `hf download`.",
        )
    if text.startswith((b"/annex/objects/", b"../.git/annex", b".git/annex")):
        raise _refused(
            path,
            "a git-annex pointer in place of a file that was not downloaded",
            "Run `git annex get` in its folder.",
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<body", b"<error")):
        raise _refused(
            path,
            "a web page (HTML or XML), such as a login or error page, in place of the file",
            "Download the file itself: its address has `/resolve/` in place of `/blob/`; log in "
            "with `hf auth login` if it is gated.",
        )
    if text.startswith((b"{", b"[")):
        is_index = b'"weight_map"' in begin or b'"metadata"' in begin[:100]
        raise _refused(
            path,
            "JSON text" + (", an index of shards" if is_index else ", such as a server's answer"),
            "Give the folder with the index and its shards." if is_index else _LOOK_AT_IT,
        )
    if answer := _printable(begin):
        raise _refused(path, f"text, such as a server's answer: {answer[:60]!r}", _LOOK_AT_IT)


def _printable(begin: bytes) -> str:
    """Return the text that the first bytes are, without line breaks; empty if they are none."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(begin)
    except UnicodeDecodeError:
        return ""
    words = " ".join(text.split())
    return words if words.isprintable() else ""


def _refuse_other_zip(path: Path) -> None:
    """Refuse an archive that `torch.save` did not write; one that is damaged is torch's to name."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error):
        return
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        holds = f" with {names[0][:60]!r} in it" if names else ""
        raise _refused(path, f"an archive (zip){holds}, and no torch checkpoint", _EXTRACT)


def _refused(path: Path, kind: str, fix: str) -> CheckpointError:
    return CheckpointError(f"{path} is {kind}.", fix=fix)
