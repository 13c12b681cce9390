"""`ov2 captions filter` and `report`: what is dropped and why, and what the page says."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_fixtures import make_run
from PIL import Image

from open_clip_ov2.captions.repetition import is_refusal, later_duplicates, repetition, signature
from open_clip_ov2.captions.tars_of import note_shards
from open_clip_ov2.cli import main
from open_clip_ov2.core.loss import caption_targets
from open_clip_ov2.data.sidecars import begin_set, read_sidecar, write_sidecar
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.evaluate.caption_loss import eval_kept_idx
from open_clip_ov2.openclip.models.open_model import open_model

REPEATED = "a red car and a blue car in front of a house " * 3
# Characters that datatrove 0.10.1's find_top_duplicate (2- to 4-grams) and find_all_duplicate (5- to 10-grams) count.
DATATROVE = {
    REPEATED.strip(): ((15, 27, 39), (53, 66, 58, 66, 48, 53)),
    "the cat the cat the cat sat on the cat": ((28, 22, 30), (0,) * 6),
    "one two three four five six one two three four five six seven one two three four five": (
        (21, 39, 54), (38, 22, 0, 0, 0, 0),
    ),
    ("x " * 30).strip(): ((87, 140, 189), (25, 24, 28, 24, 27, 20)),
}  # fmt: skip
LIMITS = ((0.20, 0.18, 0.16), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10))  # arXiv 2112.11446, table A1


def test_repetition_is_gophers() -> None:
    """Oracle: what datatrove's own functions count, over the paper's limits."""
    for text, counts in DATATROVE.items():
        shares = [
            count / len(text) / limit
            for found, limits in zip(counts, LIMITS, strict=True)
            for count, limit in zip(found, limits, strict=True)
        ]
        assert repetition(text) == pytest.approx(0.2 * max(shares))
    assert repetition("a red square") == 0.0


def test_refusals_and_duplicates() -> None:
    """Oracle: sentences that are and are not refusals; Jaccard similarity of the shingles, brute force."""
    for text in (
        "I'm sorry, but I can't describe this image.", "As an AI language model, I cannot see pictures",
        "I’m unable to view the photo", "No image was provided.", "Please upload an image so that I can help",
    ):  # fmt: skip
        assert is_refusal(text), text
    for text in (
        "A sorry-looking dog that cannot reach its bowl", "A poster that says AI is here",
        "An image of a man who provides food", "The picture shows a sign: no parking",
    ):  # fmt: skip
        assert not is_refusal(text), text
    exact = np.array([signature(text, near=False) for text in ("A red car.", "a blue car", "a  RED car", "")])
    assert later_duplicates(exact).tolist() == [False, False, True, False]
    rng, found = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(100):
        base = [f"w{word}" for word in rng.integers(0, 10_000, 40)]
        alike, apart = [*base], [*base]
        alike[20] = "other"  # 35 of 41 shingles: 0.85
        for at in range(0, 40, 4):
            apart[at] = f"other{at}"
        for near, other in ((True, alike), (False, apart)):
            pair = np.array([signature(" ".join(text), near=True) for text in (base, other)])
            found[near] += bool(later_duplicates(pair)[1])
    assert found[True] >= 90
    assert found[False] <= 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, a tar of 7 pictures with alt-texts and uids, and a caption set of it."""
    folder = tmp_path_factory.mktemp("filters")
    make_run(folder / "run")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(7):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(buffer, "png")
            about = {"uid": f"{number:032x}", "title": f"word{number}"}
            entries = {"png": buffer.getvalue(), "txt": b"word1 <b> and word2", "json": json.dumps(about).encode()}
            for suffix, data in entries.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    begin_set(folder / "set", {"made_by": "a test"})
    note_shards(folder / "set", str(folder / "0.tar"))
    captions = [
        "word1 word2 word3", "word4 word5 word6 word7", "word8", "I'm sorry, but I can't see it", REPEATED.strip(),
        "Word4, word5 word6 word7!",
    ]  # fmt: skip
    lines = [{"key": str(number), "caption": text, "clip": number / 10} for number, text in enumerate(captions)]
    write_sidecar(folder / "set" / "0.jsonl.gz", [*lines, {"key": "6", "error": "undecodable image"}])
    return folder


