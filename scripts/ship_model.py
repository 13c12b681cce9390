"""Put a folder that `ov2 export --to ov2` wrote into the package as a pretrained tag, with weights in float16.

python scripts/ship_model.py FOLDER NAME TAG
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import rendered_data
import torch
from safetensors.torch import load_file, save_file

PRETRAINED = Path(__file__).parents[1] / "src" / "open_clip_ov2" / "pretrained"


def main() -> None:
    """Round the weights to float16, which OpenCLIP loads into float32, and say in the card how to load them."""
    source, name, tag = Path(sys.argv[1]), *sys.argv[2:]
    out = PRETRAINED / tag
    out.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.safetensors"):
        tensors = {key: value.to(torch.float16).contiguous() for key, value in load_file(path).items()}
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        (out / path.name).chmod(0o644)
    for file in ("open_clip_config.json", "vocab.txt"):
        shutil.copy(source / file, out / file)
    card = (source / "README.md").read_text(encoding="utf-8")
    card = card.replace(f'"local-dir:{source.name}"', f'"{name}", pretrained="{tag}"')
    reads = "It reads rendered text, charts and shapes; docs/demo.md of open_clip_ov2 has the figures."
    made = (
        "`bash scripts/rendered_model.sh` in open_clip_ov2: its data, `configs/rendered.toml`, seed 0; dev/LOG.md "
        "(2026-11-30) has the log."
    )
    sections = {"What it reads": reads, "How it was made": made, "Licenses of the data": rendered_data.LICENSES}
    about = card + "".join(f"\n## {title}\n{content}\n" for title, content in sections.items())
    (out / "README.md").write_text(about, encoding="utf-8")
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
