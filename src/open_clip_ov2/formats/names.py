"""The names that another library has for the tensors of our ViT, OpenCLIP's: one table for both directions.

Shapes: D width, N patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Tensor -> its other name, or those of the parts that it is taken apart into. A name that ends in `.` or `_` is a
# module's, whose weight and bias are meant; * is the number of a block.
Names = Mapping[str, tuple[str, ...]]
BLOCK = "transformer.resblocks.*."


class Unfit(Exception):
    """What an encoder has that the other library's does not."""


def renamed(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Tensors under their other names; what has none is left out. Raises Unfit for a tensor of a block without one."""
    out = {}
    for name, value in state.items():
        ending = next(one for one in ("weight", "bias", "") if name.endswith(one))
        number = next(iter(re.findall(r"\.(\d+)\.", name)), "")
        others = names.get(re.sub(r"\.\d+\.", ".*.", name.removesuffix(ending)))
        if others is not None:
            for other, piece in zip(others, value.chunk(len(others)), strict=True):
                out[other.replace("*", number) + ending] = piece
        elif number:
            raise Unfit(f"its blocks have {name.partition(f'.{number}.')[2]}")
    return out


def in_a_batch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the ViTs of timm and transformers have them: class token `(1, 1, D)` and positions `(1, 1 + N, D)`, and a bias
    of the patch embedding, zero if there is none."""
    width = len(state["conv1.weight"])
    return {
        "conv1.bias": torch.zeros(width),
        **state,
        "class_embedding": state["class_embedding"].reshape(1, 1, width),
        "positional_embedding": state["positional_embedding"].reshape(1, -1, width),
    }
