"""The reference's Flax parameters to our state dict and back, exact.

Imports torch, numpy and, to read Orbax, tensorstore.

Shapes in comments: D width, H heads, F MLP width, V vocabulary.
"""

from open_clip_ov2.convert.flax import from_flax, to_flax
from open_clip_ov2.convert.read import read_flax
from open_clip_ov2.convert.sizes import FlaxSizes, flax_sizes

__all__ = ["FlaxSizes", "flax_sizes", "from_flax", "read_flax", "to_flax"]
