"""Images of any shape in one batch. Oracle: core/reference.py on one image at a time with the position table of its
grid, in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import heads_of
from test_packing import CONTEXT, EOS, build, captions, emulated_flash
from torch import Tensor
from torch._dynamo.utils import counters

from open_clip_ov2.core import CaptionLoss, CaptionModel, reference, sincos_2d
from open_clip_ov2.core import rows as core_rows
from open_clip_ov2.core.native import NativeImages, concatenated, stacked
from open_clip_ov2.core.packing import PackedCaptions, pack_captions
from open_clip_ov2.core.rows import RowAttention
from open_clip_ov2.core.tokens import sample_kept_of_rows

PATCH = 8
GRIDS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6)
Grids = list[tuple[int, int]]


def pictures(grids: Grids) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(grids))
    return [torch.randn(3, PATCH * rows, PATCH * columns, generator=generator).double() for rows, columns in grids]


def kept_of(grids: Grids, ratio: float) -> list[Tensor]:
    """Some tokens of each image, one at least."""
    generator = torch.Generator().manual_seed(1)
    counts = [rows * columns for rows, columns in grids]
    return [torch.randperm(count, generator=generator)[: max(1, int(count * ratio))] for count in counts]


def params_of(model: CaptionModel) -> dict[str, Tensor]:
    """In float64, with gradients."""
    params = {name: value.detach().double().cpu() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        params[name].requires_grad_(parameter.requires_grad)
    return params


def at_grid(params: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Only the position table belongs to a grid."""
    return {**params, "visual.positional_embedding": sincos_2d(grid, 32).double()}


def one_by_one(
    model: CaptionModel, images: list[Tensor], grids: Grids, ids: Tensor, kept: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of nll, and its gradients, image by image."""
    params, heads, fusion = params_of(model), heads_of(model), model.text_decoder.config.fusion
    total = torch.zeros((), dtype=torch.float64)
    for image, grid, row, own in zip(images, grids, ids, kept, strict=True):
        count = (reference.targets(row[None], EOS) >= 0).sum()
        total = total + count * reference.caption_loss(
            at_grid(params, grid), image[None], row[None], own[None], heads=heads, fusion=fusion, eos_id=EOS
        )
    trained = [name for name, value in params.items() if value.requires_grad]
    found = torch.autograd.grad(total, [params[name] for name in trained], allow_unused=True)
    return total.detach(), {name: value for name, value in zip(trained, found, strict=True) if value is not None}


def at_once(
    model: CaptionModel, images: Any, ids: Tensor, packed: PackedCaptions, kept: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    sums = model(images, kept_idx=kept, captions=packed, caption_loss=CaptionLoss())
    sums.objective.backward()
    return sums.nll.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0].float(), expected[0].float())  # the loss and the head are in float32
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["prefix", "causal", "cross_attn"])
def model(request: pytest.FixtureRequest) -> CaptionModel:
    return build(request.param).double()


@settings(deadline=None, max_examples=12)
@given(data=st.data(), grids=GRIDS, ratio=st.floats(0.2, 1), checkpointing=st.booleans(), flash=st.booleans())
def test_a_batch_is_its_images_one_by_one(
    model: CaptionModel, data: st.DataObject, grids: Grids, ratio: float, checkpointing: bool, flash: bool
) -> None:
    """Loss and gradients of any grids, captions and kept tokens; with a GPU's kernel emulated too."""
    min_tokens = data.draw(st.integers(1, 60))
    lengths = data.draw(st.lists(st.integers(0, CONTEXT - 1), min_size=len(grids), max_size=len(grids)))
    ids, images, kept = captions(lengths), pictures(grids), kept_of(grids, ratio)
    native = NativeImages.of(images, PATCH)
    packed = pack_captions(ids, EOS, min_tokens, native.counts)
    with pytest.MonkeyPatch.context() as patch:
        if flash:
            patch.setattr(core_rows, "takes_half_kernels", lambda *_: True)
            patch.setattr(RowAttention, "_flash", emulated_flash)
        model.set_grad_checkpointing(checkpointing)
        found = at_once(model, native, ids, packed, kept)
        model.set_grad_checkpointing(False)
    assert_equal(found, one_by_one(model, images, grids, ids, kept))


@settings(deadline=None, max_examples=10)
@given(grids=GRIDS)
def test_features_and_captions_are_those_of_one_image(grids: Grids) -> None:
    """Oracle: the reference's tokens, and the square model of that grid for what follows from them."""
    model, images = build("causal").double().eval(), pictures(grids)
    native, params = NativeImages.of(images, PATCH), params_of(model)
    with torch.no_grad():
        expected = [reference.encode(at_grid(params, grid), image[None], heads_of(model)[0])[0]
                    for image, grid in zip(images, grids, strict=True)]  # fmt: skip
        tokens = model.encode_image_tokens(native)
        torch.testing.assert_close(tokens.tokens_ID, torch.cat(expected))
        assert tokens.counts == tuple(map(len, expected))
        pooled = torch.stack([model.visual.ln_post(one.mean(dim=0)) @ model.visual.proj for one in expected])
        torch.testing.assert_close(model.encode_image(native), pooled)
        if len(set(native.counts)) == 1:
            equal = native[:1] if len(native) == 1 else native
            assert torch.equal(model.generate(equal, keep_ratio=1.0)[:1], model.generate(equal[:1], keep_ratio=1.0))
        else:
            with pytest.raises(ValueError, match="take equal ones together"):
                model.generate(native, keep_ratio=1.0)


def test_a_square_batch_is_the_square_path() -> None:
    """Oracle: the model on the same images as one tensor."""
    model, images, ids = build("prefix").double(), pictures([(4, 4)] * 3), captions([3, 9, 5])
    packed, kept = pack_captions(ids, EOS, 1), kept_of([(4, 4)] * 3, 0.4)
    square = at_once(model, torch.stack(images), ids, packed, torch.stack(kept))
    assert_equal(at_once(model, NativeImages.of(images, PATCH), ids, packed, kept), square)
    with torch.no_grad():
        native = model.eval().generate(NativeImages.of(images, PATCH), keep_ratio=1.0)
        assert torch.equal(native, model.generate(torch.stack(images), keep_ratio=1.0))


@settings(deadline=None, max_examples=30)
@given(grids=GRIDS, rows=st.lists(st.integers(0, 5), max_size=4))
def test_images_are_cut_and_whole_again(grids: Grids, rows: list[int]) -> None:
    """Oracle: the images themselves."""
    images = pictures(grids)
    native, chosen = stacked(images, PATCH), [row for row in rows if row < len(grids)]
    assert isinstance(native, NativeImages)
    for one, other in zip(native.images(), images, strict=True):
        assert torch.equal(one, other)
    for one, row in zip(native[chosen].images(), chosen, strict=True):
        assert torch.equal(one, images[row])
    both = concatenated([native[:1], native[1:]])
    assert torch.equal(both.patches_nCPP, native.patches_nCPP)
    assert both.grids == native.grids


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 1)), min_size=1, max_size=8))
def test_tokens_are_drawn_within_each_image(sizes: list[tuple[int, float]]) -> None:
    """Oracle: the range of each image, without replacement."""
    counts = [count for count, _ in sizes]
    kept = [max(1, int(count * ratio)) for count, ratio in sizes]
    found = sample_kept_of_rows(counts, kept, torch.device("cpu")).tolist()
    begin = 0
    for count, number in zip(counts, kept, strict=True):
        own, found = found[:number], found[number:]
        assert len(set(own)) == number
        assert all(begin <= place < begin + count for place in own)
        begin += count
    assert not found


