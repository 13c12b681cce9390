"""Our models in other libraries' formats, one module for each, and the reference's Flax parameters to and from ours.

Imports torch, numpy and safetensors and, inside the functions that need them, transformers, onnx, onnxruntime and
tensorstore; never OpenCLIP.

Shapes in comments: D width, H heads, F MLP width, V vocabulary.
"""

from open_clip_ov2.formats.encoder import Encoder, Preprocessing
from open_clip_ov2.formats.flax import from_flax, to_flax
from open_clip_ov2.formats.flax_read import read_flax
from open_clip_ov2.formats.flax_sizes import FlaxSizes, flax_sizes

__all__ = ["Encoder", "FlaxSizes", "Preprocessing", "flax_sizes", "from_flax", "read_flax", "to_flax"]
