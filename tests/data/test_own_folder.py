"""The commands of docs/data.md that make tars of a folder. Oracle: the pairs in the folder, read back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from broken_shards import picture

from open_clip_ov2.data.shards import WebDatasetSource, expand_shards

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_shell_lines_of_the_page_make_tars_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    expected = {}
    for number in range(10):
        for name in (f"cat-{number}", f"cat-{number} b"):
            (tmp_path / "pictures" / f"{name}.jpg").write_bytes(picture(number, "jpeg"))
            (tmp_path / "pictures" / f"{name}.txt").write_text(f"caption of {name}")
            expected[name] = f"caption of {name}".encode()
    section = PAGE.read_text(encoding="utf-8").partition("## Your own folder")[2]
    found = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert found is not None
    lines = found[1].replace("--lines 2000", "--lines 16")  # 8 samples a tar
    subprocess.run(["bash", "-euc", lines], cwd=tmp_path, check=True)
    urls, _ = expand_shards(f"{tmp_path}/shards/{{00000..00002}}.tar")
    samples = list(WebDatasetSource(urls).in_order())
    assert {sample["__key__"]: sample["txt"] for sample in samples} == expected
    assert all("jpg" in sample for sample in samples)
