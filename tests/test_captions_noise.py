"""scripts/captions_noise.py. Oracle: what its docstring says of each sample."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from open_clip_ov2.data.tars import read_tar

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import captions_noise


def test_alt_texts_are_true_where_they_are_known_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for number in range(400):
            about = json.dumps({"captions": [f"caption {number}", "more"], "label": "x"}).encode()
            for suffix, data in (("jpg", b"%d" % number), ("json", about), ("txt", b"caption")):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    argv = ["", str(tmp_path / "out"), str(tmp_path / "in.tar"), "--take", "400", "--noise", "0.5"]
    monkeypatch.setattr(sys, "argv", argv)
    captions_noise.main()
    samples = [one for path in sorted((tmp_path / "out").glob("*.tar")) for one in read_tar(str(path), pytest.fail)]
    found = [json.loads(one["json"]) for one in samples]
    assert sorted(int(one["jpg"]) for one in samples) == list(range(400))
    assert all(about["true"][0] == f"caption {int(one['jpg'])}" for about, one in zip(found, samples, strict=True))
    assert all("captions" not in about and "txt" not in one for about, one in zip(found, samples, strict=True))
    clean = [about for about in found if "clean" in about]
    assert all(about["alt"] == about["clean"][0] == about["true"][0] for about in clean)
    others = [about for about in found if "clean" not in about]
    wrong = sum(about["alt"] != about["true"][0] for about in others) / len(others)
    assert 60 < len(clean) < 140  # a quarter of 400, four standard deviations
    assert abs(wrong - 0.5) < 0.12
    assert sum(about["prompt"] != about["true"][0] for about in clean) > len(clean) / 4
