"""A rotation that is not the operator's is left."""

from __future__ import annotations

from typing import Any

from hugging_face_models import MODELS

import fastformer
from fastformer.integrations.acceleration.rebinding import global_names, rebind


def test_another_rotation_is_left() -> None:
    model = MODELS["Llama"].build()
    attention = model.model.layers[0].self_attn
    original = type(attention)
    own = global_names(original.forward)["apply_rotary_pos_emb"]

    def backwards(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return own(q, k, cos, -sin, unsqueeze_dim=unsqueeze_dim)

    forward = rebind(original.forward, {"apply_rotary_pos_emb": backwards})
    attention.__class__ = type("Backwards", (original,), {"forward": forward})
    left = {made.module: made.detail for made in fastformer.accelerate(model).left}
    assert left["model.layers.0.self_attn"] == "apply_rotary_pos_emb is another rotation"
