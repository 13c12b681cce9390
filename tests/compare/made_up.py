"""A comparison made up for tests: two variants with seeds, one that is measured alone."""

from __future__ import annotations

from open_clip_ov2.compare.config import Comparison, Measure, Metric, Variant, VariantStage
from open_clip_ov2.compare.measuring import Cost
from open_clip_ov2.compare.results import Found, VariantResult

LOSS = Metric("caption_loss", "caption loss", "nats", better="lower", digits=2, learning="caption_loss")
PROBE = Metric("probe.top1", "probe <top-1>", "%", scale=100)


def variant_result(name: str, rates: tuple[float, ...], **changes: object) -> VariantResult:
    fields = {
        "name": name, "model": f"model-{name}", "trained": True, "seeds": (0, 1), "stage_samples": (4000,),
        "flops": 1e9, "rates": rates, "stage_rates": (rates[0],), "ratios": tuple(rate / 200 for rate in rates),
        "cost": Cost(), "unlike": (), "over": None, "values": {}, "learning": {},
    }  # fmt: skip
    return VariantResult(**(fields | changes))  # type: ignore[arg-type]


def made_up() -> Found:
    curve = (((2000.0, 3.0), (4000.0, 2.0)), ((2000.0, 3.4), (4000.0, 2.2)))
    values = {"caption_loss": (2.0, 2.2), "probe.top1": (0.5, 0.6)}
    ours = variant_result(
        "ov2", (200.0, 220.0, 180.0), values=values, learning={"caption_loss": curve}, over=0.35, cost=Cost(100.0, 512)
    )
    clip = variant_result("CLIP", (150.0, 150.0, 150.0), values={"probe.top1": (0.4, 0.4)}, over=1.0)
    stock = variant_result("stock", (20.0, 20.0, 20.0), trained=False, seeds=(), stage_samples=())
    stages = (VariantStage(32, 1.0),)
    variants = tuple(Variant(one.name, one.model, {}, stages, one.trained) for one in (ours, clip, stock))
    comparison = Comparison(
        title="Small & fair", about="Which?", samples=4000, seeds=(0, 1), reference="ov2", flags={"lr": 0.1},
        variants=variants, measure=Measure(3, 256), metrics=(LOSS, PROBE), curve_over="keep-ratio", name="small",
    )  # fmt: skip
    return Found(comparison, (ours, clip, stock), "a machine")
