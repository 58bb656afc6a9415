"""The model inside another."""

from __future__ import annotations

from typing import Any


def unwrap(model: Any) -> Any:
    """The model that PEFT wraps, adapters still in its layers; a plain model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
