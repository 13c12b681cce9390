"""How a model in training lies on the processes: all of it on each (one process, or DDP: `Whole`), or a part of every
tensor on each (torch's FSDP2: `Sharded`). Whatever else trains does not ask.

A sharded tensor is a DTensor, split along its first dimension as torch.chunk splits it; FSDP2 gathers the parameters of
a block while it computes. A scalar, which cannot be split, is a DTensor of shape (1,).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.core.compute import AUTOCAST
from open_clip_ov2.errors import UserError

if TYPE_CHECKING:
    from open_clip_ov2.train.ema import WeightAverage

logger = logging.getLogger("open_clip_ov2")

Read = Callable[[nn.Module, Optional["WeightAverage"]], dict[str, Any]]


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Dicts, lists and tuples with their leaves replaced, in order."""
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(function, value) for value in tree)
    return function(tree)


@dataclass(frozen=True)
class Layout:
    """How tensors are split: over the last dimension of the mesh of processes."""

    mesh: DeviceMesh
    placements: Sequence[Placement]

    @classmethod
    def over(cls, device: torch.device, world_size: int, within: int | None = None) -> Layout:
        """Over all processes, or over each group of `within` (--fsdp-hybrid), which then has a copy of the model."""
        if within is None:
            return cls(init_device_mesh(device.type, (world_size,)), (Shard(0),))
        shape, names = (world_size // within, within), ("replicate", "shard")
        return cls(init_device_mesh(device.type, shape, mesh_dim_names=names), (Replicate(), Shard(0)))

    def part(self, count: int) -> slice:
        """Which of so many rows this process has."""
        last = self.mesh.ndim - 1
        each, own = -(-count // self.mesh.size(last)), self.mesh.get_local_rank(last)
        return slice(min(own * each, count), min((own + 1) * each, count))

    def wrap(self, own: Tensor, shape: torch.Size) -> DTensor:
        """This process's rows as a tensor of the whole shape, contiguous."""
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def place(self, value: Tensor) -> Tensor:
        """A tensor that each process has in whole -> this process's part of it."""
        if isinstance(value, DTensor):
            return value
        value = value.reshape(1) if value.ndim == 0 else value
        return self.wrap(value[self.part(len(value))].to(self.mesh.device_type, copy=True), value.shape)


def gathered(value: Any) -> Any:
    """A sharded tensor in whole, on its device; anything else as it is. All processes have to ask."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor().detach()
    return full.reshape(()) if full.shape == (1,) else full


def held(value: Tensor) -> Tensor:
    """The part of a tensor that this process has, which shares its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def on_whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a matrix, for a sharded one too: of all of it, on every process, which keeps its part."""

    def of_whole(matrix: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out = function(gathered(matrix), *arguments, **options)
        return Layout(matrix.device_mesh, matrix.placements).place(out) if isinstance(matrix, DTensor) else out

    return of_whole


class Whole:
    """Each process has all of the model, `model`. `prefix`: what DDP puts before the names of its parameters."""

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self.model, self.prefix = model, prefix
        self.shapes: Mapping[str, Tensor] = model.state_dict()  # those of a plain checkpoint

    def place_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict, or a part of one, as this process has it."""
        return state

    def place_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict as the optimizer takes it."""
        return state

    def read(self, read: Read, average: WeightAverage | None, optimizer: Any, everywhere: bool = False) -> Any:
        """What `read` makes of the model and its average in whole, and the state of the optimizer, if one is given;
        where the model is sharded on rank 0 alone, unless `everywhere`, and {} on others. All processes have to ask."""
        return {**read(self.model, average), **({"optimizer": optimizer.state_dict()} if optimizer else {})}

    def shards(self, average: WeightAverage | None, optimizer: Any) -> dict[str, Any]:
        """What this process has of weights, average and, if one is given, optimizer, for a ShardWriter."""
        raise NotImplementedError("a whole model has no shards")

    @contextlib.contextmanager
    def readable(
        self, model: nn.Module, average: WeightAverage | None
    ) -> Iterator[tuple[nn.Module, WeightAverage | None]]:
        """The model in training, `model` as `main` has it, and its average, as each process can evaluate it alone."""
        yield model, average


class Sharded(Whole):
    """The model is sharded in place, block by block, and computes as `precision` (OpenCLIP's name) says. With autocast,
    parameters are gathered in its data type and gradients summed in float32, or in `reduction`. Raises UserError for a
    model that cannot be sharded."""

    def __init__(self, model: nn.Module, layout: Layout, precision: str, reduction: torch.dtype | None) -> None:
        self._layout, self._plain = layout, _without_weights(model)
        super().__init__(model)
        self.shapes = self._plain.state_dict()
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 0:
                    module.register_parameter(name, nn.Parameter(parameter.detach()[None], parameter.requires_grad))
        dtype = AUTOCAST.get(precision)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduction or (dtype and torch.float32))
        blocks = blocks_of(model)
        for module in [*blocks, model]:
            fully_shard(module, mesh=layout.mesh, mp_policy=policy)
        own, whole = (sum(each(p) for p in model.parameters()) for each in (lambda p: held(p).numel(), Tensor.numel))
        logger.info("FSDP2: %s of %s parameters in this process, %d blocks", f"{own:,}", f"{whole:,}", len(blocks))
        if isinstance(model, CaptionModel):
            model.hook_blocks(register_fsdp_forward_method)

    def place_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = dict(self._plain.named_parameters())
        return {name: self._layout.place(value) if name in parameters else value for name, value in state.items()}

    def place_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        def placed(of_one: dict[str, Any]) -> dict[str, Any]:  # moments; `step` is a scalar on all processes
            tensors = {key for key, value in of_one.items() if isinstance(value, Tensor) and key != "step"}
            return {key: self._layout.place(value) if key in tensors else value for key, value in of_one.items()}

        return {**state, "state": {index: placed(of_one) for index, of_one in state["state"].items()}}

    def read(self, read: Read, average: WeightAverage | None, optimizer: Any, everywhere: bool = False) -> Any:
        keeps = everywhere or torch.distributed.get_rank() == 0

        def to_cpu(value: Any) -> Any:
            full = gathered(value)
            return full.cpu() if keeps and isinstance(full, Tensor) else full if keeps else None

        whole = mapped(to_cpu, self.shards(average, optimizer))
        if not keeps:
            return {}
        weights, averages = whole.pop("state_dict"), whole.pop("average")
        with self._filled(weights):
            return {**read(self._plain, average and average.of(self._plain, averages)), **whole}

    def shards(self, average: WeightAverage | None, optimizer: Any) -> dict[str, Any]:
        state = {"optimizer": optimizer.state_dict()} if optimizer else {}
        return {"state_dict": self.model.state_dict(), "average": average.state() if average else {}, **state}

    @contextlib.contextmanager
    def readable(
        self, model: nn.Module, average: WeightAverage | None
    ) -> Iterator[tuple[nn.Module, WeightAverage | None]]:
        whole = mapped(gathered, self.shards(average, None))
        with self._filled(whole["state_dict"]):
            yield self._plain, average and average.of(self._plain, whole["average"])

    @contextlib.contextmanager
    def _filled(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The plain model has these weights for a while."""
        self._plain.load_state_dict(weights, assign=True)
        try:
            yield
        finally:
            self._plain.load_state_dict(self.shapes, assign=True)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What towers are made of: the modules of the outermost lists, and of sequences of equal modules."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        several = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and module not in inside
        if several and (isinstance(module, nn.ModuleList) or len(set(map(type, module.children()))) == 1):
            found += module.children()
            inside.update(inner for block in module.children() for inner in block.modules())
    return [block for block in found if any(True for _ in block.parameters())]


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes and no memory. Raises UserError for a model that cannot be sharded."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.shape == (1,):
            raise UserError(f"--fsdp: parameter {name} has the shape (1,), which is how sharded scalars are known")
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)
