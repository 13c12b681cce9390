"""Classes and retrieval by scores. Oracles: hand-computed cases, a plain sort, a whole forward pass for each pair,
OpenCLIP's own zero-shot classifier."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_sets import (
    BROKEN,
    CLASSES,
    EOS,
    LENGTH,
    SAMPLES,
    SETTINGS,
    TEMPLATES,
    eval_model,
    loader_of,
    model,
    options,
    pictures,
    results,
    results_on_rank,
    to_tensor,
    tokenizer,
    write_set,
)
from torch import Tensor

from open_clip_ov2.core import VisionModel, caption_targets
from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import eval_kept_idx
from open_clip_ov2.evaluate.classes import Classes, classify
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.evaluation import run_tasks
from open_clip_ov2.evaluate.options import EvalOptions, options_of, read_options
from open_clip_ov2.evaluate.tasks import TASKS
from open_clip_ov2.evaluate.zero_shot import (
    Captions,
    both_ways,
    contrastive_retrieval,
    likelihood_retrieval,
    log_mean,
    places,
    scored,
    zero_shot_contrastive,
    zero_shot_likelihood,
)
from open_clip_ov2.openclip.models.eval_models import as_eval_model

USED = [row for row in SAMPLES if row[0] not in BROKEN]
TEXTS = list(dict.fromkeys(text for _, _, captions in USED for text in captions))


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("scored") / "some.tar")


def of(values: Any, own: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """(scores, which texts are right), each `(M, U)`."""
    values_MU = torch.as_tensor(values, dtype=torch.float64)
    return values_MU, torch.tensor([[text in texts for text in range(values_MU.shape[1])] for texts in own])


def places_of_texts(values_MU: Tensor, own_MU: Tensor) -> list[int]:
    return places(values_MU, own_MU).tolist()


def places_of_pictures(values_MU: Tensor, own_MU: Tensor) -> Tensor:
    return places(values_MU.T, own_MU.T)


def shares(found: dict[str, Any], what: str) -> dict[str, float | None]:
    return {f"recall_at_{k}": found[f"{what}_recall_at_{k}"] for k in (1, 5, 10)}


def test_recall_by_hand() -> None:
    """Three pictures, four texts; the second picture has two of them, and the first and second share one."""
    scores = of([[9, 1, 2, 3], [5, 8, 7, 0], [6, 2, 4, 5]], [(0,), (0, 2), (3,)])
    # Texts before the first own one: none; text 1 (8 > 7); text 0 (6 > 5).
    assert places_of_texts(*scores) == [0, 1, 1]
    # Text 0 is the first picture's, with the highest score. 2: the second's, highest. 3: the third's, highest.
    # Text 1 is nobody's own in this case, which `scored` never lets happen; the others are asked about.
    assert places_of_pictures(*scores)[[0, 2, 3]].tolist() == [0, 0, 0]
    worse = of([[1, 9], [2, 3], [3, 4]], [(0,), (1,), (1,)])
    assert places_of_pictures(*worse).tolist() == [2, 1]
    found = both_ways(*of(torch.eye(12)[[1, 0, *range(2, 12)]], [(place,) for place in range(12)]))
    assert shares(found, "image_to_text") == {"recall_at_1": 10 / 12, "recall_at_5": 1.0, "recall_at_10": 1.0}
    few = both_ways(*of([[2, 1], [2, 1]], [(0,), (1,)]))
    assert shares(few, "image_to_text") == {"recall_at_1": 0.5, "recall_at_5": None, "recall_at_10": None}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_places_are_those_of_a_plain_sort(data: st.DataObject) -> None:
    """Oracle: sort all by (score, place in the list), and look for the first right one. Few values, so many ties."""
    pictures, texts = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6))
    numbers = st.lists(st.integers(0, 3), min_size=texts, max_size=texts)
    values = data.draw(st.lists(numbers, min_size=pictures, max_size=pictures))
    own = [tuple(data.draw(st.sets(st.integers(0, texts - 1), min_size=1))) for _ in range(pictures)]
    scores = of(values, own)
    for picture, row in enumerate(values):
        order = sorted(range(texts), key=lambda text: (-row[text], text))
        assert places_of_texts(*scores)[picture] == min(order.index(text) for text in own[picture])
    of_texts = places_of_pictures(*scores).tolist()
    for text in {text for of_one in own for text in of_one}:
        order = sorted(range(pictures), key=lambda picture: (-values[picture][text], picture))
        assert of_texts[text] == min(order.index(picture) for picture in range(pictures) if text in own[picture])


def test_a_text_that_is_likely_of_any_picture_loses_that_by_correction() -> None:
    """Hand-computed: p(text 0) is 0.5 and p(text 1) 0.2 on average; 0.4 / 0.5 < 0.3 / 0.2."""
    scores = of([[math.log(0.6), math.log(0.1)], [math.log(0.4), math.log(0.3)]], [(0,), (1,)])
    torch.testing.assert_close(log_mean(scores[0]).exp(), torch.tensor([0.5, 0.2]).double())
    assert places_of_texts(*scores) == [0, 1]
    assert places_of_texts(scores[0] - log_mean(scores[0]), scores[1]) == [0, 0]


@functools.cache
def pair_scores(texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(log p `(6, texts)`, targets of each text), a whole pass for each pair."""
    made, keys, rows = model(), [key for key, _, _ in USED], []
    ids = tokenizer()(list(texts), context_length=LENGTH)
    labels = caption_targets(ids, EOS)
    for key, image in zip(keys, pictures(keys), strict=True):
        with torch.no_grad():
            kept_idx = eval_kept_idx(made, [key] * len(texts))
            logits = made(image.expand(len(texts), -1, -1, -1), ids, kept_idx=kept_idx)["logits"]
        nll = torch.nn.functional.cross_entropy(logits.double().transpose(1, 2), labels, reduction="none")
        rows.append(-nll.sum(dim=1))
    return torch.stack(rows), (labels >= 0).sum(dim=1)


