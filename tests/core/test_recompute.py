"""What the backward pass keeps, and what it computes again. Oracles: the same model without it; bytes that autograd
keeps; the FLOPs and graphs that torch itself counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_packing import EOS, build, captions
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from open_clip_ov2.core import FUSIONS, CaptionLoss, CaptionModel
from open_clip_ov2.core.compute import compile_backend
from open_clip_ov2.core.packing import pack_captions


def kept_bytes(module: nn.Module, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps of `run`, those of parameters left out; and what it returns."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(size for place, size in kept.items() if place not in own), out


def close(gradients: list[Tensor], plain: list[Tensor]) -> None:
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_less_is_kept_and_gradients_stay() -> None:
    """Of a block in float32 with T tokens of width D, in bytes of T D: 4 at the first norm, 4 at the second, 16 at the
    GELU, and 4 what the last norm takes; torch.compile also keeps what the matrix products read, 4 and 16, unless norms
    and GELUs are recomputed. Statistics of norms are left out."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.LayerNorm(32))
    x, found = torch.randn(64, 32), {}

    def kept_and_gradients(run: Callable[[Tensor], Tensor]) -> tuple[int, list[Tensor]]:
        size, out = kept_bytes(block, lambda: run(x))
        return size, list(torch.autograd.grad(out.square().sum(), list(block.parameters())))

    for name, backend in {
        "all": compile_backend(1.0),
        "none": compile_backend(0.0),
        "elementwise": compile_backend(elementwise=True),
    }.items():
        torch.compiler.reset()
        found[name] = kept_and_gradients(torch.compile(block, backend=backend))
    _, plain = kept_and_gradients(block)
    assert found["none"][0] < 0.5 * found["all"][0]
    statistics = 2 * 4 * 64 * 2
    assert 64 * 32 * (4 + 16 + 4) <= found["elementwise"][0] <= 64 * 32 * (4 + 16 + 4) + statistics
    for _, gradients in found.values():
        close(gradients, plain)


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan")])
def test_out_of_range(budget: float) -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        compile_backend(budget)


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


PACKED = pack_captions(captions([5, 9, 20, 3, 1, 12]), EOS, 24)


def objective(model: CaptionModel) -> Tensor:
    torch.manual_seed(0)  # of token dropping
    return model(IMAGES, captions=PACKED, caption_loss=CaptionLoss()).objective


def kept_flops_and_gradients(model: CaptionModel) -> tuple[int, int, list[Tensor]]:
    with FlopCounterMode(display=False) as flops:
        size, loss = kept_bytes(model, lambda: objective(model))
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return size, flops.get_total_flops(), list(gradients)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_norms_and_gelus_are_recomputed_and_no_product(fusion: str) -> None:
    """Oracle: by hand. Of a token in float32, a norm's output is not kept, nor its mean and deviation, nor the GELU's
    output; but the first norms of the last blocks are, in encoder and decoder, of whose tokens a part is read."""
    norm, gelu, gelu_of_encoder = 4 * 32 + 2 * 4, 4 * 32, 4 * 128
    kept, t = 6 * 5, len(PACKED.ids_t)
    less = 6 * 17 * (2 * norm + gelu_of_encoder) + kept * (norm + gelu_of_encoder)
    if fusion == "cross_attn":
        less += 2 * t * (2 * norm + gelu) + kept * norm
    else:
        less += (kept + t) * (2 * norm + gelu) + t * (norm + gelu)
    plain = build(fusion)
    saving = copy.deepcopy(plain)
    saving.recompute_elementwise()
    (before, flops, expected), (after, flops_after, gradients) = map(kept_flops_and_gradients, (plain, saving))
    assert flops_after == flops
    assert before - after == less
    close(gradients, expected)
    assert list(saving.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(("encoder", "expected"), [("blocks", 2), ("whole", 1)])
def test_the_encoder_is_compiled_in_the_first_step_alone(encoder: str, expected: int) -> None:
    """Oracles: the model that is not compiled; dynamo's count of graphs, whichever tokens are kept."""
    plain, graphs, seen = build("prefix"), list[torch.fx.GraphModule](), list[int]()
    compiled = copy.deepcopy(plain)
    torch.compiler.reset()
    counters.clear()

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled.compile_blocks(backend=counting, encoder=encoder)
    for _ in range(3):
        kept = torch.stack([torch.randperm(16)[:5] for _ in range(6)])
        tokens, others = (one.encode_kept_tokens(IMAGES, kept_idx=kept) for one in (compiled, plain))
        torch.testing.assert_close(tokens, others, atol=1e-5, rtol=1e-5)
        pairs = ((tokens, compiled), (others, plain))
        close(*([torch.autograd.grad(out.square().sum(), one.visual.conv1.weight)[0]] for out, one in pairs))
        seen.append(len(graphs))
    assert seen == [expected] * 3
    torch.testing.assert_close(objective(compiled), objective(plain), atol=1e-3, rtol=1e-5)
    assert not counters["graph_break"]
