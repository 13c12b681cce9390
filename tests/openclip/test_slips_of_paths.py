"""`ov2 convert`, `export`, `caption`: paths and flags that do not fit are one line. What is written names itself."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from export_fixtures import make_language_model, make_run
from released_files import write_decoder, write_released

from open_clip_ov2.cli import main
from open_clip_ov2.errors import UserError

FLAX = str(Path(__file__).parents[1] / "golden" / "concat_prefix_keep0.35.npz")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_run(place / "run")
    write_released(place / "released", "l")
    write_decoder(place / "released", "l")
    (place / "file").touch()
    return place


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert", FLAX, "--heads", "2", "--decoder-heads", "2", "--to", "file/in"], "file"),
        (["convert", "run", "--to", "back.npz", "--image-size", "28"], "--image-size applies to Flax parameters only"),
        (
            ["convert", "released", "--to", "new", "--context-length", "9"],
            "--context-length applies to Flax parameters only",
        ),
        (["convert", FLAX, "--to", "new", "--context-length", "0"], "--context-length 0"),
        (["export", "run", "--to", "hf", "--out", "file/in"], "file"),
        (["export", "run", "--to", "llava", "--language-model", "broken", "--out", "new"], "broken: cannot be loaded"),
        (["caption", "nowhere.png", "--checkpoint", "run"], "nowhere.png: no such file"),
        (["caption", "file", "--checkpoint", "run", "--out", "nowhere/sheet.png"], "the folder nowhere does not exist"),
        (["caption", "file", "--checkpoint", "run", "--out", "sheet.txt"], "sheet.txt: not an image file"),
        (["caption", "file", "--checkpoint", "run", "--every", "0"], "--every: 0: expected an integer >= 1"),
        (["caption", "file", "--checkpoint", "run", "--device", "abacus"], "abacus"),
    ],
)
def test_one_line(place: Path, argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(place)
    if "broken" in argv and not Path("broken").exists():
        make_language_model(Path("broken"))
        Path("broken/model.safetensors").write_bytes(b"torn")
    assert main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("ov2: error: ")
    assert message in err
    assert not Path("new").exists()


def test_a_folder_names_itself_as_its_tokenizer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the folder's name, not that of the one it was written in; it stays after a move to the hub."""
    monkeypatch.chdir(place)
    assert main(["convert", "released", "--to", "mine"]) == 0
    assert main(["export", "run", "--to", "ov2", "--out", "whole"]) == 0
    for name in ("mine", "whole"):
        cfg = json.loads(Path(name, "open_clip_config.json").read_text())["model_cfg"]
        assert cfg["text_cfg"]["hf_tokenizer_name"] == name


def test_a_hugging_face_tokenizer_goes_along(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the ids of the tokenizer that the run has."""
    monkeypatch.chdir(place)
    make_run(Path("with_hf"))
    make_language_model(Path("words"))
    for file in Path("words").glob("tokenizer*"):
        file.rename(Path("with_hf") / file.name)
    file = Path("with_hf/open_clip_config.json")
    cfg = json.loads(file.read_text())
    del cfg["model_cfg"]["text_cfg"]["tokenizer_mode"]
    file.write_text(json.dumps(cfg))
    expected = open_clip.get_tokenizer("local-dir:with_hf").tokenizer("what is this ?")["input_ids"]
    assert main(["export", "with_hf", "--to", "ov2", "--out", "with_hf_out"]) == 0
    again = open_clip.get_tokenizer("local-dir:with_hf_out").tokenizer("what is this ?")["input_ids"]
    assert again == expected == [3, 4, 5, 6]


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    """As Phi's. Oracle: transformers' own class."""
    from transformers import PhiConfig, PhiForCausalLM

    from open_clip_ov2.formats.llava import open_language_model

    make_language_model(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "model.safetensors").unlink()
    PhiForCausalLM(PhiConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a bias in its output embeddings"):
        open_language_model(tmp_path)


def test_a_clip_is_not_taken_for_an_encoder_alone(tmp_path: Path) -> None:
    """A CLIP with the encoder of ov2 models and output_tokens. Oracle: its state dict has a text tower."""
    write_released(tmp_path, "l")
    cfg = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    cfg["text_cfg"] = text
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    encoder = torch.load(tmp_path / "open_clip_pytorch_model.bin", weights_only=True)
    whole = {f"visual.{key}": value for key, value in encoder.items()}
    whole |= {"token_embedding.weight": torch.zeros(20, 16), "logit_scale": torch.zeros(())}
    torch.save(whole, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds a text tower.*decoder_cfg"):
        open_clip.create_model(f"local-dir:{tmp_path}")
    cfg["decoder_cfg"] = None
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    assert torch.equal(open_clip.create_model(f"local-dir:{tmp_path}").visual.proj, encoder["proj"])