def share_right(best: list[int]) -> float:
    """Of the four pictures whose class is known."""
    return sum(CLASSES.number.get(label) == best[row] for row, (_, label, _) in enumerate(USED)) / 4


def plain_recall(values: Tensor, by_text: bool) -> dict[str, float | None]:
    right = torch.tensor([[text in captions for text in TEXTS] for _, _, captions in USED])
    values, right = (values.T, right.T) if by_text else (values, right)
    order = values.argsort(dim=1, descending=True)
    first = right.gather(1, order).int().argmax(dim=1)
    return {f"recall_at_{k}": float((first < k).double().mean()) if k < values.shape[1] else None for k in (1, 5, 10)}


@pytest.mark.parametrize("normalise", [False, True])
def test_by_likelihood(some: Path, normalise: bool) -> None:
    """Oracle: each pair by a whole pass; argmax over classes of the mean over templates; a sort. Captions of broken
    pictures are no candidates; "a dog" and "a cat" belong to two pictures each."""
    log_p, targets = pair_scores(tuple(template.replace("{}", n) for n in CLASSES.names for template in TEMPLATES))
    log_p = log_p / targets if normalise else log_p
    found = zero_shot_likelihood(eval_model(), loader_of(some), options(length_normalise=normalise))
    assert found["top1"] == share_right(log_p.view(6, 3, 2).mean(dim=-1).argmax(dim=1).tolist())
    assert (found["top5"], found["n_test"], found["n_classes"]) == (None, 4, 3)
    assert found["skipped"] == {"no label": ["k5"], "unknown class": ["k3"], "score is not finite": []}
    log_p, targets = pair_scores(tuple(TEXTS))
    prior = log_p.logsumexp(dim=0) - math.log(6)
    divisor = targets if normalise else 1
    found = likelihood_retrieval(eval_model(), loader_of(some), options(length_normalise=normalise))
    assert (found["n_images"], found["n_texts"], found["skipped"]) == (6, 7, {"score is not finite": []})
    assert shares(found, "image_to_text") == pytest.approx(plain_recall(log_p / divisor, by_text=False))
    assert shares(found, "text_to_image") == pytest.approx(plain_recall(log_p / divisor, by_text=True))
    corrected = plain_recall((log_p - prior) / divisor, by_text=False)
    assert shares(found, "image_to_text_prior_corrected") == pytest.approx(corrected)


