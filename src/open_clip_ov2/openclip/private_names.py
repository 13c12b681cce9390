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


_FACTORY, _TOKENIZER = "openclip/models/factory.py", "openclip/models/tokenizer.py"
_PATCHES, _BASELINES = "openclip/patches.py", "openclip/models/baseline_configs.py"
_COMPUTE, _LOADER = "core/compute.py", "data/loader.py"
_SIMPLE_TOKENIZER = "encoder byte_encoder bpe pat clean_fn reduction_fn sot_token_id"
_COCA_FILES = "openclip/models/eval_models.py openclip/models/related.py"
_DATA_LOADER = "torch.utils.data.dataloader"
# Owner, names, files, why.
_ROWS = (
    *((owner, name, "core/vit_fast.py", why) for owner, name, why in vit_fast.PRIVATE_NAMES),
    ("open_clip.model", "_build_vision_tower", _FACTORY, "the encoder of an ov2 model is OpenCLIP's own"),
    ("open_clip.model", "_build_text_tower", _FACTORY, "the text encoder of OpenVision 1 is that of CLIP here"),
    ("open_clip.factory", "_MODEL_CONFIGS", f"{_BASELINES} {_PATCHES}", "the registry, to which baselines are added"),
    ("open_clip.factory", "_MODEL_CONFIG_PATHS", _PATCHES, "`unregister` takes our folder out"),
    ("open_clip.factory", "_rescan_model_configs", _BASELINES, "sorts the registry, baselines included"),
    ("open_clip.pretrained", "_PRETRAINED", "openclip/models/shipped.py", "weights that the package holds are listed"),
    ("open_clip.tokenizer.SimpleTokenizer", _SIMPLE_TOKENIZER, _TOKENIZER, "the same ids from a table of words"),
    ("open_clip.tokenizer.HFTokenizer", "tokenizer", _TOKENIZER, "its end of text"),
    (
        "open_clip.coca_model.CoCa",
        "image_latent image_embs text text_decoder pad_id",
        _COCA_FILES,
        "images encoded once",
    ),
    ("torch.ops.aten", "_flash_attention_forward", "core/rows.py", "FlashAttention-2 over rows of unequal length"),
    (
        "torch.ops.aten",
        "_scaled_dot_product_efficient_attention",
        "core/attention.py",
        "the fastest kernel for up to 64 tokens, which torch itself does not choose",
    ),
    ("torch", "_functorch", _COMPUTE, "its config has the memory budget, which has no public name"),
    ("torch", "_inductor", _COMPUTE, "`compile_fx`, the compiler that the budget applies to"),
    ("torch.cpu", "_is_avx512_bf16_supported _is_amx_tile_supported", _COMPUTE, "whether the CPU multiplies bfloat16"),
    (_DATA_LOADER, "_MultiProcessingDataLoaderIter", _LOADER, "see the next"),
    (
        f"{_DATA_LOADER}._MultiProcessingDataLoaderIter",
        "_shutdown_workers",
        _LOADER,
        "ends data workers when an epoch is left early",
    ),
    ("torch.utils.data.DataLoader", "_iterator", _LOADER, "the iterator that has the workers"),
    ("torch._dynamo.eval_frame.OptimizedModule", "_orig_mod", "openclip/models/eval_models.py", "inside torch.compile"),
    (
        "torch.utils.tensorboard.SummaryWriter",
        "_get_file_writer",
        "tracking/sinks.py",
        "hyperparameters go into the run's own file; `add_hparams` makes a second run of them",
    ),
    (
        "submitit.SlurmExecutor",
        "_make_submission_file_text _submitit_command_str",
        "launch/executor.py",
        "the sbatch file that a dry run shows",
    ),
    (
        "atexit",
        "_run_exitfuncs",
        "compare/subprocesses.py",
        "before Python 3.13 multiprocessing ends a process without them",
    ),
)
PRIVATE_NAMES = tuple(
    PrivateName(owner, name, files, why) for owner, names, files, why in _ROWS for name in names.split()
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
