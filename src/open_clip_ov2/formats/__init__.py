"""Our models in other libraries' formats, one module for each, and the reference's Flax parameters to and from ours.

transformers, onnx, onnxruntime and tensorstore are imported by the functions that need them. OpenCLIP is not.

Shapes in comments: D width, H heads, F MLP width, V vocabulary.
"""

from open_clip_ov2.formats.encoder import Encoder, Preprocessing
from open_clip_ov2.formats.flax import flax_model_cfg, from_flax, read_flax, to_flax

__all__ = ["Encoder", "Preprocessing", "flax_model_cfg", "from_flax", "read_flax", "to_flax"]
