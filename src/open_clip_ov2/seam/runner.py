"""`ov2 train`: OpenCLIP's own `main`, with our pieces in the places that patches.RUN lists."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip_train.main as open_clip_main
import torch
from open_clip import CoCa
from open_clip import factory as open_clip_factory
from rich.console import Console
from torch import nn

from open_clip_ov2.core import CaptionLoss, CaptionModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.runlog.log import FILE_ONLY, setup_logging
from open_clip_ov2.runlog.monitor import MonitorConfig, RunMonitor
from open_clip_ov2.seam import baselines, evaluate, factory, patches, shims
from open_clip_ov2.seam.arguments import TrainOptions, parse
from open_clip_ov2.seam.datasets import LoaderInfo, make_data
from open_clip_ov2.seam.preprocess import color_jitter_cfg
from open_clip_ov2.seam.run_folder import resolved_config, write_config
from open_clip_ov2.seam.step import StepSettings, train_epoch
from open_clip_ov2.seam.tokenizer import WordPieceTokenizer, text_cfg_for

logger = logging.getLogger("open_clip_ov2")
_HPARAMS = ("model", "lr", "wd", "batch_size", "accum_freq", "warmup", "epochs", "precision", "seed")  # TensorBoard's


def train(argv: Sequence[str]) -> Path | None:
    """Parse, check, run. Returns the run's folder (on the master). Raises UserError."""
    options, args, open_clip_argv = parse(argv)
    _check_run_folder(args)
    return Run(options, args, open_clip_argv).start()


def _check_run_folder(args: argparse.Namespace) -> None:
    if args.name and args.resume != "latest" and (Path(args.logs) / args.name / "out.log").exists():
        raise UserError(
            f"--name {args.name}: {Path(args.logs) / args.name} exists; choose another name, or go on with "
            "--resume latest"
        )


