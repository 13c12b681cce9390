"""Opens a model from a run, a checkpoint of it, a folder or a hub name, released or exported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory as open_clip_factory
from torch import nn

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.errors import UserError, first_line, nearest
from open_clip_ov2.formats.authors import DECODER_CONFIG, DECODER_FILE, VOCAB_FILE
from open_clip_ov2.formats.open_clip import CONFIG
from open_clip_ov2.openclip.models import own_config
from open_clip_ov2.openclip.models.factory import check_named_size
from open_clip_ov2.openclip.models.named_model import check_same_model
from open_clip_ov2.openclip.models.own_config import OwnConfig
from open_clip_ov2.openclip.models.preprocess import eval_transform
from open_clip_ov2.openclip.models.released import CONTEXT_LENGTH, add_decoder
from open_clip_ov2.openclip.models.shipped import shipped_folder
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer
from open_clip_ov2.openclip.models.weights import why_unreadable

logger = logging.getLogger(__name__)

HUB = "hf-hub:"
RANDOM = "random"  # weights as a model of this name starts with: the floor under what training adds


@dataclass
class LoadedModel:
    """A trained model in evaluation mode, and where it was found. `max_tokens`: of one that was trained with --aspect
    native; `preprocess` makes squares even so."""

    model: nn.Module
    preprocess: Any
    tokenizer: Any
    preprocess_cfg: dict[str, Any]
    folder: Path
    checkpoint: Path
    max_tokens: int | None = None


@dataclass(frozen=True)
class Where:
    """Where a model is. `name` is its name for OpenCLIP; `pretrained` belongs to a model of OpenCLIP's registry. With
    neither `checkpoint` nor `pretrained`, the folder's own weights are meant. `config` is the checkpoint's."""

    name: str
    folder: Path | None = None
    checkpoint: Path | None = None
    pretrained: str | None = None
    config: OwnConfig | None = None


def open_model(
    source: str | Path,
    device: str = "cpu",
    *,
    image_size: int | tuple[int, int] | None = None,
    position_table: str | None = None,
) -> LoadedModel:
    """A trained model in evaluation mode. Raises UserError.

    `source`: a run's folder, a checkpoint in it, a folder with open_clip_config.json and weights (released or written
    by `ov2 export` or `ov2 convert`), a hub name with `hf-hub:`, or a name of OpenCLIP's registry with its weights,
    `ov2-vit-nano-8:TAG`, `ViT-B-32:openai`, `ViT-B-32:FILE`, `ViT-B-32:random` (untrained, drawn with seed 0).
    `image_size` and `position_table` as for `create_model`.
    With a caption decoder if there is one.
    """
    where = locate(str(source))
    try:
        model, tokenizer = _opened(where, str(source), image_size, position_table)
        model.to(torch.device(device)).eval()
    except UserError:
        raise
    except Exception as error:
        what, line = where.checkpoint or source, first_line(error)
        if line.startswith(str(what)):
            raise UserError(line) from error
        why = why_unreadable(what, error) if isinstance(what, Path) else line  # torch's own, for a model of OpenCLIP's
        raise UserError(f"{what}: cannot be loaded ({why})") from error
    folder, checkpoint, own = where.folder, where.checkpoint, where.config
    if where.pretrained is not None:
        folder, checkpoint = Path(), Path(where.pretrained)
    elif folder is None:
        folder = _hub_file(where.name, CONFIG).parent
    if own is None and where.pretrained is None and (folder / CONFIG).is_file():
        own = own_config.config_in(folder)
    preprocess_cfg, max_tokens = dict(model.visual.preprocess_cfg), own.max_tokens if own else None
    transform = eval_transform(preprocess_cfg)
    return LoadedModel(model, transform, tokenizer, preprocess_cfg, folder, checkpoint or folder, max_tokens)


def _opened(where: Where, source: str, image_size: Any, position_table: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, by whatever OpenCLIP raises."""
    by_name = contextlib.nullcontext(where.name)
    with own_config.as_folder(where.checkpoint, where.config) if where.checkpoint and where.config else by_name as name:
        try:
            check_named_size(name, image_size)
        except ValueError as error:
            raise UserError(f"{error} (the model is {source})") from None
        options = {"force_image_size": image_size}
        if position_table is not None:
            options["position_table"] = position_table
        if where.pretrained == RANDOM:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = open_clip.create_model(name, **options)
        else:
            model = open_clip.create_model(name, where.pretrained, require_pretrained=True, **options)
        tokenizer = open_clip.get_tokenizer(name)
    return _with_decoder(model, tokenizer, where) if isinstance(model, VisionModel) else (model, tokenizer)


