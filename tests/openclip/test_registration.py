"""The models in OpenCLIP's factory, and OpenCLIP untouched. Oracle: OpenCLIP itself without the plugin."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib import import_module
from typing import Any

import open_clip
import pytest
import torch
from patches_page import PAGE, with_tables

import open_clip_ov2
import open_clip_ov2.cli
from open_clip_ov2.openclip import patches, private_names, version
from open_clip_ov2.openclip.models.factory import MODEL_CONFIGS

PUBLISHED = ["ti-16", "ti-8", "s-16", "s-8", "b-16", "b-8", "l-14", "so400m-14", "h-14", "g-14"]
SIZES = {  # reference.md: width, depth, mlp, heads of the encoder
    "ti": (192, 12, 768, 3), "s": (384, 12, 1536, 6), "b": (768, 12, 3072, 12), "l": (1024, 24, 4096, 16),
    "so400m": (1152, 27, 4304, 16), "h": (1280, 32, 5120, 16), "g": (1408, 40, 6144, 16),
}  # fmt: skip

FINGERPRINT = """
    import hashlib, io, torch
    import open_clip
    from types import SimpleNamespace
    def digest(name):
        torch.manual_seed(0)
        model, train_tf, val_tf = open_clip.create_model_and_transforms(name, output_dict=True)
        if hasattr(model, "text_decoder"): torch.nn.init.normal_(model.text_decoder.text_projection, std=0.02)
        tokens = open_clip.get_tokenizer(name)(["a dog", "two cats!"])
        torch.manual_seed(1)
        out = model(torch.randn(2, 3, *model.visual.image_size), tokens)
        args = SimpleNamespace(distill=False, model=name, siglip=False, local_loss=False, gather_with_grad=False,
            rank=0, world_size=1, horovod=False, coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0)
        loss = {} if hasattr(open_clip, "create_task") else open_clip.create_loss(args)(**out, output_dict=True)
        buffer = io.BytesIO(); torch.save([list(out.items()), list(loss.items()), tokens], buffer)
        values = [v for v in [*out.values(), *loss.values(), tokens] if torch.is_tensor(v)]
        sums = hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in values)).hexdigest()
        return [name, sums, str(train_tf), str(val_tf), str(model.visual.preprocess_cfg), type(model).__name__]
    found = [digest(name) for name in ["ViT-S-32", "coca_ViT-B-32"] if name in open_clip.list_models()]
"""


def test_clip_and_coca_are_bit_for_bit_what_they_were() -> None:
    """With the plugin in this process, without it in another."""
    code = textwrap.dedent(FINGERPRINT)
    script = code + "import json, sys; assert 'open_clip_ov2' not in sys.modules; print('RESULT' + json.dumps(found))"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    here: dict[str, Any] = {}
    exec(code, here)
    without = json.loads(run.stdout.split("RESULT")[1])
    assert here["found"] == without
    assert len(without) == 2


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_published_size_is_there_with_the_references_shape(size: str) -> None:
    with torch.device("meta"):
        model = open_clip.create_model(f"ov2-vit-{size}", device="meta")
    name, patch = size.split("-")
    width, depth, mlp, heads = SIZES[name]
    visual = model.visual
    assert visual.conv1.weight.shape == (width, 3, int(patch), int(patch))
    assert visual.conv1.bias is None
    assert len(visual.transformer.resblocks) == depth
    block = visual.transformer.resblocks[0]
    assert block.mlp.c_fc.out_features == mlp
    assert block.attn.num_heads == heads
    assert block.ln_1.eps == 1e-6
    assert isinstance(visual.ln_pre, torch.nn.Identity)
    assert block.mlp.gelu.approximate == "none"


def test_the_published_vision_keys() -> None:
    """Oracle: reference.md, 294 keys for L/14."""
    with torch.device("meta"):
        model = open_clip.create_model("ov2-vit-l-14", device="meta")
    assert len(model.visual.state_dict()) == 294
    g_14 = MODEL_CONFIGS / "ov2-vit-g-14.json"
    assert json.loads(g_14.read_text())["decoder_cfg"] == {
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_width": 4096,
    }


def test_preprocessing_is_image_nets_however_the_model_is_made() -> None:
    from open_clip.factory import create_model_and_transforms as early_reference

    _, train_tf, val_tf = early_reference("ov2-vit-nano-8")
    for transform in (train_tf, val_tf):
        assert "(0.485, 0.456, 0.406)" in str(transform)
        assert "bilinear" in str(transform)
    assert "scale=(0.4, 1.0)" in str(train_tf)
    _, clip_train, _ = early_reference("ViT-S-32", image_interpolation="bilinear")
    assert "scale=(0.9, 1.0)" in str(clip_train)  # CLIP keeps its own crop
    _, train_tf, _ = early_reference("ov2-vit-nano-8", image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    assert "(0.5, 0.5, 0.5)" in str(train_tf)


def test_options_reach_the_model() -> None:
    model = open_clip.create_model("ov2-vit-nano-8", keep_ratio=0.5, fusion="causal", eval_keep_ratio=1.0)
    assert str(model.token_drop.keep_ratio) == "0.5"
    assert model.token_drop.eval_keep_ratio == 1.0
    assert model.text_decoder.config.fusion == "causal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratoi": 0.5}, "did you mean keep_ratio\\?"),
        ({"keep_ratio": 1.5}, r"\(0, 1\]"),
        ({"fusion": "concat"}, "prefix, causal, cross_attn"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_clip.create_model("ov2-vit-nano-8", **options)


def test_a_checkpoint_loads_at_another_resolution_with_a_recomputed_table(tmp_path) -> None:
    model = open_clip.create_model("ov2-vit-nano-8")
    torch.save(model.state_dict(), tmp_path / "nano.pt")
    larger = open_clip.create_model("ov2-vit-nano-8", pretrained=str(tmp_path / "nano.pt"), force_image_size=96)
    fresh = open_clip.create_model("ov2-vit-nano-8", force_image_size=96)
    assert torch.equal(larger.visual.positional_embedding, fresh.visual.positional_embedding)
    assert torch.equal(larger.text_decoder.lm_head.weight, model.text_decoder.lm_head.weight)
    bad = model.state_dict() | {"visual.positional_embedding": torch.randn(65, 192)}
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not the fixed 2-D sine-cosine table"):
        open_clip.create_model("ov2-vit-nano-8", pretrained=str(tmp_path / "bad.pt"))


def test_unregister_undoes_everything_and_register_is_idempotent() -> None:
    from open_clip import factory

    names = [patch.name for patch in patches.REGISTRATION]
    models = {path.stem for path in MODEL_CONFIGS.glob("*.json")}
    assert models <= set(open_clip.list_models())
    try:
        open_clip_ov2.unregister()
        stock = {name: getattr(factory, name) for name in names}
        assert not models & set(open_clip.list_models())
        assert factory.CustomTextCLIP is open_clip.CustomTextCLIP
        open_clip_ov2.register()
        open_clip_ov2.register()
        assert all(getattr(factory, name) is not stock[name] for name in names)
        open_clip_ov2.unregister()
        assert {name: getattr(factory, name) for name in names} == stock
    finally:
        open_clip_ov2.register()
    assert "ov2-vit-l-14" in open_clip.list_models()


ALL_RUN = [patches.Patch(*where, lambda _: object()) for where in patches.RUN | patches.STEP]
EVERY_NAME = [*patches.REGISTRATION, *ALL_RUN]


def bound(patch: patches.Patch) -> object:
    return getattr(import_module(patch.module), patch.name)


@pytest.mark.parametrize("patch", EVERY_NAME, ids=lambda patch: f"{patch.module}.{patch.name}")
def test_every_name_is_rebound_and_comes_back(patch: patches.Patch) -> None:
    """Oracle: the very same object before and after."""
    before = bound(patch)
    undo = patches.apply([patch])
    try:
        assert bound(patch) is not before
    finally:
        undo()
    assert bound(patch) is before


@pytest.mark.parametrize("gone", EVERY_NAME, ids=lambda patch: f"{patch.module}.{patch.name}")
def test_a_name_gone_upstream_is_one_line_and_nothing_stays_rebound(
    gone: patches.Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each name deleted in turn, as another version of OpenCLIP may do. Oracle: all other names are what they were."""
    table = ALL_RUN if gone in ALL_RUN else patches.REGISTRATION
    others = [patch for patch in table if patch != gone]
    before = [bound(patch) for patch in others]
    monkeypatch.delattr(import_module(gone.module), gone.name)
    with pytest.raises(ImportError, match=re.escape(f"{gone.module}.{gone.name}")) as error:
        patches.apply([*others, gone])
    assert "\n" not in str(error.value)
    assert all(bound(patch) is original for patch, original in zip(others, before, strict=True))


