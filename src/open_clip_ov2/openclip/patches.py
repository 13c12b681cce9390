"""Every name that this plugin rebinds, here or in the docstring of its replacement with the reason; private_names.py
has those that are used as they are.

REGISTRATION holds from `import open_clip_ov2` on, and acts on ov2 models and released encoders alone (the check of a
folder's or the hub's config passes any other config unchanged). RUN holds while a stage of `ov2 train` is inside
OpenCLIP's `main`, STEP while an optimizer takes a step. Checked with open_clip_torch 3.3.0 and torch 2.11 to 2.14. A
name that is missing is a one-line ImportError when it is first needed, at import or when a run starts, and then nothing
stays rebound. docs/openclip.md shows both lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import open_clip

from open_clip_ov2.openclip.models import (
    baseline_configs,
    factory,
    named_model,
    preprocess,
    released,
    shipped,
    tokenizer,
    weights,
)
from open_clip_ov2.openclip.private_names import check_private_names
from open_clip_ov2.openclip.version import missing_name


class Patch(NamedTuple):
    """`module.name` becomes `replace(original)`, whose docstring says why."""

    module: str
    name: str
    replace: Callable[[Any], Any]


FACTORY, MAIN = "open_clip.factory", "open_clip_train.main"
REGISTRATION = (
    Patch(FACTORY, "CustomTextCLIP", factory.dispatch_model_class),
    Patch(FACTORY, "CLIP", factory.dispatch_model_class),
    Patch(FACTORY, "resize_pos_embed", weights.recompute_position_table),
    Patch(FACTORY, "PreprocessCfg", preprocess.leave_defaults_open),
    Patch(FACTORY, "set_model_preprocess_cfg", preprocess.supply_preprocess_cfg),
    Patch(FACTORY, "image_transform_v2", preprocess.use_ov2_crop),
    Patch(FACTORY, "HFTokenizer", tokenizer.dispatch_tokenizer),
    Patch(FACTORY, "load_checkpoint", weights.load_strictly),
    Patch("open_clip", "load_checkpoint", named_model.load_and_tell),
    Patch(FACTORY, "create_model", named_model.create_with_own_config),
    Patch("open_clip", "create_model", named_model.create_with_own_config),
    Patch(FACTORY, "parse_model_name", shipped.resolve_shipped),
    Patch(FACTORY, "_find_checkpoint_in_dir", released.check_local_config),
    Patch(FACTORY, "_get_hf_config", released.check_hub_config),
)

# (module, name) -> why. StageRun.replacements (run/stage_run.py) has a replacement for each of these and no other.
_OF_MAIN = {
    "init_distributed_device": "the process group is made once for all stages of a run",
    "setup_logging": "all stages share one log",
    "create_model_and_transforms": (
        "our model flags reach the model; a stage starts from the weights of the stage before; CoCa's decoder head, "
        "which OpenCLIP leaves uninitialized, is initialized"
    ),
    "get_tokenizer": "--tokenizer; a faster tokenizer with the same ids",
    "get_latest_checkpoint": (
        "our own search decides what to resume from; OpenCLIP takes the last file by name, finished or not"
    ),
    "pt_load": "gives the checkpoint that our own search has read whole",
    "get_data": "our loaders: caption keys, bad samples counted and bounded, a reproducible order",
    "create_loss": "ov2 models train on the caption loss; OpenCLIP chooses a loss by a substring of the model's name",
    "train_one_epoch": (
        "ov2 models take our step (OpenCLIP's accumulates for a contrastive loss); checkpoints, signals and the check "
        "for non-finite steps act between the steps of any model"
    ),
    "evaluate": "our validation; OpenCLIP's needs text features, and sums CoCa's caption loss wrongly",
    "optim": "ov2 models: no weight decay on the token embedding; AdamW in one fused kernel",
}
RUN: dict[tuple[str, str], str] = {
    **{(MAIN, name): why for name, why in _OF_MAIN.items()},
    ("timm.optim", "create_optimizer_v2"): "--opt timm/muon: embeddings and the head are left to AdamW",
    ("open_clip_train.train", "maybe_compute_generative_loss"): (
        "off: OpenCLIP's value counts padding and sums every 100th batch; our own validation loss replaces it"
    ),
    ("torch.nn.parallel", "DistributedDataParallel"): (
        "works on CPUs, where DDP refuses OpenCLIP's device_ids; keeps its buckets, for an exact resume; "
        "--gradient-reduction"
    ),
}

# The same, while an optimizer takes a step: `while_stepping` has the replacement.
STEP: dict[tuple[str, str], str] = {
    ("timm.optim.muon", "zeropower_via_newtonschulz"): (
        "--opt timm/muon on a CPU without bfloat16 units: float32, where timm has no option; emulation is slower. With "
        "--fsdp: the whole matrix, gathered once; timm's own code communicates in each of its iterations"
    ),
}


def apply(patches: Sequence[Patch]) -> Callable[[], None]:
    """Rebind all names, or none if one is missing (ImportError). Returns the undo, which restores the same objects."""
    with ExitStack() as done:
        for patch in patches:
            module = import_module(patch.module)
            if not hasattr(module, patch.name):
                raise missing_name(f"{patch.module}.{patch.name}")
            original = getattr(module, patch.name)
            done.callback(setattr, module, patch.name, original)
            setattr(module, patch.name, patch.replace(original))
        return done.pop_all().close


@contextmanager
def run_patches(replacements: dict[tuple[str, str], Callable[[Any], Any]]) -> Iterator[None]:
    """The names of RUN rebound for the length of a run. `replacements` maps each to original -> replacement."""
    if set(replacements) != set(RUN):
        raise ValueError(f"replacements and RUN differ: {sorted(set(replacements) ^ set(RUN))}")
    check_private_names("open_clip_train", "torch.utils.data")
    with ExitStack() as run:
        run.callback(apply([Patch(*where, replace) for where, replace in replacements.items()]))
        yield


def while_stepping(optimizer: Any, where: tuple[str, str], replace: Callable[[Any], Any]) -> None:
    """A name of STEP is rebound in each step of this optimizer."""
    undo = ExitStack()

    def rebind(*_: Any) -> None:
        undo.close()  # after a step that failed, which has no post hook
        undo.callback(apply([Patch(*where, replace)]))

    optimizer.register_step_pre_hook(rebind)
    optimizer.register_step_post_hook(lambda *_: undo.close())


_undo_registration: list[Callable[[], None]] = []


def register() -> None:
    """Add the ov2 models, and CoCa and CLIP of their sizes, to OpenCLIP. A second call changes nothing. Raises
    ImportError, in one line, if OpenCLIP lacks a name that is rebound or used."""
    if _undo_registration:
        return
    check_private_names("open_clip")
    _undo_registration.append(apply(REGISTRATION))
    open_clip.add_model_config(factory.MODEL_CONFIGS)
    baseline_configs.add_baselines()
    shipped.add_shipped()


def unregister() -> None:
    """The exact opposite of register."""
    if not _undo_registration:
        return
    _undo_registration.pop()()
    shipped.remove_shipped()
    open_clip.factory._MODEL_CONFIG_PATHS.remove(factory.MODEL_CONFIGS)
    for path in factory.MODEL_CONFIGS.glob("*.json"):
        for prefix in ("", *baseline_configs.BASELINES):
            open_clip.factory._MODEL_CONFIGS.pop(prefix + path.stem, None)
