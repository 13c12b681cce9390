"""Flax -> torch -> Flax, exact. Oracles: recorded parameters and outputs of the release, real Orbax files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
from golden_files import CASES, GOLDEN, GoldenCase

from open_clip_ov2.cli import main
from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats import flax_model_cfg, from_flax, read_flax, to_flax
from open_clip_ov2.openclip.models.factory import build_caption_model

ORBAX = GOLDEN / "orbax"  # written by orbax-checkpoint 0.12.8 from the parameters of cross_attn_keep1.0 under 17 kB
HEADS = ["--heads", "2", "--decoder-heads", "2"]  # which the recorded parameters do not say


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize("name", CASES)
def test_the_command_takes_the_recorded_parameters_in_and_out_unchanged(name: str, tmp_path: Path) -> None:
    """In: the model of the folder reproduces the recorded tokens, logits and loss. Out: bit for bit what came in."""
    case, folder = GoldenCase(name), tmp_path / "model"
    size = str(case.images.shape[-1])
    flags = ["--image-size", size, "--context-length", "16", "--fusion", case.fusion, *HEADS]
    assert main(["convert", str(GOLDEN / f"{name}.npz"), "--to", str(folder), *flags]) == 0
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    with torch.no_grad():
        tokens_BND = model.encode_image_tokens(case.images)
        out = model(case.images, case["in/labels"].long(), kept_idx=case["kept_idx"].long())
        sums = CaptionLoss()(out["logits"], out["labels"])
    torch.testing.assert_close(tokens_BND, case["enc/tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out["logits"], case["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sums.nll / sums.num_targets, case["loss"], atol=1e-6, rtol=0)
    assert main(["convert", str(folder), "--to", str(tmp_path / "back.npz")]) == 0
    with np.load(tmp_path / "back.npz") as file:
        back = {key: file[key] for key in file.files}
    assert equal(back, {f"params/{key}": value for key, value in case.group("params/").items()})


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(["prefix", "causal", "cross_attn"]),
    st.sampled_from([(32, 4, 2), (48, 3, 1), (64, 2, 3)]),
    st.sampled_from([(24, 2, 2), (32, 4, 4)]),
    st.integers(0, 2**31),
)
def test_any_model_of_ours_survives_the_way_through_flax(
    fusion: str, encoder: tuple[int, int, int], decoder: tuple[int, int, int], seed: int
) -> None:
    """Oracle: equality with the state dict that went out."""
    (width, heads, layers), (decoder_width, decoder_heads, decoder_layers) = encoder, decoder
    model = build_caption_model(
        embed_dim=width,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": width, "layers": layers, "head_width": width // heads},
        text_cfg={"context_length": 8, "vocab_size": 50, "bos_id": 1, "eos_id": 2},
        decoder_cfg={
            "width": decoder_width, "layers": decoder_layers, "heads": decoder_heads, "mlp_width": 3 * decoder_width,
        },
        fusion=fusion,
        keep_ratio=1.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name not in ("visual.positional_embedding", "visual.proj"):
            parameter.data.normal_(generator=generator)
    state = model.state_dict()
    flat = to_flax(state, decoder_heads)
    found = flax_model_cfg(flat, heads, None if fusion == "cross_attn" else decoder_heads)
    assert found["vision_cfg"] == {
        "patch_size": 8, "width": width, "layers": layers, "head_width": width // heads, "mlp_ratio": 4.0,
    }  # fmt: skip
    assert found["decoder_cfg"] == {
        "width": decoder_width, "layers": decoder_layers, "heads": decoder_heads, "mlp_width": 3 * decoder_width,
    }  # fmt: skip
    assert (found["text_cfg"]["vocab_size"], found["fusion"] == "cross_attn") == (50, fusion == "cross_attn")
    back = from_flax(flat)
    assert back.keys() == state.keys() - {"visual.positional_embedding", "visual.proj"}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_orbax_folders_of_both_kinds_hold_the_recorded_arrays(tmp_path: Path) -> None:
    """Oracle: the .npz that the folders were written from. Optimizer state is left out, bfloat16 is widened exactly."""
    recorded = GoldenCase("cross_attn_keep1.0").group("params/")
    small = {key: value for key, value in recorded.items() if value.nbytes <= 17_000}
    assert equal(read_flax(ORBAX / "ocdbt"), small)
    of_zarr = read_flax(ORBAX / "zarr")
    rounded = torch.from_numpy(recorded["img_encoder/cls"]).bfloat16().float().numpy()
    assert equal(
        of_zarr,
        {"img_encoder/cls": rounded}
        | {
            f"img_encoder/encoder_norm/{leaf}": recorded[f"img_encoder/encoder_norm/{leaf}"]
            for leaf in ("bias", "scale")
        },
    )
    shutil.copytree(ORBAX / "zarr", tmp_path / "step_7" / "default")  # as Orbax's CheckpointManager lays it out
    assert equal(read_flax(tmp_path / "step_7"), of_zarr)


def test_an_orbax_folder_cannot_lead_outside_itself(tmp_path: Path) -> None:
    shutil.copytree(ORBAX / "zarr", tmp_path / "evil")
    metadata = json.loads((tmp_path / "evil" / "_METADATA").read_text())
    for leaf in metadata["tree_metadata"].values():
        leaf["key_metadata"][-1]["key"] = "../../zarr/secret"
    (tmp_path / "evil" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="is not the name of a parameter"):
        read_flax(tmp_path / "evil")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def test_an_npz_with_a_pickle_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    bomb = np.empty(1, dtype=object)
    bomb[0] = Bomb(tmp_path / "ran")
    np.savez(tmp_path / "bomb.npz", **{"params/img_encoder/cls": bomb})
    with pytest.raises(UserError, match=r"not a readable \.npz of plain arrays"):
        read_flax(tmp_path / "bomb.npz")
    assert not (tmp_path / "ran").exists()


def _without(flat: dict[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in flat.items() if name != key}


ATTENTION = "img_encoder/Transformer/encoderblock_0/MultiHeadDotProductAttention_0"


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda flat: _without(flat, f"{ATTENTION}/key/kernel"), HEADS, "in_proj_weight without key"),
        (lambda flat: _without(flat, "txt_decoder/head/kernel"), HEADS, "1 missing (text_decoder.lm_head.weight)"),
        (lambda flat: {**flat, "img_encoder/head/kernel": np.zeros((2, 2))}, HEADS, "img_encoder/head/kernel"),
        (
            lambda flat: {**flat, "img_encoder/cls": np.zeros((1, 1, 9))},
            HEADS,
            "visual.class_embedding (9,), not (64,)",
        ),
        (lambda flat: _without(flat, "img_encoder/embedding/kernel"), HEADS, "incomplete"),
        (lambda flat: flat, [], "--heads is missing"),
        (lambda flat: flat, ["--heads", "3", "--decoder-heads", "2"], "--heads 3: does not divide"),
        (lambda flat: flat, [*HEADS, "--fusion", "cross_attn"], "has no cross-attention blocks"),
        (lambda flat: flat, [*HEADS, "--image-size", "50"], "image size 50 is not a multiple of the patch size 14"),
        (lambda flat: {"params/x": np.zeros(1)}, HEADS, "no parameters of the reference"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(change, flags, message, tmp_path, capsys) -> None:
    flat = change(GoldenCase("concat_prefix_keep0.35").group("params/"))
    np.savez(tmp_path / "in.npz", **flat)
    argv = ["convert", str(tmp_path / "in.npz"), "--to", str(tmp_path / "out"), *flags]
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]
