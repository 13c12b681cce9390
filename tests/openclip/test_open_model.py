"""Models by hub name, folder and run, and released caption decoders. Oracle: encoder and decoder computed plainly."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from released_files import plain_encoder, plain_next_logits, write_decoder, write_released

import open_clip_ov2
from open_clip_ov2.cli import main
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models.open_model import _fetch_decoder
from open_clip_ov2.openclip.models.weights import read_tensors

REPOSITORY = "some-lab/openvision2-vit-large-patch14-56-vision-only"


def images() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def plain_captions(state: dict, decoder: dict, length: int) -> torch.Tensor:
    """Greedy, all tokens kept, padded after eos."""
    tokens = plain_encoder(state, 16, images())[0][-1][:, 1:]
    ids = torch.ones(2, 1, dtype=torch.long)
    while ids.shape[1] < length:
        chosen = plain_next_logits(decoder, tokens, ids).argmax(-1)
        ended = (ids == 2).any(dim=1)
        ids = torch.cat([ids, chosen.masked_fill(ended, 0)[:, None]], dim=1)
    return ids


def lay_out_cache(hub: Path, repository: str, write) -> None:
    """As huggingface_hub keeps a repository: refs/main names a commit, snapshots/COMMIT holds the files."""
    folder, commit = hub / f"models--{repository.replace('/', '--')}", "a" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    write(folder / "snapshots" / commit)


def test_hub_names_go_through_the_hubs_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, offline, with a cache laid out as it lays one out."""
    made: dict = {}

    def write(folder: Path) -> None:
        made["encoder"] = write_released(folder, "l")
        made["decoder"] = write_decoder(folder, "l")

    def write_evil(folder: Path) -> None:
        write_released(folder, "l")
        file = folder / "open_clip_config.json"
        config = json.loads(file.read_text())
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
        file.write_text(json.dumps(config))

    lay_out_cache(tmp_path, REPOSITORY, write)
    lay_out_cache(tmp_path, f"{REPOSITORY}-evil", write_evil)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = f"hf-hub:{REPOSITORY}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    captioner, _, tokenizer = open_clip_ov2.create_caption_model(name)
    assert type(model) is open_clip_ov2.VisionModel
    after, _ = plain_encoder(made["encoder"], 16, images())
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_image_tokens(images()), after[-1][:, 1:], atol=2e-5, rtol=1e-5)
    ids = captioner.generate(images(), seq_len=6)
    assert torch.equal(ids, plain_captions(made["encoder"], made["decoder"], 6)[:, : ids.shape[1]])
    words = [word for row in ids.tolist() for word in tokenizer.decode(row).split()]
    assert all(word.startswith("word") or word == "[UNK]" for word in words)
    assert "mean=(0.485, 0.456, 0.406)" in str(preprocess)
    assert open_clip.get_tokenizer(name)(["a cat"]).shape == (1, 77)
    with pytest.raises(RuntimeError, match="trust_remote_code, which is not allowed in a config"):
        open_clip.create_model(f"{name}-evil")


def test_a_released_folder_captions_and_becomes_a_model_of_ours(tmp_path: Path, capsys) -> None:
    """Oracle: greedy captions computed plainly, by create_caption_model and after `ov2 convert`."""
    released, picture = tmp_path / "released", tmp_path / "noise.png"
    state, decoder = write_released(released, "l"), write_decoder(released, "l")
    model, preprocess, tokenizer = open_clip_ov2.create_caption_model(str(released))
    expected = plain_captions(state, decoder, 8)
    ids = model.generate(images(), seq_len=8)
    assert torch.equal(ids, expected[:, : ids.shape[1]])
    assert (expected[:, ids.shape[1] :] == 0).all()
    assert main(["convert", str(released), "--to", str(tmp_path / "ours")]) == 0
    again, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'ours'}")
    assert torch.equal(again.eval().generate(images(), seq_len=8), ids)
    ours = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'ours'}")
    assert torch.equal(ours(["word3 word7"]), tokenizer(["word3 word7"]))
    assert ours(["word3 word7"])[0, :4].tolist() == [1, 7, 11, 2]
    Image.effect_noise((70, 60), 80).convert("RGB").save(picture)
    capsys.readouterr()
    texts = []
    for checkpoint in (released, tmp_path / "ours"):
        assert (
            main(["caption", str(picture), "--checkpoint", str(checkpoint), "--seq-len", "8", "--device", "cpu"]) == 0
        )
        texts.append(capsys.readouterr().out)
    with Image.open(picture) as image:
        pixels = preprocess(image)[None]
    assert texts[0].split("\t")[1].strip() == tokenizer.decode(model.generate(pixels, seq_len=8)[0].tolist())
    assert texts[0] == texts[1]


def change(folder: Path, **values) -> None:
    file = folder / "text_decoder_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: change(folder, fusion_style="film"), "unknown fusion_style 'film'"),
        (lambda folder: change(folder, widht=3), "unknown key 'widht'"),
        (lambda folder: change(folder, vision_width=65), "vision_width 65, and the encoder's width is 64"),
        (lambda folder: change(folder, vocab_size=41), "of another shape (lm_head.weight (40, 32), not (41, 32)"),
        (lambda folder: change(folder, num_heads=5), "decoder width 32 is not divisible by its 5 heads"),
        (lambda folder: (folder / "text_decoder_config.json").write_text("{"), "text_decoder_config.json: not JSON"),
        (lambda folder: (folder / "bert_base_vocab_bos_eos.txt").unlink(), "without its vocabulary"),
        (lambda folder: (folder / "text_decoder_config.json").unlink(), "an encoder without a decoder"),
    ],
)
def test_what_is_wrong_with_a_decoder_is_said(spoil, message: str, tmp_path: Path) -> None:
    write_released(tmp_path, "l")
    write_decoder(tmp_path, "l")
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        open_clip_ov2.create_caption_model(str(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        open_clip_ov2.open_model(tmp_path)
    write_released(tmp_path, "l")
    with pytest.raises(UserError, match=r"^image size 27 is not a multiple of the patch size"):
        open_clip_ov2.open_model(tmp_path, image_size=27)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="neither checkpoints nor weights"):
        open_clip_ov2.open_model(tmp_path)
    with pytest.raises(UserError, match="no such file, folder or model; did you mean ov2-vit-nano-8"):
        open_clip_ov2.open_model("ov2-vit-nano-9")
    with pytest.raises(UserError, match=r"no such file, folder or model; did you mean ViT-B-32\?"):
        open_clip_ov2.open_model("ViT-B-321:openai")
    with pytest.raises(ValueError, match=r"cannot be read as a file of tensors only .Is a directory"):
        read_tensors(tmp_path)


def test_a_hub_that_cannot_be_asked_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A port where nothing listens, and a client that does not wait between its attempts. Oracle: the error, not an
    encoder without its decoder."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot tell whether it has a caption decoder"):
        _fetch_decoder("hf-hub:some-lab/nothing")