def create_caption_model(source: str, **options: Any) -> tuple[CaptionModel, Callable[..., Any], Any]:
    """(model, preprocess, tokenizer) of a model that captions; `source` and `options` as for `open_model`."""
    run = open_model(source, **options)
    return caption_model(run), run.preprocess, run.tokenizer


def caption_model(run: LoadedModel) -> CaptionModel:
    """The model, if it has a decoder. Raises UserError for one without."""
    if isinstance(run.model, CaptionModel):
        return run.model
    if isinstance(run.model, VisionModel):
        raise UserError(f"{run.folder}: an encoder without a decoder ({DECODER_FILE}), so it cannot caption")
    raise UserError(f"{run.folder}: not an ov2 model")


def locate(source: str) -> Where:
    """Where the model of this source is. Raises UserError."""
    if source.startswith(HUB):
        return Where(source)
    path = shipped_folder(source) or Path(source.removeprefix(own_config.LOCAL))
    if not path.exists():
        return _named(source)
    if path.is_file():
        if (config := own_config.config_of(path)) is None:
            raise UserError(f"{path}: no {CONFIG} in it, beside it or one folder up, so its model is not known")
        return Where(own_config.LOCAL + str(config.folder), config.folder or path.parent, path, config=config)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: not the folder of a run (no {CONFIG} in it)")
    if (checkpoint := own_config.newest_of_run(path)) is not None:
        return Where(own_config.LOCAL + str(path), path, checkpoint, config=own_config.config_of(checkpoint))
    if not own_config.has_weights(path):
        raise UserError(f"{path}: neither checkpoints nor weights in it")
    return Where(own_config.LOCAL + str(path), path)


def _named(source: str) -> Where:
    """NAME:FILE or NAME:TAG. A file that says what it is must be of that name, and brings its own configuration."""
    name, _, pretrained = source.partition(":")
    if name not in open_clip.list_models():
        raise UserError(f"{source}: no such file, folder or model{nearest(name, open_clip.list_models())}")
    if not pretrained:
        raise UserError(f"{source}: a model without weights; name them, {name}:TAG or {name}:FILE")
    file = Path(pretrained)
    config = own_config.config_of(file) if file.is_file() else None
    if config is None:
        return Where(name, pretrained=pretrained)
    check_same_model(name, OwnConfig(open_clip_factory.get_model_config(name), {}), file, config)
    return Where(name, config.folder or file.parent, file, config=config)


def _hub_file(name: str, file: str) -> Path:
    return Path(open_clip_factory.download_pretrained_from_hf(name.removeprefix(HUB), filename=file))


def _with_decoder(model: VisionModel, tokenizer: Any, where: Where) -> tuple[nn.Module, Any]:
    """The released caption decoder and its word pieces, where they lie beside the encoder."""
    folder = where.folder or _fetch_decoder(where.name)
    if folder is None or not (folder / DECODER_CONFIG).is_file():
        logger.info("%s: an encoder alone (no %s)", where.name, DECODER_CONFIG)
        return model, tokenizer
    if not (folder / VOCAB_FILE).is_file():
        raise UserError(f"{folder}: a caption decoder without its vocabulary, {VOCAB_FILE}")
    return add_decoder(model, folder), WordPieceTokenizer(folder / VOCAB_FILE, CONTEXT_LENGTH)


def _fetch_decoder(name: str) -> Path | None:
    """The hub's snapshot with all three files of the decoder in it; none if the repository has no decoder. Raises
    UserError if that cannot be known: a network that fails does not answer the question."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        found = Path(hf_hub_download(name.removeprefix(HUB), DECODER_CONFIG))
    except LocalEntryNotFoundError as error:  # not in the cache, and the hub was not or could not be asked
        if not constants.HF_HUB_OFFLINE:
            raise UserError(f"{name}: cannot tell whether it has a caption decoder ({first_line(error)})") from error
        logger.warning("%s: offline, and no %s in the cache: an encoder alone", name, DECODER_CONFIG)
        return None
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise UserError(f"{name}: cannot tell whether it has a caption decoder ({first_line(error)})") from error
    for file in (DECODER_FILE, VOCAB_FILE):
        _hub_file(name, file)
    return found.parent
