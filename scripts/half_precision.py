"""Copy a folder that `ov2 export --to ov2` wrote, with weights in float16: half the size.

python scripts/half_precision.py FOLDER OUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    """Copy everything but the weights, then round them to float16 (inputs and products stay in float32 when loaded)."""
    source, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: value.to(torch.float16).contiguous() for name, value in load_file(path).items()}
            save_file(tensors, out / path.name, metadata={"format": "pt"})
        else:
            shutil.copy(path, out / path.name)
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
