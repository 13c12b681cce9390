"""What a format of `ov2 export` is, and what it may take from a model. targets.py lists the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from open_clip_ov2.formats.encoder import Encoder


@dataclass(frozen=True)
class CaptionDecoder:
    """A prefix-LM decoder trained with word pieces; `config` has the keys of the authors' text_decoder_config.json, and
    `vocabulary` is the text of their file of words."""

    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    vocabulary: str


@dataclass(frozen=True)
class ExportSource:
    """The model that is exported.

    `visual` maps images (B, 3, H, W) to the pooled output and patch tokens. `name` is what the new folder will be
    called, or its hub name. `clip_shapes` gives the shapes of OpenCLIP's stock CLIP with a `model_cfg`. `write_whole`
    writes the model with its decoder as an OpenCLIP folder of that name, and raises UserError if there is no decoder.
    `decoder` is a decoder in the authors' format, or the reason why the model has none.
    """

    encoder: Encoder
    visual: nn.Module
    name: str
    clip_shapes: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]
    write_whole: Callable[[Path], None]
    decoder: CaptionDecoder | str


@dataclass(frozen=True)
class Target:
    """One format.

    `write(source, folder, **options)` fills a new folder and may return lines for the user. `options` are its own
    flags, with argparse's keywords. `modules` must be installed; the extra `open_clip_ov2[export]` brings them.
    `example` is the sample of use on the model card and in docs/use.md: `{name}` is the folder or hub name, `{schema}`
    the prefix that timm and OpenCLIP want before it. `library` is the hub's name of the library that loads the folder.
    """

    name: str
    summary: str
    library: str
    example: str
    write: Callable[..., Sequence[str] | None]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    def example_for(self, location: str) -> str:
        """The sample of use for a folder, or for ORG/NAME on the hub."""
        schema = "hf-hub:" if "/" in location else "local-dir:"
        return self.example.format(name=location, schema=schema)
