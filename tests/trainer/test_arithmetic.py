"""On processors without bfloat16 instructions: the same weights, computing in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.packaging.manifest import Quantization
from adapterhub.trainer.arithmetic import Arithmetic, arithmetic_of
from adapterhub.trainer.model import load_base

FORMATS = [Quantization(), Quantization(type="fp4", double=False), Quantization(type="int8"), None]


@pytest.mark.parametrize("quantization", FORMATS, ids=["nf4", "fp4", "int8", "bf16"])
def test_the_same_weights_give_the_same_words(
    tiny_base: Path, quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    models = {}
    arithmetic: Arithmetic
    for arithmetic in ("bfloat16", "float32"):
        with monkeypatch.context() as patch:
            patch.setattr("adapterhub.trainer.model.arithmetic_of", lambda _device, found=arithmetic: found)
            models[arithmetic] = load_base(tiny_base, quantization, "cpu").eval()
    wide, narrow = models["float32"].state_dict(), models["bfloat16"].state_dict()
    assert wide.keys() == narrow.keys()
    for name, tensor in narrow.items():
        assert torch.equal(wide[name], tensor.to(wide[name].dtype)), name
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        exact, rounded = (models[name](ids).logits for name in ("float32", "bfloat16"))
    assert exact.dtype == torch.float32
    # bfloat16 has 8 bits of mantissa; two layers of products stay within a few of their roundings.
    assert (exact - rounded.float()).abs().max() < 2**-5 * exact.abs().max()


def test_cuda_computes_in_bfloat16() -> None:
    assert arithmetic_of("cuda") == "bfloat16"
