"""Our encoders in other libraries' formats, one module for each. Imports torch, safetensors and, inside the functions
that need them, transformers, onnx and onnxruntime; never OpenCLIP.
"""

from open_clip_ov2.export.encoder import Encoder, Preprocessing

__all__ = ["Encoder", "Preprocessing"]
