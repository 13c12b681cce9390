"""Every private or undocumented name of other libraries that this plugin uses as it is, with the reason.

Checked with open_clip_torch 3.3.0 and torch 2.11 to 2.14, when first needed: OpenCLIP's at import, torch's and those of
other libraries when a run starts or where they are used. tests/test_layers.py finds every name with an underscore in
front, and every object that is given another class, and compares them with this list.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any, NamedTuple

from open_clip_ov2.core import vit_fast
from open_clip_ov2.openclip.version import missing_name


class PrivateName(NamedTuple):
    """`owner`, a module or a class by its import path, has the name; `files` of ours use it. The name `__class__` says
    that objects of this class are given another one."""

    owner: str
    name: str
    files: str
    why: str


_FACTORY, _BASELINES = "openclip/models/factory.py", "openclip/models/baseline_configs.py"
_LOADER = "torch.utils.data.dataloader._MultiProcessingDataLoaderIter"
_FAST_TOKENIZER = "the same ids from a table of words; it takes the place of `encode` and `__call__`"
_COCA_PARTS = "validation and generation with images that are encoded once"
PRIVATE_NAMES: tuple[PrivateName, ...] = (
    *(PrivateName(owner, name, "core/vit_fast.py", why) for owner, name, why in vit_fast.PRIVATE_NAMES),
    PrivateName(
        "open_clip.model",
        "_build_vision_tower",
        _FACTORY,
        "the encoder of an ov2 model is OpenCLIP's own, so its checkpoints and tools fit",
    ),
    PrivateName(
        "open_clip.model",
        "_build_text_tower",
        _FACTORY,
        "the text encoder beside OpenVision 1's contrastive loss is the one that CLIP has here",
    ),
    PrivateName(
        "open_clip.factory",
        "_MODEL_CONFIGS",
        f"{_BASELINES} openclip/patches.py",
        "the registry: baselines are put into it, and `unregister` takes our models out",
    ),
    PrivateName("open_clip.factory", "_MODEL_CONFIG_PATHS", "openclip/patches.py", "`unregister` takes our folder out"),
    PrivateName("open_clip.factory", "_rescan_model_configs", _BASELINES, "sorts the registry, baselines included"),
    PrivateName(
        "open_clip.pretrained",
        "_PRETRAINED",
        "openclip/models/shipped.py",
        "the table of pretrained tags: weights that the package holds are put into it",
    ),
    *(
        PrivateName("open_clip.tokenizer.SimpleTokenizer", name, "openclip/models/tokenizer.py", _FAST_TOKENIZER)
        for name in ("encoder", "byte_encoder", "bpe", "pat", "clean_fn", "reduction_fn", "sot_token_id")
    ),
    PrivateName("open_clip.tokenizer.HFTokenizer", "tokenizer", "openclip/models/tokenizer.py", "its end of text"),
    *(
        PrivateName(
            "open_clip.coca_model.CoCa", name, "openclip/models/eval_models.py openclip/models/related.py", _COCA_PARTS
        )
        for name in ("image_latent", "image_embs", "text", "text_decoder", "pad_id")
    ),
    PrivateName(
        "torch.ops.aten",
        "_flash_attention_forward",
        "core/rows.py",
        "FlashAttention-2 over rows of unequal length, forward and backward, without another dependency",
    ),
    PrivateName(
        "torch.ops.aten",
        "_scaled_dot_product_efficient_attention",
        "core/attention.py",
        "the fastest kernel for up to 64 tokens, which torch itself does not choose",
    ),
    PrivateName("torch", "_functorch", "core/compute.py", "its config has the memory budget, which has no public name"),
    PrivateName("torch", "_inductor", "core/compute.py", "`compile_fx`, the compiler that the budget applies to"),
    *(
        PrivateName("torch.cpu", name, "core/compute.py", "whether the CPU multiplies bfloat16 in hardware")
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ),
    PrivateName("torch.utils.data.dataloader", "_MultiProcessingDataLoaderIter", "data/loader.py", "see the next"),
    PrivateName(_LOADER, "_shutdown_workers", "data/loader.py", "ends data workers when an epoch is left early"),
    PrivateName("torch.utils.data.DataLoader", "_iterator", "data/loader.py", "the iterator that has the workers"),
    PrivateName(
        "torch._dynamo.eval_frame.OptimizedModule",
        "_orig_mod",
        "openclip/models/eval_models.py",
        "the model inside torch.compile",
    ),
    PrivateName(
        "torch.utils.tensorboard.SummaryWriter",
        "_get_file_writer",
        "tracking/sinks.py",
        "hyperparameters go into the run's own file; `add_hparams` makes a second run of them",
    ),
    *(
        PrivateName("submitit.SlurmExecutor", name, "launch/executor.py", "the sbatch file that a dry run shows")
        for name in ("_make_submission_file_text", "_submitit_command_str")
    ),
)


def check_private_names(*owners: str) -> None:
    """Raises ImportError, in one line, for the first name that is missing of the owners that begin so."""
    for private in PRIVATE_NAMES:
        if private.owner.startswith(owners) and not is_there(private):
            raise missing_name(f"{private.owner}.{private.name}")


def is_there(private: PrivateName) -> bool:
    """Whether the owner has the name: as an attribute or, in a class, anywhere in its source."""
    try:
        owner: Any = import_module(private.owner)
    except ImportError:
        module, _, attribute = private.owner.rpartition(".")
        owner = getattr(import_module(module), attribute, None)
    if hasattr(owner, private.name):
        return True
    return inspect.isclass(owner) and re.search(rf"\b{private.name}\b", inspect.getsource(owner)) is not None