def test_each_token_is_kept_equally_often() -> None:
    """Oracle: K / N of the draws, within five standard deviations."""
    torch.manual_seed(0)
    counts, kept, draws = [4, 10], [1, 7], 2000
    times = torch.zeros(14)
    for _ in range(draws):
        times[sample_kept_of_rows(counts, kept, torch.device("cpu"))] += 1
    expected = torch.tensor([0.25] * 4 + [0.7] * 10)
    assert ((times / draws - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_half_precision_and_compiled_blocks() -> None:
    """Oracles: float64, within bfloat16's rounding; a backend that counts graphs: other grids need no new ones."""
    grids, ids = [(1, 5), (2, 2), (3, 4)], captions([5, 20, 9])
    images, kept = pictures(grids), kept_of(grids, 0.5)
    native = NativeImages.of([image.float() for image in images], PATCH)
    packed = pack_captions(ids, EOS, 24, native.counts)
    expected = one_by_one(build("prefix"), images, grids, ids, kept)
    half = build("prefix")
    with torch.autocast("cpu", torch.bfloat16):
        nll, gradients = at_once(half, native, ids, packed, kept)
    torch.testing.assert_close(nll.double(), expected[0], atol=0, rtol=3e-2)
    errors = [float((gradients[name] - one).norm() / one.norm().clamp(min=1e-6)) for name, one in expected[1].items()]
    assert max(errors) < 5e-2

    torch.compiler.reset()
    counters.clear()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled, seen = build("prefix").double(), []
    compiled.compile_blocks(backend=counting)
    for shapes in (grids, [(5, 2), (2, 2), (1, 2)], [(4, 4), (3, 4), (2, 1)]):
        found, kept = NativeImages.of(pictures(shapes), PATCH), kept_of(shapes, 0.5)
        packed = pack_captions(ids, EOS, 24, found.counts)
        result = at_once(compiled, found, ids, packed, kept)
        seen.append(len(graphs))
    assert_equal(result, at_once(build("prefix").double(), found, ids, packed, kept))
    assert 0 < seen[1] == seen[-1]
    assert not counters["graph_break"]
    pickle.loads(pickle.dumps(copy.deepcopy(compiled)))