def test_batch_size_does_not_matter(some: Path) -> None:
    one, *others = [results(some, batch_size=size) for size in (1, 3, 7)]
    assert all(other == one for other in others)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Oracle: one process. In the second set every picture of the second process is broken."""
    write_set(tmp_path / "some.tar")
    write_set(tmp_path / "half.tar", broken=("k1", "k3", "k5", "k7"))
    torch.multiprocessing.start_processes(results_on_rank, (2, tmp_path), nprocs=2, start_method="forkserver")
    alone = [results(tmp_path / name) for name in ("some.tar", "half.tar")]
    assert alone[1]["retrieval"]["n_images"] == 4
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


@pytest.mark.parametrize("name", ["clip_tiny", "coca_tiny"])
def test_contrastive_is_open_clips(name: str, some: Path, baselines: Path) -> None:
    """Oracle: open_clip.build_zero_shot_classifier; in retrieval, OpenCLIP's features and a sort."""
    torch.manual_seed(0)
    made = open_clip.create_model(f"local-dir:{baselines}/{name}", load_weights=False).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{baselines}/{name}")
    one = as_eval_model(made, tokens, SETTINGS)
    with torch.no_grad():
        images_BD = made.encode_image(pictures([key for key, _, _ in USED]), normalize=True)
        texts_UD = made.encode_text(tokens(TEXTS), normalize=True)
    weights_DC = open_clip.build_zero_shot_classifier(made, tokens, CLASSES.names, TEMPLATES)
    found = zero_shot_contrastive(one, loader_of(some), options())
    assert found["top1"] == share_right((images_BD @ weights_DC).argmax(dim=1).tolist())
    assert found["skipped"]["unknown class"] == ["k3"]
    retrieved = contrastive_retrieval(one, loader_of(some), options())
    assert shares(retrieved, "image_to_text") == pytest.approx(plain_recall(images_BD @ texts_UD.T, by_text=False))
    assert shares(retrieved, "text_to_image") == pytest.approx(plain_recall(images_BD @ texts_UD.T, by_text=True))


def test_classes_from_data_and_files(tmp_path: Path, some: Path) -> None:
    assert Classes.in_data(loader_of(some)).names == ("c", "d", "e", "x")
    file = tmp_path / "classes.json"
    file.write_text('["cat", "dog"]')
    assert Classes.read(file) == Classes.of(["cat", "dog"])
    assert Classes.of(["cat", "dog"]).number == {"cat": 0, "dog": 1, "0": 0, "1": 1}
    assert Classes.of({"cat": "cat", "dog": "dog"}).number == {"cat": 0, "dog": 1}
    assert Classes.of(["cat", "dog", "cat"]).number == {"dog": 1, "0": 0, "1": 1, "2": 2}  # which cat, nobody knows
    assert Classes.of(open_clip.IMAGENET_CLASSNAMES).number["999"] == 999
    assert Classes.of(["1", "dog"]).number == {"1": 0, "dog": 1}  # a name, not a place
    file.write_text('{"7": "cat", "9": "dog"}')
    assert (Classes.read(file).names, Classes.read(file).number) == (("cat", "dog"), {"7": 0, "9": 1})
    for text in ("{", '"cat"', "[1, 2]", '["cat"]', '["cat", "cat"]', '["cat", " "]', '{"1": 2, "2": "cat"}'):
        file.write_text(text)
        with pytest.raises(UserError, match="class"):
            Classes.read(file)
    with pytest.raises(UserError, match="0 labels"):
        Classes.in_data(loader_of(some, group_by=CaptionKey("none")))
    with pytest.raises(UserError, match="expected a list of texts with"):
        read_options(EvalOptions, "here", {"data": "x", "templates": ["a photo"]})