def filtered(made: Path, out: Path, *flags: str) -> list[dict[str, object]]:
    assert main(["captions", "filter", str(made / "set"), "--out", str(out), *flags]) == 0
    return list(read_sidecar(out / "0.jsonl.gz"))


def test_lines_say_which_rule_they_break(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the rules, by hand; DataComp's lists of uids, made as DataComp makes them."""
    flags = ["--min-words", "2", "--max-words", "40", "--max-repetition", "0.2", "--refusals", "--duplicates", "exact"]
    lines = filtered(made, tmp_path / "texts", *flags)
    verdicts = [line.get("dropped") for line in lines]
    assert verdicts == [None, None, "min-words", "refusal", "repetition", "duplicate", None]
    assert [list(line)[:2] for line in lines[2:4]] == [["key", "dropped"]] * 2
    before = list(read_sidecar(made / "set" / "0.jsonl.gz"))
    assert [{name: value for name, value in line.items() if name != "dropped"} for line in lines] == before
    assert "kept" in capsys.readouterr().out
    np.save(tmp_path / "keep.npy", np.sort(np.array([(0, 1), (0, 2), (7, 3)], dtype="u8,u8")))
    lines = filtered(made, tmp_path / "lists", "--uids", str(tmp_path / "keep.npy"), "--score", "clip>0.15")
    assert [line.get("dropped") for line in lines] == ["uids", "clip", None, "uids", "uids", "uids", None]
    lines = filtered(made, tmp_path / "again", "--score", "clip< +2.5E-1")
    assert [line.get("dropped") for line in lines] == [None, None, None, "clip", "clip", "clip", None]
    assert (
        main(["captions", "filter", str(tmp_path / "texts"), "--out", str(tmp_path / "two"), "--max-words", "3"]) == 0
    )
    verdicts = [line.get("dropped") for line in read_sidecar(tmp_path / "two" / "0.jsonl.gz")]
    assert verdicts == [None, "max-words", "min-words", "refusal", "repetition", "duplicate", None]


def test_what_could_be_read_of_a_broken_tar_is_filtered(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the readable samples, whose lines alone a join of such a tar writes; a line more is refused, by the
    report too."""
    data = (made / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: data.index(b"4.png") + 1024])
    before = list(read_sidecar(made / "set" / "0.jsonl.gz"))
    np.save(tmp_path / "keep.npy", np.array([(0, 1)], dtype="u8,u8"))
    for lines, status in ((4, 0), (5, 2)):
        begin_set(folder := tmp_path / f"set{lines}", {})
        write_sidecar(folder / "0.jsonl.gz", before[:lines])
        shards = ["--shards", str(tmp_path / "0.tar")]
        out = ["--out", str(tmp_path / f"out{lines}")]
        rules = ["--uids", str(tmp_path / "keep.npy")]
        assert main(["captions", "filter", str(folder), *out, *rules, *shards]) == status
        assert main(["captions", "report", str(folder), *shards]) == status
    found = [line.get("dropped") for line in read_sidecar(tmp_path / "out4" / "0.jsonl.gz")]
    assert found == ["uids", None, "uids", "uids"]
    assert "is broken" in capsys.readouterr().err


def test_likelihood_is_what_the_picture_is_worth(made: Path, tmp_path: Path) -> None:
    """Oracle: log p of each caption given each picture, from plain forward passes."""
    lines = filtered(made, tmp_path / "scored", "--score", f"likelihood:{made / 'run'}>-1", "--device", "cpu")
    opened = open_model(made / "run")
    texts = [str(line["caption"]) for line in lines[:6]]
    samples = [*read_tar(str(made / "0.tar"), print)][:6]
    images = torch.stack([opened.preprocess(Image.open(io.BytesIO(sample["png"]))) for sample in samples])
    kept = eval_kept_idx(opened.model, [str(number) for number in range(6)])
    ids = opened.tokenizer(texts)
    log_p = torch.zeros(6, 6, dtype=torch.float64)
    tokens = []
    for column in range(6):
        with torch.no_grad():
            logits = opened.model(images, ids[column : column + 1].expand(6, -1), kept_idx=kept)["logits"]
        labels = caption_targets(ids[column : column + 1], 2).expand(6, -1)
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(dim=1)
        log_p[:, column] = -nll.double()
        tokens.append(int((labels[0] != -100).sum()))
    for number, line in enumerate(lines[:6]):
        others = [float(log_p[row, number]) for row in range(6) if row != number]
        marginal = math.log(sum(map(math.exp, others)) / 5)
        wanted = (float(log_p[number, number]) - marginal) / tokens[number]
        assert line["likelihood"] == pytest.approx(wanted, abs=2e-4)
    assert "likelihood" not in lines[6]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no rule is given"),
        (["--score", "likelihood:run"], "expected in quotes FIELD>NUMBER"),
        (["--score", "clip>high"], "expected in quotes FIELD>NUMBER"),
        (["--score", "likelihood>0.3"], "needs a model"),
        (["--score", "clip:run>0.3"], "takes no model"),
        (["--uids", "nothing.npy"], "cannot be read"),
        (["--uids", "floats.npy"], "expected a list of dtype u8,u8"),
        (["--uids", "unsorted.npy"], "is not sorted"),
        (["--min-words", "1", "--shards", "nothing.tar", "--uids", "keys.npy"], "do not exist"),
    ],
)
def test_slips(
    made: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    np.save("floats.npy", np.zeros(3))
    np.save("unsorted.npy", np.array([(2, 1), (1, 1)], dtype="u8,u8"))
    np.save("keys.npy", np.array([(1, 1)], dtype="u8,u8"))
    assert main(["captions", "filter", str(made / "set"), "--out", "out", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_language(made: Path, tmp_path: Path) -> None:
    """Oracle: the languages that the sentences are in."""
    pytest.importorskip("py3langid")
    texts = ["a red car in front of the house", "ein rotes Auto vor dem alten Haus", "une voiture devant la maison"]
    begin_set(tmp_path / "set", {})
    write_sidecar(tmp_path / "set" / "0.jsonl.gz", [{"key": str(n), "caption": text} for n, text in enumerate(texts)])
    assert (
        main(["captions", "filter", str(tmp_path / "set"), "--out", str(tmp_path / "en"), "--language", "en,fr"]) == 0
    )
    assert [line.get("dropped") for line in read_sidecar(tmp_path / "en" / "0.jsonl.gz")] == [None, "language", None]


def test_the_report(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the set's lines, counted by hand; the page refers to no other file and escapes what captions say."""
    assert main(["captions", "report", str(made / "set"), "--samples", "7"]) == 0
    shown = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines()[:-1])
    rows = {label.strip(): value.strip() for label, value in shown.items()}
    assert (rows["samples"], rows["captions"]) == ("7", "6")
    assert rows["no caption: undecodable image"] == "1"
    assert rows["refusals"] == rows["said before, word for word"] == "16.7%"
    assert rows["clip, mean"] == "0.250"
    assert rows["words of the alt-text that the caption has, of 6"] == f"{100 * (2 / 3) / 6:.1f}%"
    page = (made / "set" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7
    assert "word1 &lt;b&gt; and word2" in page
    assert not [word for word in ("<script", 'src="http', "href=", "<b>") if word in page]
    assert "I&#39;m sorry, but I can&#39;t see it" in page
