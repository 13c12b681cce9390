"""A real run from a released encoder, and its way to the hub. Oracles: the run's own files; what the hub holds."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from hub_server import Hub
from huggingface_hub import ModelCard, constants

from open_clip_ov2.cli import main
from open_clip_ov2.formats.open_clip import CONFIG


@pytest.fixture(scope="module")
def trained(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Two steps of ov2-vit-nano-8 from a bare encoder, and that encoder."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(4)
    encoder = open_clip.create_model("ov2-vit-nano-8", decoder_cfg=None, force_image_size=24).visual.state_dict()
    torch.save(encoder, folder / "encoder.bin")
    argv = [
        "train", "--model", "ov2-vit-nano-8", "--pretrained", str(folder / "encoder.bin"), "--force-image-size", "24",
        "--train-data", str(squares / "train" / "{00000..00003}.tar"), "--train-num-samples", "32",
        "--val-data", str(squares / "val" / "00000.tar"), "--batch-size", "16", "--epochs", "1", "--workers", "0",
        "--lr", "1e-30", "--warmup", "0", "--wd", "0", "--logs", str(folder / "logs"), "--name", "tiny",
        "--device", "cpu", "--keep-ratio", "0.5", "--sample-captions", "0",
    ]  # fmt: skip
    assert main(argv) == 0
    return folder / "logs" / "tiny", encoder


def test_a_run_starts_from_a_released_encoder(trained) -> None:
    """Oracle: the file's tensors, which a learning rate of 1e-30 leaves as they are; the decoder is its own."""
    run, encoder = trained
    checkpoint = next((run / "checkpoints").glob("stage_1*.pt"))
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    for key, value in encoder.items():
        torch.testing.assert_close(state[f"visual.{key}"], value, atol=1e-25, rtol=0)
    log = (run / "out.log").read_text()
    assert f"loaded all {len(encoder)} encoder keys of the file" in log
    assert "the text decoder starts from new weights" in log


def test_a_file_that_is_no_encoder_ends_the_run_before_it_starts(squares: Path, tmp_path: Path, capsys) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "no.bin")
    argv = ["train", "--model", "ov2-vit-nano-8", "--pretrained", str(tmp_path / "no.bin"), "--workers", "0",
            "--device", "cpu", "--train-data", str(squares / "train" / "00000.tar"), "--train-num-samples", "8",
            "--batch-size", "4", "--logs", str(tmp_path / "logs")]  # fmt: skip
    assert main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "53 missing (visual.class_embedding" in err
    assert "1 of another shape (visual.conv1.weight (1,), not (192, 3, 8, 8))" in err


def test_the_card_says_what_the_run_says(trained, tmp_path: Path) -> None:
    """Oracle: results.jsonl and run.json of the run; huggingface_hub's own reader of the card."""
    run, _ = trained
    folder = tmp_path / "pushed"
    argv = ["push", str(run), "some-lab/tiny", "--dry-run", str(folder), "--license", "apache-2.0"]
    assert main(argv) == 0
    card = (folder / "README.md").read_text()
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    loss = [record["caption_loss"] for record in records if record["kind"] == "val"][-1]
    front = ModelCard.load(folder / "README.md").data
    assert (front.license, front.library_name, front.pipeline_tag) == (
        "apache-2.0", "open_clip", "image-feature-extraction",
    )  # fmt: skip
    assert {result.metric_type: result.metric_value for result in front.eval_results}["caption_loss"] == loss
    assert "| model | ov2-vit-nano-8 |" in card
    assert "Data: `{00000..00003}.tar`. Samples seen: 32." in card
    assert f"| caption loss | {loss:.4g} |" in card
    assert "| stage | resolution | samples | global batch | peak lr | weight decay | keep ratio | precision |" in card
    assert "| 1 | 24 | 32 | 16 | 1e-30 | 0.0 | 0.5 |" in card
    assert str(run.parent) not in card
    assert 'create_model_from_pretrained("hf-hub:some-lab/tiny")' in card
    assert json.loads((folder / CONFIG).read_text())["model_cfg"]["vision_cfg"]["image_size"] == 24


def test_the_hub_gets_what_dry_run_shows(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The real client against a hub on localhost. Oracles: what it holds loads again; a refusal is one line."""
    run, _ = trained
    push = ["push", str(run), "--to", "timm"]
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert main([*push, "some-lab/tiny", "--private"]) == 0
        assert main([*push, "refused-lab/tiny"]) == 2
    printed = capsys.readouterr()
    assert f"pushed: {hub.url}/some-lab/tiny" in printed.out
    assert printed.err.strip().splitlines()[-1].startswith("ov2: error: refused-lab/tiny: not pushed (")
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.created[0]["name"] == "tiny"
    assert "private" in json.dumps(hub.created[0])
    assert hub.files.keys() == {"some-lab/tiny"}
    argv = ["push", str(run), "some-lab/tiny", "--to", "timm", "--dry-run", str(tmp_path / "shown")]
    assert main(argv) == 0
    assert hub.files["some-lab/tiny"] == {path.name: path.read_bytes() for path in (tmp_path / "shown").iterdir()}
    import timm

    assert timm.create_model(f"local-dir:{tmp_path / 'shown'}", pretrained=True).patch_embed.img_size == (24, 24)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "nowhere", "some-lab/tiny"], "nowhere: no such file, folder or model"),
        (["push", "nowhere", "../../etc"], "not the name of a repository, which is ORG/NAME"),
        (["push", "nowhere", "tiny"], "not the name of a repository, which is ORG/NAME"),
        (["push", "nowhere", "a/b", "--to", "onnx"], "invalid choice: 'onnx'"),
    ],
)
def test_slips_are_one_line(argv: list[str], message: str, capsys) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err
