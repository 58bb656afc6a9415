"""Which files go to large-file storage, and which are ignored: .gitattributes and .gitignore."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

from dulwich.attrs import GitAttributes, compile_gitattributes_patterns, parse_git_attributes
from dulwich.ignore import IgnoreFilter, read_ignore_patterns

_LFS = b"filter=lfs diff=lfs merge=lfs -text"
_LARGE_FILES = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gguf *.gz *.h5 *.joblib *.jpg *.jpeg *.lz4 *.mlmodel *.model"
    " *.mp3 *.mp4 *.msgpack *.npy *.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.png *.pt *.pth *.rar"
    " *.safetensors *.tar *.tflite *.tgz *.wasm *.wav *.webp *.xz *.zip *.zst *tfevents*"
)
DEFAULT_ATTRIBUTES = b"".join(pattern.encode() + b" " + _LFS + b"\n" for pattern in _LARGE_FILES.split())

Matcher = Callable[[str], bool]


def large_file_matcher(attributes: bytes) -> Matcher:
    """path -> whether .gitattributes sends it through git-lfs."""
    compiled = GitAttributes(compile_gitattributes_patterns(parse_git_attributes(BytesIO(attributes))))
    return lambda path: compiled.match_path(path.encode()).get(b"filter") == b"lfs"


def ignore_matcher(gitignore: bytes) -> Matcher:
    """path -> whether .gitignore leaves it out."""
    ignored = IgnoreFilter(read_ignore_patterns(BytesIO(gitignore)))
    return lambda path: bool(ignored.is_ignored(path))


def add_large_files(attributes: bytes, paths: list[str]) -> bytes:
    """.gitattributes with a line for each of these paths, so that git clients know them as large files."""
    if attributes and not attributes.endswith(b"\n"):
        attributes += b"\n"
    return attributes + b"".join(_pattern(path) + b" " + _LFS + b"\n" for path in paths)


def looks_binary(sample: bytes, *, whole: bool) -> bool:
    """Whether a file's first bytes are not UTF-8 text; unless ``whole``, the last character may be cut."""
    if b"\0" in sample:
        return True
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as err:
        cut_off = not whole and err.end == len(sample) and err.reason == "unexpected end of data"
        return not cut_off
    return False


def _pattern(path: str) -> bytes:
    """A pattern that matches this path alone: from the root, glob characters and blanks in brackets."""
    special = {" ": "[[:space:]]", "*": "[*]", "?": "[?]", "[": "[[]"}
    return ("/" + "".join(special.get(character, character) for character in path)).encode()