class Run:
    """One call of OpenCLIP's `main`. Its methods are the replacements that patches.RUN names."""

    def __init__(self, options: TrainOptions, args: argparse.Namespace, open_clip_argv: list[str]) -> None:
        self.options = options
        self.family = factory.is_family(args.model)
        self.argv = [word for word in open_clip_argv if not (self.family and word == "--torchcompile")]
        self.compile_blocks = self.family and args.torchcompile
        self.argv = shims.without_report_to(self.argv)
        self.tensorboard = "tensorboard" in args.report_to
        self._hparams = {name: getattr(args, name) for name in _HPARAMS} | {
            name: str(getattr(options, name)) for name in ("keep_ratio", "fusion", "tokenizer")
        }
        self.console = Console()
        self.folder: Path | None = None
        self._model: Any = None
        self._preprocess_cfg: dict[str, Any] = {}
        self._monitor: RunMonitor | None = None
        self._log: Any = None
        self._tokenizer: Any = None

    def start(self) -> Path | None:
        try:
            with patches.run_patches(self._replacements()):
                result = open_clip_main.main(self.argv)
            if self._monitor is not None:
                self._monitor.hparams(self._hparams)
        finally:
            if self._monitor is not None:
                self._monitor.close()
            if self._log is not None:
                self._log.close()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if result == -1:
            raise UserError("OpenCLIP's main stopped with an error; its message stands above")
        return self.folder

    def _replacements(self) -> dict[tuple[str, str], Callable[[Any], Any]]:
        main = "open_clip_train.main"
        return {
            (main, "setup_logging"): lambda _: self._setup_logging,
            (main, "create_model_and_transforms"): self._creates_model,
            (main, "get_tokenizer"): self._gets_tokenizer,
            (main, "get_data"): lambda _: self._get_data,
            (main, "create_loss"): self._creates_loss,
            (main, "train_one_epoch"): self._trains,
            (main, "evaluate"): self._evaluates,
            (main, "optim"): self._optim,
            ("open_clip_train.train", "maybe_compute_generative_loss"): lambda _: lambda model_out: None,
            ("torch.nn.parallel", "DistributedDataParallel"): shims.ddp_on_any_device,
        }

    # --- logging -------------------------------------------------------------------------------------

    def _setup_logging(self, log_file: str | None, level: int, include_host: bool = False) -> None:
        self.folder = Path(log_file).parent if log_file else None
        self._log = setup_logging(
            self.folder,
            0 if log_file else 1,
            self.console if log_file else None,
            debug=level == logging.DEBUG,
        )
        logger.info("options of ov2: %s", self.options, extra={FILE_ONLY: True})

    # --- model ---------------------------------------------------------------------------------------

    def _creates_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create(name: str, pretrained: str | None = None, **kwargs: Any) -> Any:
            extra = self._model_options(name, kwargs.get("force_context_length"))
            if self.family and self.options.color_jitter:
                kwargs["aug_cfg"] = {**color_jitter_cfg(), **(kwargs.get("aug_cfg") or {})}
            try:
                model, train_tf, val_tf = original(name, pretrained, **kwargs, **extra)
            except (ValueError, RuntimeError) as error:
                raise UserError(f"--model {name}: {error}") from error
            if not pretrained:
                baselines.init_coca_head(model)
            if self.compile_blocks:
                model.compile_blocks()
            self._model, self._preprocess_cfg = model, dict(model.visual.preprocess_cfg)
            return model, train_tf, val_tf

        return create

    def _model_options(self, name: str, context_length: int | None) -> dict[str, Any]:
        if not self.family:
            return {}
        extra: dict[str, Any] = self.options.model_options()
        if self.options.tokenizer:
            config = open_clip_factory.get_model_config(name) or {}
            extra["text_cfg"] = text_cfg_for(
                self.options.tokenizer, context_length or config["text_cfg"]["context_length"]
            )
        return extra

    def _gets_tokenizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_tokenizer(name: str, **kwargs: Any) -> Any:
            if self.options.tokenizer:
                self._tokenizer = WordPieceTokenizer(
                    self.options.tokenizer, self._model.context_length, kwargs.get("cache_dir")
                )
            else:
                self._tokenizer = original(name, **kwargs)
            return self._tokenizer

        return get_tokenizer

    def _optim(self, original: Any) -> Any:
        return shims.optim_for(self._model_parameters) if self.family else original

    def _model_parameters(self) -> tuple[dict[str, nn.Parameter], set[str]]:
        return dict(self._model.named_parameters()), self._model.no_weight_decay()

    # --- data ----------------------------------------------------------------------------------------

    def _get_data(
        self, args: argparse.Namespace, transforms: tuple[Any, Any], epoch: int = 0, tokenizer: Any = None
    ) -> dict[str, LoaderInfo]:
        data = make_data(args, transforms, tokenizer, self.options, epoch)
        if args.imagenet_val or args.imagenet_v2:
            from open_clip_train import data as stock_data

            for split, path in (("val", args.imagenet_val), ("v2", args.imagenet_v2)):
                if path:
                    data[f"imagenet-{split}"] = stock_data.get_imagenet(args, transforms, split)
        if self.folder is not None:
            model_options = self._model_options(args.model, args.force_context_length)
            write_config(self.folder, resolved_config(args, model_options), self._preprocess_cfg)
        return data

    # --- the loop ------------------------------------------------------------------------------------

    def _creates_loss(self, original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def create_loss(args: argparse.Namespace) -> nn.Module:
            if self.family:
                return CaptionLoss(label_smoothing=self.options.label_smoothing, z_loss=self.options.z_loss)
            off = isinstance(self._model, CoCa) and args.coca_contrastive_loss_weight == 0
            return baselines.RecordedLoss(original(args), contrastive_off=off)

        return create_loss

    def _trains(self, original: Callable[..., None]) -> Callable[..., None]:
        def train_one_epoch(
            model: nn.Module, data: dict[str, Any], loss: Any, epoch: int, optimizer: Any, scaler: Any,
            scheduler: Any, dist_model: Any, args: argparse.Namespace, tb_writer: Any = None,
        ) -> None:  # fmt: skip
            monitor, loader = self.monitor(args, data), data["train"].dataloader
            loader.set_epoch(epoch)
            monitor.start_epoch(epoch)
            if self.family:
                set_lr = None if args.skip_scheduler else scheduler
                settings = self.settings(args)
                train_epoch(model, loader, loss, epoch, optimizer, scaler, set_lr, settings, monitor)
            else:
                feed = baselines.StockFeed(
                    loader, epoch=epoch, accum_freq=args.accum_freq, world_size=args.world_size, loss=loss,
                    optimizer=optimizer, monitor=monitor,
                )  # fmt: skip
                stock_args = (model, loss, epoch, optimizer, scaler, scheduler, dist_model)
                baselines.stock_epoch(original, feed, *stock_args, run_args=args)
            monitor.end_epoch(evaluate.gathered_counts(monitor.epoch_skips, args.world_size))

        return train_one_epoch

    def _evaluates(self, original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        def run_evaluation(
            model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace, tb_writer: Any = None,
            tokenizer: Any = None,
        ) -> dict[str, float]:  # fmt: skip
            last = epoch == args.epochs
            if "val" not in data or not (args.val_frequency and (epoch % args.val_frequency == 0 or last)):
                return {}
            monitor, loader = self.monitor(args, data), data["val"].dataloader
            metrics: dict[str, float] = {}
            if self.compile_blocks:  # each length of a growing caption would be compiled anew
                torch.compiler.set_stance("force_eager")
            if self.family or isinstance(evaluate.unwrap(model), CoCa):
                metrics = evaluate.caption_loss(model, loader, self.settings(args))
            if not self.family and args.rank == 0:
                metrics |= baselines.stock_metrics(original, model, loader, data, epoch, args, tokenizer)
            samples_seen = data["train"].dataloader.num_samples * epoch if "train" in data else 0
            monitor.evaluation(samples_seen, epoch, metrics)
            if self.family and args.rank == 0 and self.options.sample_captions:
                self._show_captions(evaluate.unwrap(model), loader, samples_seen, args, monitor)
            if self.compile_blocks:
                torch.compiler.set_stance("default")
            return metrics

        return run_evaluation

    def _show_captions(
        self, model: Any, loader: Any, samples_seen: int, args: argparse.Namespace, monitor: RunMonitor
    ) -> None:
        assert isinstance(model, CaptionModel)
        batch = next(iter(loader.full()))
        count = self.options.sample_captions
        images, keys = batch.images_BCHW[:count], batch.keys[:count]
        model.eval()
        generated = evaluate.generate_captions(model, images, keys, self._tokenizer, self.settings(args))
        cfg = self._preprocess_cfg
        pictures = evaluate.to_uint8(images, cfg["mean"], cfg["std"])
        monitor.captions(samples_seen, pictures, batch.captions[:count], generated)

    def settings(self, args: argparse.Namespace) -> StepSettings:
        return StepSettings(
            device=torch.device(args.device),
            precision=args.precision,
            world_size=args.world_size,
            accum_freq=args.accum_freq,
            grad_clip_norm=args.grad_clip_norm,
            loss_weight=args.coca_caption_loss_weight,
            eos_id=self._model.text_config.eos_id if self.family else baselines.CLIP_EOS_ID,
        )

    def monitor(self, args: argparse.Namespace, data: dict[str, Any]) -> RunMonitor:
        """Made at the first need, when the length of the run is known."""
        if self._monitor is None:
            train_loader = data["train"].dataloader if "train" in data else None
            global_batch = args.batch_size * args.world_size * args.accum_freq
            steps = train_loader.num_batches // args.accum_freq * args.epochs if train_loader else 0
            config = MonitorConfig(
                run_dir=Path(args.logs) / args.name,
                rank=args.rank,
                world_size=args.world_size,
                log_every_n_steps=args.log_every_n_steps,
                tensorboard=self.tensorboard,
                model_name=args.model,
                total_samples=steps * global_batch,
                batch_images=global_batch,
                device_type=torch.device(args.device).type,
            )
            self._monitor = RunMonitor(config, console=self.console)
        return self._monitor
