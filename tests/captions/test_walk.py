"""The walk of docs/data.md, from img2dataset's or DataComp's tars and the published tables to an encoder. Oracle: its
commands run."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import webdataset as wds
from PIL import Image

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.data.sidecars import read_sidecar

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
TINY = Path(__file__).parents[1] / "openclip" / "old_run" / "tiny"
SMALL = [
    "--train-num-samples", "16", "--model", f"local-dir:{TINY}", "--force-image-size", "24", "--force-context-length",
    "12", "--batch-size", "8", "--workers", "0", "--epochs", "1",
]  # fmt: skip
HUB = ["--model", "llava-hf/llava-1.5-7b-hf"]  # the model in the package writes in its place
COLORS = ("red", "green", "blue", "black")


def test_from_tars_and_tables_to_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("datacomp").mkdir()
    Path("recap").mkdir()
    Path("shards").mkdir()
    rows = []
    for shard in range(4):
        with wds.TarWriter(f"datacomp/{shard:08d}.tar") as tar:
            for index in range(4):
                number, color = 4 * shard + index, COLORS[index]
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32), color).save(buffer, "jpeg")
                digest = hashlib.sha256(str(number).encode()).hexdigest()
                fields = {"sha256": digest, "uid": f"{number:032x}", "org_caption": color, "status": "success"}
                about = json.dumps(fields).encode()
                tar.write({"__key__": f"{number:012d}", "jpg": buffer.getvalue(), "txt": color, "json": about})
                caption = f"a plain square that is {color} all over" if index else color
                rows.append({"sha256": digest, "re_caption_condition_diverse_topk": caption})
        shutil.copy(f"datacomp/{shard:08d}.tar", f"shards/{shard:05d}.tar")
        Path(f"shards/{shard:05d}_stats.json").write_text("{}")  # img2dataset's, beside its tar
    pd.DataFrame(rows).to_parquet("recap/train-0.parquet")
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (direct,) = [text for text in blocks if "json:org_caption" in text]
    assert ov2([*shlex.split(direct)[1:], *SMALL, "--name", "direct"]) == 0
    (walk,) = [text for text in blocks if "captions join" in text]
    lines = [shlex.split(line)[1:] for line in walk.splitlines()]
    assert [line[:2] for line in lines[:4]] == [["captions", name] for name in ("join", "filter", "report", "write")]
    assert lines[3][-4:-2] == HUB
    del lines[3][-4:-2]
    for line in lines:
        assert ov2([*line, *([*SMALL, "--name", "run"] if line[0] == "train" else [])]) == 0, line
    kept = list(read_sidecar("good/00000000.jsonl.gz"))
    assert [line.get("dropped") for line in kept] == ["min-words", None, None, None]
    assert all(list(Path(f"logs/{name}/checkpoints").iterdir()) for name in ("direct", "run"))
