"""Meters of a run. Oracles: torch's FlopCounterMode around a real step; sums done by hand; the device's own clock."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.core.packing import pack_captions
from open_clip_ov2.openclip.models.model_facts import facts_of
from open_clip_ov2.openclip.run.stage_costs import image_flops
from open_clip_ov2.tracking.throughput import (
    JUDGED_S,
    BottleneckWatch,
    Meter,
    Peak,
    Window,
    bottleneck,
    data_sheet,
    measured_peak,
)

BATCH, GPU = 4, 70 / 80  # of its memory used


def captions(model: Any, lengths: list[int]) -> Tensor:
    """Ids `(B, context)` of so many real target tokens each."""
    ids_BL = torch.randint(1, 400, (len(lengths), model.context_length))
    for row, length in zip(ids_BL, lengths, strict=True):
        row[length:] = model.text_config.eos_id
    return ids_BL


def counted(model: Any, ids_BL: Tensor) -> float:
    """FLOPs of the whole batch in one group, so padded to its longest caption, forward and backward."""
    images, packed = torch.rand(len(ids_BL), 3, 64, 64), pack_captions(ids_BL, model.text_config.eos_id, 1 << 20)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images, captions=packed, caption_loss=CaptionLoss()).objective.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("length", [31, 9])
def test_mfu_counts_what_the_flop_counter_counts(length: int) -> None:
    """All captions equally long and trimmed to it, so that nothing is padding."""
    torch.manual_seed(0)
    model = open_clip.create_model("ov2-vit-nano-8", load_weights=False).train()
    meter = Meter(image_flops(facts_of("ov2-vit-nano-8", model)), peak_flops=1e12)
    want = counted(model, captions(model, [length] * BATCH)[:, : length + 1])
    got = meter.mfu(images=BATCH, tokens=BATCH * length, seconds=2.0) * 2.0 * 1e12
    assert got == pytest.approx(want, rel=0.02)


def test_padding_is_no_work_done() -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ov2-vit-nano-8", load_weights=False).train()
    of = image_flops(facts_of("ov2-vit-nano-8", model))
    lengths = [31, 5, 5, 5]
    assert sum(of(length) for length in lengths) < 0.95 * counted(model, captions(model, lengths))
    assert of(None) == of(31) > of(11.5) > of(11)
    assert of(11.5) == pytest.approx((of(11) + of(12)) / 2, rel=1e-4)  # attention is nearly linear between two lengths


def test_baselines_compute_their_whole_context() -> None:
    for name in ("coca-of-ov2-vit-nano-8", "clip-of-ov2-vit-nano-8"):
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", load_weights=False)
        of = image_flops(facts_of(name, model))
        assert of(None) == of(3) > 0


def test_a_window_by_hand() -> None:
    window = Window()
    window.add(8, torch.tensor(80.0), wait_s=0.5, step_s=1.0)
    window.add(8, 40.0, wait_s=0.0, step_s=0.5)
    window.step_s += 0.5  # what the device still had to do
    taken = window.rates(Meter(lambda mean: 10.0 * (mean or 0.0), peak_flops=2400.0))
    assert taken == {
        "images_per_second": 8.0,
        "data_wait_share": 0.25,
        "tokens_per_second": 60.0,
        "mfu": 16 * 10 * 7.5 / (2.0 * 2400),
    }
    window = Window()
    window.add(4, None, wait_s=0.0, step_s=1.0)
    assert window.rates() == {"images_per_second": 4.0, "data_wait_share": 0.0}


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 80e9))
def test_a_bottleneck_is_named_only_where_there_is_one(wait: float, used: float, peak: float) -> None:
    found = bottleneck(wait, used, peak / 80e9, 4)
    if wait > 0.2:
        assert found is not None
        assert found[0] == "data"
        assert "--workers (now 4)" in found[1]
        assert "ov2 shards resize" in found[1]
    elif used < 0.2 and peak < 40e9:
        assert found is not None
        assert found[0] == "batch"
        assert "--batch-size" in found[1]
    else:
        assert found is None
    assert bottleneck(min(wait, 0.2), used, 1.0, 4) is None  # a CPU has no memory of its own to fill


def test_each_bottleneck_is_said_once_a_stage() -> None:
    for _ in range(2):
        watch = BottleneckWatch(workers=2)
        waiting = {"data_wait_share": 0.9, "mfu": 0.5}
        assert watch.note(waiting, 10 * JUDGED_S, GPU) is None  # workers were starting
        lines = [watch.note(waiting, JUDGED_S / 2, GPU) for _ in range(8)]
        assert [index for index, line in enumerate(lines) if line] == [1]
        assert lines[1] is not None
        assert "waiting for data 90% of the time" in lines[1]


def test_one_slow_batch_is_no_bottleneck() -> None:
    watch = BottleneckWatch(workers=0)
    speeds = [1.0, 1.0, *[0.0] * 20]  # the first window is not looked at
    assert [watch.note({"data_wait_share": wait}, JUDGED_S / 10, GPU) for wait in speeds] == [None] * 22


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "amp_bf16", 989),
        ("NVIDIA H100 PCIe", "amp_bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "pure_bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156),
        ("NVIDIA L4", "amp", 121),
        ("NVIDIA L40S", "amp_bf16", 362),
    ],
)
def test_data_sheets(name: str, precision: str, tflops: float) -> None:
    """Oracle: NVIDIA's data sheets, dense; fp32 by TF32."""
    assert data_sheet(name, precision) == Peak(tflops * 1e12, "data sheet")


def test_an_unknown_device_is_measured_and_nothing_is_drawn() -> None:
    """Oracle: a range that holds for any device; torch's own generator, whose next number a resumed run relies on."""
    assert data_sheet("Some Chip 9", "fp32") is None
    before = torch.get_rng_state()
    peak = measured_peak(torch.device("cpu"), "fp32")
    assert torch.equal(torch.get_rng_state(), before)
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e15