def test_a_score_that_is_not_finite_is_reported_by_key(some: Path) -> None:
    def scores(batch: Batch) -> Tensor:
        rows = [[0.0, float("nan"), 0.0] if key == "k0" else [0.0, 0.0, 1.0] for key in batch.keys]
        return torch.tensor(rows)

    found = classify(loader_of(some), CLASSES, scores, 4)
    assert found["skipped"]["score is not finite"] == ["k0"]
    assert (found["n_test"], found["top1"]) == (3, 2 / 3)
    assert found["mean_per_class"] == 0.5  # of dog and eel: no cat is left
    same = Classes.of({"c": "cat", "d": "cat", "e": "eel"})  # the first of equals is chosen
    found = classify(loader_of(some), same, lambda batch: torch.tensor([[1.0, 1.0, 0.0]] * len(batch.keys)), 4)
    assert found["per_class"] == {
        "cat (0)": {"right": 1, "n": 1}, "cat (1)": {"right": 0, "n": 1}, "eel": {"right": 0, "n": 2},
    }  # fmt: skip
    with pytest.raises(UserError, match="1 with no label, 3 with unknown class, 2 with score is not finite"):
        classify(loader_of(some), Classes.of({"c": "a", "d": "b", "q": "c"}), lambda b: scores(b) * math.nan, 4)
    pairs = scored(loader_of(some), Captions.of(loader_of(some)), lambda b: scores(b)[:, [1] * 9], 4)
    assert pairs.counts() == {"n_images": 5, "n_texts": 6, "skipped": {"score is not finite": ["k0"]}}
    assert pairs.texts_U.tolist() == [0, 3, 4, 5, 6, 7]  # without what only the first and the broken pictures have
    assert pairs.own_MU.sum(dim=1).tolist() == [2, 1, 1, 2, 1]  # of k2 to k6


def test_who_cannot_is_told(some: Path, baselines: Path) -> None:
    encoder = as_eval_model(VisionModel(model().visual), tokenizer(), SETTINGS, name="enc")
    for task, lacks in (("likelihood-retrieval", "caption decoder"), ("retrieval", "text tower")):
        with pytest.raises(UserError, match=f"--tasks {task}: enc has no {lacks}"):
            run_tasks(EvalJob(encoder, options_of(f"--data {some} --tasks {task}", "test")))
    with pytest.raises(UserError, match="needs two images"):
        likelihood_retrieval(eval_model(), loader_of(some, num_samples=2), options())


def job_of(some: Path, flags: str, **more: Any) -> EvalJob:
    asked = options_of(f"--data {some} --caption-keys json:captions {flags}", "test")
    return EvalJob(eval_model(preprocess=to_tensor, **more), asked)


def test_caption_loss_by_keep_ratio(some: Path) -> None:
    """Oracle: nll of a model that keeps so many tokens, summed over all targets; by default, ratios that keep one."""
    task = TASKS["keep-ratios"]
    found = task.compute(job_of(some, "--keep-ratios 1,0.25,1"))["by_keep_ratio"]
    assert list(found) == ["0.25", "1"]
    for name, row in found.items():
        one, total, targets = eval_model(keep_ratio=float(name)), 0.0, 0
        for batch in loader_of(some):
            total += float(one.nll(one.prefix(batch.images_BCHW, batch.keys), batch.texts_BL).diagonal().sum())
            targets += int(one.num_targets(batch.texts_BL).sum())
        assert row["caption_loss"] == pytest.approx(total / targets, rel=1e-5)
    assert found["0.25"]["caption_loss"] != pytest.approx(found["1"]["caption_loss"], rel=1e-5)
    assert list(task.compute(job_of(some, ""))["by_keep_ratio"]) == ["0.1", "0.25", "0.35", "0.5", "1"]
    with pytest.raises(UserError, match=r"0.01: .* keeps none of 16"):
        task.compute(job_of(some, "--keep-ratios 0.01"))


def test_resolutions_come_in_order_and_once(some: Path) -> None:
    sizes: list[int] = []

    def reopen(size: int) -> Any:
        sizes.append(size)
        return eval_model(preprocess=to_tensor)

    found = TASKS["image-sizes"].compute(job_of(some, "--image-sizes 48,24,48", reopen=reopen))["by_image_size"]
    assert list(found) == ["24", "48"]
    assert sizes == [24, 48]
    assert found["24"].keys() == {"caption-loss"}


def test_all_tasks_are_all_tasks(some: Path) -> None:
    """Oracle: the same flag left out."""
    plain = options_of(f"--data {some}", "test")
    for tasks in ("all", "all,knn", "knn,all"):
        assert options_of(f"--data {some} --tasks {tasks}", "test") == plain
