"""ONNX with a dynamic batch, checked against torch, and int8 by dynamic quantisation with its measured error.

Input `images` (B, 3, H, W) float32, normalised; outputs `tokens` (B, N, D), patch tokens before the final norm, and
`pooled` (B, output width).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.model_files import write_json
from open_clip_ov2.quiet import quiet

MODEL, INT8 = "encoder.onnx", "encoder_int8.onnx"
# Float32 sums in another order; a wrong export is off by orders of magnitude more.
TOLERANCE = 1e-3
_CHECK_BATCH, _CHECK_SEED = 2, 0


@dataclass(frozen=True)
class Measured:
    """Largest absolute difference to torch over a batch of noise, and the same relative to the largest output."""

    tokens: float
    tokens_relative: float
    pooled: float
    pooled_relative: float


class TokensAndPooled(nn.Module):
    """The two outputs, in the order and under the names of the file."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled_BD, tokens_BND = self.visual(images)
        return tokens_BND, pooled_BD


def write(encoder: Encoder, visual: nn.Module, folder: Path, int8: bool = False) -> dict[str, Measured]:
    """encoder.onnx, with `int8` also encoder_int8.onnx, and export.json; what was measured of each. Raises UserError.

    `visual` is the module that the encoder was taken from.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    module = TokensAndPooled(visual).eval()
    _export(module, encoder, folder / MODEL)
    measured = {MODEL: measure(folder / MODEL, module, encoder)}
    worst = max(measured[MODEL].tokens_relative, measured[MODEL].pooled_relative)
    if not worst <= TOLERANCE:
        raise UserError(f"{folder / MODEL}: onnxruntime and torch differ by {worst:.1e}, more than {TOLERANCE:g}")
    if int8:
        _quantise(folder / MODEL, folder / INT8)
        measured[INT8] = measure(folder / INT8, module, encoder)
    pre = encoder.preprocessing
    write_json(
        folder / "export.json",
        {
            "input": {"images": ["batch", 3, *encoder.image_size]},
            "outputs": {
                "tokens": ["batch", encoder.num_tokens, encoder.width],
                "pooled": ["batch", encoder.output_width],
            },
            "preprocessing": asdict(pre),
            "difference_to_torch": {name: asdict(values) for name, values in measured.items()},
        },
    )
    return measured


def _require(*modules: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install 'open_clip_ov2[export]'")


def _export(module: nn.Module, encoder: Encoder, path: Path) -> None:
    images = torch.zeros(_CHECK_BATCH, 3, *encoder.image_size)
    with quiet(prints=True):
        program: Any = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["tokens", "pooled"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    # Weights beside the graph: protobuf ends at 2 GB, and g/14 is larger.
    program.save(str(path), external_data=True)


def _quantise(source: Path, target: Path) -> None:
    """Weights of matrix products to int8, activations when they come. The patch embedding stays as it is."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():  # it advises a step that the exporter has done already
        quantize_dynamic(
            str(source), str(target), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=True,
        )  # fmt: skip
    for path in target.parent.glob(f"{target.name}*"):
        path.chmod(0o644)  # its weights are written for the owner alone


def measure(path: Path, module: nn.Module, encoder: Encoder) -> Measured:
    """onnxruntime on the CPU against torch, on images that the file was not exported with."""
    import onnxruntime

    generator = torch.Generator().manual_seed(_CHECK_SEED)
    images = torch.randn(_CHECK_BATCH + 1, 3, *encoder.image_size, generator=generator)
    with torch.no_grad():
        expected = module(images)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values: list[float] = []
    for found, true in zip(session.run(["tokens", "pooled"], {"images": images.numpy()}), expected, strict=True):
        difference = (torch.from_numpy(found) - true).abs().max()
        values += [float(difference), float(difference / true.abs().max())]
    return Measured(*values)