@pytest.mark.parametrize("private", private_names.PRIVATE_NAMES, ids=lambda private: f"{private.owner}.{private.name}")
def test_a_private_name_is_there_or_named_in_one_line(
    private: private_names.PrivateName, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert private_names.is_there(private)
    gone = private._replace(name="_gone_upstream")
    monkeypatch.setattr(private_names, "PRIVATE_NAMES", [gone])
    with pytest.raises(ImportError, match=re.escape(f"{private.owner}._gone_upstream")) as error:
        private_names.check_private_names(private.owner)
    assert "\n" not in str(error.value)


def test_registration_and_runs_check_the_private_names_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of OpenCLIP's and one of torch's renamed. Oracle: nothing is rebound, and the message names it."""
    from open_clip import factory, model
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    open_clip_ov2.unregister()
    try:
        stock = factory.CLIP
        with monkeypatch.context() as patch:
            patch.delattr(model, "_build_vision_tower")
            with pytest.raises(ImportError, match=r"open_clip\.model\._build_vision_tower"):
                open_clip_ov2.register()
        assert factory.CLIP is stock
    finally:
        open_clip_ov2.register()
    with monkeypatch.context() as patch:
        patch.delattr(_MultiProcessingDataLoaderIter, "_shutdown_workers")
        patch.setattr(private_names.inspect, "getsource", lambda _: "")
        with (
            pytest.raises(ImportError, match=r"_shutdown_workers"),
            patches.run_patches(dict.fromkeys(patches.RUN, lambda original: original)),
        ):
            pass


def test_the_page_lists_what_the_code_lists() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run python tests/openclip/patches_page.py"


def test_another_open_clip_version_is_refused_or_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below 3.3 and from 5 on an ImportError; between, one warning, and training is a one-line error."""
    for found in ("3.2.0", "5.0rc1"):
        monkeypatch.setattr(open_clip, "__version__", found)
        with pytest.raises(ImportError, match=rf"open_clip_torch >= 3\.3, < 5, and found {found}: pip install"):
            version.check_open_clip()
    monkeypatch.setattr(open_clip, "__version__", "4.0.1")
    version.check_open_clip()
    (record,) = caplog.records
    told = "open_clip_torch 4.0.1 is installed: loading, embedding, captioning, evaluation and export were checked with"
    assert told in record.getMessage()
    refused = "open_clip_torch 4.0.1 is installed, and training was checked with 3.3 alone: pip install"
    for command in ("train", "plan"):
        assert open_clip_ov2.cli.main([command, "--model", "ov2-vit-nano-8"]) == 2
        assert refused in capsys.readouterr().err
