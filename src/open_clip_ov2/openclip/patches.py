"""Every name that this plugin rebinds in OpenCLIP, with the reason. Nothing is rebound anywhere else.

Checked against open_clip_torch 3.3.0. A name that is gone is an ImportError that names it. `undo` restores
what was there before. REGISTRATION holds from `import open_clip_ov2` on and acts on ov2 and released encoders alone
(but for the check of a folder's or the hub's config, which any other passes unchanged); the names of a
run (stage_run.py fills in the replacements) hold only while `ov2 train` is inside OpenCLIP's `main`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from open_clip_ov2.openclip.models import baseline_configs, factory, preprocess, released, tokenizer, weights


@dataclass(frozen=True)
class Patch:
    """`module.name` becomes `replace(original)`."""

    module: str
    name: str
    replace: Callable[[Any], Any]
    why: str


REGISTRATION: tuple[Patch, ...] = (
    Patch(
        "open_clip.factory",
        "CustomTextCLIP",
        released.dispatch_model_class,
        "create_model picks the class from its module's globals; a config with decoder_cfg is a CaptionModel",
    ),
    Patch(
        "open_clip.factory",
        "resize_pos_embed",
        factory.recompute_position_table,
        "a fixed sin-cos table is recomputed for a new grid; upstream interpolates it",
    ),
    Patch(
        "open_clip.factory",
        "set_model_preprocess_cfg",
        preprocess.supply_preprocess_cfg,
        "ImageNet mean/std and bilinear for ov2 models; upstream falls back to OpenAI's constants",
    ),
    Patch(
        "open_clip.factory",
        "image_transform_v2",
        preprocess.use_family_crop,
        "upstream's train crop is bicubic and 90-100% whatever is asked for",
    ),
    Patch(
        "open_clip.factory",
        "HFTokenizer",
        tokenizer.dispatch_tokenizer,
        "the reference's ids: no text cleaning, no special tokens in text, bos 1, eos 2",
    ),
    Patch(
        "open_clip.factory",
        "CLIP",
        released.dispatch_model_class,
        "a released vision-only config is a VisionModel; upstream builds a text tower that no weights belong to",
    ),
    Patch(
        "open_clip.factory",
        "load_checkpoint",
        weights.load_strictly,
        "bare encoder keys are read as a text tower upstream; ours: all keys accounted for, nothing unpickled",
    ),
    Patch("open_clip", "load_checkpoint", weights.load_strictly, "the same function under its public name"),
    Patch(
        "open_clip.factory",
        "create_model",
        released.load_image_weights_strictly,
        "pretrained_image_path is loaded with strict=False upstream, and its errors are logged and passed over",
    ),
    Patch("open_clip", "create_model", released.load_image_weights_strictly, "the same function under its public name"),
    Patch(
        "open_clip.factory",
        "_find_checkpoint_in_dir",
        released.check_local_config,
        "a folder's config without vision_cfg is a bare KeyError upstream",
    ),
    Patch(
        "open_clip.factory",
        "_get_hf_config",
        released.check_hub_config,
        "the same for the hub; a hub config could switch on trust_remote_code for its tokenizer",
    ),
)

# What a run rebinds, and why. stage_run.py gives a replacement for each of these names, and for no other.
RUN: dict[tuple[str, str], str] = {
    ("open_clip_train.main", "init_distributed_device"): "a process group is made once for all stages of a run",
    ("open_clip_train.main", "setup_logging"): "one log for all stages; the page of parameters goes to the file alone",
    ("open_clip_train.main", "create_model_and_transforms"): (
        "ov2's own model options reach the model; a stage starts from the weights of the one before; CoCa's decoder "
        "head, left uninitialised upstream, is initialised"
    ),
    ("open_clip_train.main", "get_tokenizer"): "--tokenizer",
    ("open_clip_train.main", "get_latest_checkpoint"): "upstream takes the last file by name, finished or not",
    ("open_clip_train.main", "pt_load"): "the checkpoint that our own search has read and found whole",
    ("open_clip_train.main", "get_data"): "caption keys, bad samples counted and bounded, deterministic order",
    ("open_clip_train.main", "create_loss"): "the caption loss; upstream dispatches on a substring of the name",
    ("open_clip_train.main", "train_one_epoch"): (
        "upstream's accumulation is wrong for a caption loss; checkpoints, signals and the guard act between steps"
    ),
    ("open_clip_train.main", "evaluate"): "upstream's needs text features, and sums CoCa's caption loss wrongly",
    ("open_clip_train.main", "optim"): "no weight decay on the token embedding; fused AdamW",
    ("timm.optim", "create_optimizer_v2"): "--opt timm/muon: embeddings and head are AdamW's",
    ("open_clip_train.train", "maybe_compute_generative_loss"): (
        "upstream's value counts padding and sums every 100th batch; ours stands in its place"
    ),
    ("torch.nn.parallel", "DistributedDataParallel"): (
        "upstream passes device_ids, which DDP refuses on CPU; buckets that stay the same, for an exact resume; "
        "--gradient-reduction"
    ),
}

_MISSING = object()


def apply(patches: Sequence[Patch]) -> Callable[[], None]:
    """Rebind all, or none. Returns the undo."""
    done: list[tuple[Any, str, Any]] = []

    def undo() -> None:
        while done:
            module, name, original = done.pop()
            setattr(module, name, original)

    for patch in patches:
        module = import_module(patch.module)
        original = getattr(module, patch.name, _MISSING)
        if original is _MISSING:
            undo()
            raise ImportError(
                f"open_clip_ov2 rebinds {patch.module}.{patch.name}, which is not there in this version; "
                "pip install 'open_clip_torch[training]==3.3.*'"
            )
        setattr(module, patch.name, patch.replace(original))
        done.append((module, patch.name, original))
    return undo


@contextmanager
def run_patches(replacements: dict[tuple[str, str], Callable[[Any], Any]]) -> Iterator[None]:
    """The names of RUN rebound for the length of a run. `replacements` maps each to original -> replacement."""
    if set(replacements) != set(RUN):
        raise ValueError(f"replacements and RUN differ: {sorted(set(replacements) ^ set(RUN))}")
    undo = apply([Patch(*where, replace, RUN[where]) for where, replace in replacements.items()])
    try:
        yield
    finally:
        undo()


_undo_registration: list[Callable[[], None]] = []


def register() -> None:
    """Make the family known to OpenCLIP. Once is enough, twice does no harm."""
    if _undo_registration:
        return
    import open_clip

    _undo_registration.append(apply(REGISTRATION))
    open_clip.add_model_config(factory.MODEL_CONFIGS)
    baseline_configs.add_baselines()


def unregister() -> None:
    """The exact opposite of register."""
    if not _undo_registration:
        return
    _undo_registration.pop()()
    baseline_configs.remove_baselines()
    from open_clip import factory as open_clip_factory

    open_clip_factory._MODEL_CONFIG_PATHS.remove(factory.MODEL_CONFIGS)
    for path in factory.MODEL_CONFIGS.glob("*.json"):
        open_clip_factory._MODEL_CONFIGS.pop(path.stem, None)
