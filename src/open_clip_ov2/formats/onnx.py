"""ONNX with a dynamic batch, checked against torch; int8 weights as an option, with their measured error.

Input `images` (B, 3, H, W) float32, normalized; outputs `tokens` (B, N, D), patch tokens before the final norm, and
`pooled` (B, output width).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import write_json
from open_clip_ov2.formats.target import ExportSource, Target
from open_clip_ov2.quiet import quiet

MODEL, INT8 = "encoder.onnx", "encoder_int8.onnx"
# Float32 sums in another order differ by less; a wrong export differs by orders of magnitude more.
TOLERANCE = 1e-3
_CHECK_BATCH, _CHECK_SEED = 2, 0


class TokensAndPooled(nn.Module):
    """The two outputs, in the order of the file."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled_BD, tokens_BND = self.visual(images)
        return tokens_BND, pooled_BD


def write(source: ExportSource, folder: Path, int8: bool = False) -> list[str]:
    """Write encoder.onnx and export.json, with `int8` also encoder_int8.onnx. Raises UserError."""
    encoder, module = source.encoder, TokensAndPooled(source.visual).eval()
    shape = (3, *encoder.image_size)
    _export(module, shape, folder / MODEL)
    measured = {MODEL: measure(folder / MODEL, module, shape)}
    worst = max(measured[MODEL]["tokens_relative"], measured[MODEL]["pooled_relative"])
    if not worst <= TOLERANCE:
        raise UserError(f"{folder / MODEL}: onnxruntime and torch differ by {worst:.1e}, more than {TOLERANCE:g}")
    if int8:
        _quantize(folder / MODEL, folder / INT8)
        measured[INT8] = measure(folder / INT8, module, shape)
    outputs = {
        "tokens": ["batch", encoder.num_tokens, encoder.width],
        "pooled": ["batch", encoder.output_width],
    }
    about = {
        "input": {"images": ["batch", *shape]},
        "outputs": outputs,
        "preprocessing": asdict(encoder.preprocessing),
        "difference_to_torch": measured,
    }
    write_json(folder / "export.json", about)
    return [
        f"{name}: largest difference to torch {values['tokens']:.1e} (patch tokens, {values['tokens_relative']:.1e} "
        f"relative), {values['pooled']:.1e} (pooled, {values['pooled_relative']:.1e} relative)"
        for name, values in measured.items()
    ]


def _export(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    with quiet(prints=True):
        program: Any = torch.onnx.export(
            module,
            (torch.zeros(_CHECK_BATCH, *shape),),
            dynamo=True,
            input_names=["images"],
            output_names=["tokens", "pooled"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    # Weights go into a file beside the graph: protobuf is limited to 2 GB, and g/14 is larger.
    program.save(str(path), external_data=True)


def _quantize(source: Path, target: Path) -> None:
    """Quantize weights of matrix products to int8, activations at run time. The patch embedding stays float32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():  # it advises a step that the exporter has done already
        quantize_dynamic(
            str(source), str(target), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=True,
        )  # fmt: skip
    for path in target.parent.glob(f"{target.name}*"):
        path.chmod(0o644)  # onnx makes the file of weights readable by its owner only


def measure(path: Path, module: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """Largest absolute difference to torch of each output, and the same relative to the largest output.

    onnxruntime runs on the CPU, on a batch of noise of another size than the file was exported with.
    """
    import onnxruntime

    generator = torch.Generator().manual_seed(_CHECK_SEED)
    images = torch.randn(_CHECK_BATCH + 1, *shape, generator=generator)
    with torch.no_grad():
        expected = module(images)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, values = ["tokens", "pooled"], {}
    for name, found, true in zip(names, session.run(names, {"images": images.numpy()}), expected, strict=True):
        difference = (torch.from_numpy(found) - true).abs().max()
        values[name] = float(difference)
        values[f"{name}_relative"] = float(difference / true.abs().max())
    return values


TARGET = Target(
    name="onnx",
    summary="ONNX with a dynamic batch, checked with onnxruntime",
    library="onnx",
    example="""import onnxruntime

session = onnxruntime.InferenceSession("{name}/encoder.onnx")
tokens, pooled = session.run(["tokens", "pooled"], {{"images": images.numpy()}})""",
    write=write,
    options={"--int8": {"action": "store_true", "help": "also write int8 weights, with their measured error"}},
    modules=("onnx", "onnxscript", "onnxruntime"),
)
