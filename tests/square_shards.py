"""Real tars of colored squares."""

from __future__ import annotations

import io
import json
from pathlib import Path

import webdataset as wds
from PIL import Image

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 220), "black": (10, 10, 10)}


def write_square_shards(folder: Path, shards: int, samples: int, start: int = 0) -> list[Path]:
    """Tars of 32 px squares, captioned "a red square" in txt and, otherwise worded, in json."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for shard in range(shards):
        files.append(folder / f"{shard:05d}.tar")
        with wds.TarWriter(str(files[-1])) as tar:
            for index in range(samples):
                number = start + shard * samples + index
                name = list(COLORS)[number % 4]
                image = Image.new("RGB", (32, 32), "white")
                image.paste(COLORS[name], (4 + number % 7, 4 + number % 5, 24, 24))
                buffer = io.BytesIO()
                image.save(buffer, "png")
                about = {"recaption": [f"one {name} square", f"a square that is {name}"], "kind": name}
                tar.write(
                    {
                        "__key__": f"{number:06d}",
                        "png": buffer.getvalue(),
                        "txt": f"a {name} square",
                        "json": json.dumps(about).encode(),
                    }
                )
    return files
