"""Linear probe, k-NN, and what they share. Oracle: scikit-learn, hand-computed cases, invariances."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from probe_sets import blobs, features
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate import probes
from open_clip_ov2.evaluate.classes import accuracy, class_scores, hold_out, match_labels, ranks
from open_clip_ov2.evaluate.extraction import Features
from open_clip_ov2.evaluate.knn import knn, nearest
from open_clip_ov2.evaluate.probes import fit, linear_probe, search


def sets(classes: int = 7, width: int = 6, spread: float = 1.0) -> tuple[Features, Features]:
    return tuple(features(*blobs(90, classes, width, seed, spread)) for seed in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("regulariser", [0.3, 30.0])
def test_logistic_regression_is_scikit_learns(regulariser: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: LogisticRegression at C = 1 / regulariser, on StandardScaler's features; in several blocks of rows."""
    monkeypatch.setattr(probes, "BLOCK_ROWS", 32)
    train, test = sets()
    names = sorted(set(train.labels))
    classes = torch.tensor([names.index(label) for label in train.labels])
    strict = 1e-7
    ours = fit(train.values, classes, 7, regulariser, least_change=1e-15)
    assert ours.converged
    scaler = StandardScaler().fit(train.values.double())
    theirs = LogisticRegression(C=1 / regulariser, tol=1e-12, max_iter=100_000)
    theirs.fit(scaler.transform(train.values.double()), classes)
    # The loss is strongly convex with regulariser / M: such a gradient is that far from the minimum at most.
    bound = strict * theirs.coef_.size**0.5 * len(train) / regulariser
    np.testing.assert_allclose(ours.weight_CD, theirs.coef_, rtol=0, atol=bound)
    shift = ours.bias_C - ours.bias_C.mean()  # softmax does not see a constant added to every bias
    np.testing.assert_allclose(shift, theirs.intercept_ - theirs.intercept_.mean(), rtol=0, atol=1e-4)
    predicted = theirs.predict(scaler.transform(test.values.double()))
    assert ours.logits(test.values).argmax(1).tolist() == predicted.tolist()
    result = linear_probe(train, test, regulariser=regulariser)
    true = np.array([names.index(label) for label in test.labels])
    assert result["top1"] == np.mean(predicted == true)
    top5 = np.argsort(-theirs.decision_function(scaler.transform(test.values.double())), axis=1)[:, :5]
    assert result["top5"] == np.mean((top5 == true[:, None]).any(axis=1))


def test_features_that_are_much_alike_take_few_iterations() -> None:
    """Oracle: the loss of scikit-learn's solution, written out. L-BFGS on the features as they are is 0.02 to 0.2 nats
    a sample away after as many iterations (the singular values here span a factor of 10,000)."""
    generator = torch.Generator().manual_seed(0)
    classes, width, samples = 20, 48, 1000
    mix_DD = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    spread_D = torch.logspace(0, -4, width, dtype=torch.float64)
    y = torch.randint(classes, (samples,), generator=generator)
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    x = (centres[y] + torch.randn(samples, width, generator=generator, dtype=torch.float64)) * spread_D @ mix_DD
    ours = fit(x, y, classes, 1e-4, max_iterations=100)
    scaled = StandardScaler().fit_transform(x)
    theirs = LogisticRegression(C=1e4, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(scaled, y)

    def loss(weight: Any, bias: Any) -> float:
        logits = torch.from_numpy(scaled) @ torch.as_tensor(weight).T + torch.as_tensor(bias)
        penalty = 1e-4 / 2 * torch.as_tensor(weight).square().sum()
        return float((torch.nn.functional.cross_entropy(logits, y, reduction="sum") + penalty) / samples)

    assert ours.iterations <= 100
    assert loss(ours.weight_CD, ours.bias_C) == pytest.approx(loss(theirs.coef_, theirs.intercept_), abs=1e-3)


def test_it_ends_where_the_loss_can_fall_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that float64 cannot reach: the fit has converged, long before the last iteration."""
    train, _ = sets()
    names = sorted(set(train.labels))
    classes = torch.tensor([names.index(label) for label in train.labels])
    monkeypatch.setattr(probes, "TOLERANCE", 0.0)
    found = fit(train.values, classes, 7, 1.0, least_change=1e-15)
    assert found.converged
    assert found.iterations < probes.MAX_ITERATIONS / 2


@pytest.mark.parametrize("regulariser", [1e-4, 1e-6])
def test_weak_regularisers_where_all_can_be_right(regulariser: float) -> None:
    """Oracle: scikit-learn. A small gradient is no minimum there: stopped by that alone, weights are twice as large."""
    generator = torch.Generator().manual_seed(0)
    classes, width, samples = 10, 64, 400
    y = torch.randint(classes, (samples,), generator=generator)
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    x = centres[y] * torch.logspace(0, -2, width, dtype=torch.float64) + noise
    ours = fit(x, y, classes, regulariser)
    scaled = StandardScaler().fit_transform(x)
    theirs = LogisticRegression(C=1 / regulariser, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(scaled, y)
    assert ours.converged
    assert float(ours.weight_CD.norm()) == pytest.approx(float(np.linalg.norm(theirs.coef_)), rel=0.01)


def test_no_regulariser_and_a_constant_feature() -> None:
    """Finite: neither holds the stretched axes back."""
    train, _ = sets(spread=3.0)
    names = sorted(set(train.labels))
    classes = torch.tensor([names.index(label) for label in train.labels])
    x = torch.cat([train.values, torch.ones(len(train), 1)], dim=1)
    found = fit(x, classes, 7, 0.0, max_iterations=50)
    assert torch.isfinite(found.weight_CD).all()


def test_the_search_is_clips() -> None:
    """Oracle: appendix A.3's seven points and halved steps, by hand, for peaks inside and at the ends of the range."""
    for peak in (-6.0, -1.3, 0.0, 0.55, 6.0):
        asked: list[float] = []

        def score(exponent: float, peak: float = peak, asked: list[float] = asked) -> tuple[float, float]:
            asked.append(exponent)
            return -abs(exponent - peak), 0.0

        best, scores = search(score)
        assert asked[:7] == [-6, -4, -2, 0, 2, 4, 6]
        assert abs(best - peak) <= 1 / 16
        assert len(asked) == len(set(asked)) <= 7 + 4 * 2
        assert list(scores) == sorted(scores)
        assert min(scores) >= -6
        assert max(scores) <= 6


def test_the_regulariser_is_chosen_on_the_held_out_part() -> None:
    """Oracle: each candidate fitted by scikit-learn to what is not held out; the chosen one is among its best."""
    train, test = sets(classes=4, spread=2.5)
    result = linear_probe(train, test)
    labels = match_labels(train, test)
    to_fit, held = hold_out(labels.train, 0.2)
    best = max(row["held_out_top1"] for row in result["sweep"])
    assert len(result["sweep"]) >= 13
    for row in result["sweep"]:
        if not 1e-2 <= row["regulariser"] <= 1e4:
            continue  # scikit-learn's own end depends on its tolerance there
        scaler = StandardScaler().fit(train.values[to_fit.rows].double())
        model = LogisticRegression(C=1 / row["regulariser"], tol=1e-10, max_iter=100_000)
        model.fit(scaler.transform(train.values[to_fit.rows].double()), to_fit.classes_M)
        assert row["held_out_top1"] == pytest.approx(
            model.score(scaler.transform(train.values[held.rows].double()), held.classes_M)
        )
        if row["regulariser"] == result["regulariser"]:
            assert row["held_out_top1"] == best
    assert result["regulariser"] in [row["regulariser"] for row in result["sweep"] if row["held_out_top1"] == best]
    assert result == linear_probe(train, test)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_is_scikit_learns(k: int) -> None:
    """Oracle: KNeighborsClassifier with metric cosine, uniform and with DINO's weights exp(s / 0.07)."""
    train, test = sets(spread=1.5)
    result = knn(train, test, neighbours=[k])
    weightings = {"plain": "uniform", "weighted": lambda distance: np.exp((1 - distance) / 0.07)}
    for how, weights in weightings.items():
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        model.fit(train.values.double(), train.labels)
        assert result["by_k"][str(k)][how]["top1"] == model.score(test.values.double(), test.labels)
    distances, _ = model.kneighbors(test.values.double())
    similar, _ = nearest(train.values, test.values, k)
    np.testing.assert_allclose(1 - similar, distances, atol=1e-8)
    assert result["k"] == k
    assert json.loads(json.dumps(result)) == result


@st.composite
def small_sets(draw: st.DrawFn) -> tuple[Features, Features]:
    """Vectors of few small integers, so that equal ones and equal similarities are frequent."""
    made = []
    for least in (3, 1):
        rows = draw(st.lists(st.tuples(*[st.integers(-1, 1)] * 3), min_size=least, max_size=12))
        labels = [draw(st.sampled_from("abc")) for _ in rows]
        labels[:2] = "ab"[: len(rows)]
        made.append(features(torch.tensor(rows, dtype=torch.float32), labels[: len(rows)]))
    return made[0], made[1]


def shuffled(given_set: Features, order: list[int]) -> Features:
    keys, labels = (tuple(part[row] for row in order) for part in (given_set.keys, given_set.labels))
    return replace(given_set, keys=keys, labels=labels, values=given_set.values[order])


@limits(max_examples=100, deadline=None)
@given(small_sets(), st.data())
def test_the_order_of_a_set_does_not_matter_to_knn(two: tuple[Features, Features], data: Any) -> None:
    """Oracle: the same sets in another order; the similarities' scale-freeness."""
    train, test = two
    k = data.draw(st.integers(1, len(train)))
    result = knn(train, test, neighbours=[k])
    orders = [data.draw(st.permutations(range(len(part)))) for part in two]
    mixed = knn(shuffled(train, orders[0]), shuffled(test, orders[1]), neighbours=[k])
    for reason, keys in mixed.pop("skipped").items():  # in file order
        assert sorted(keys) == sorted(result["skipped"][reason])
    assert mixed == {name: value for name, value in result.items() if name != "skipped"}
    assert knn(replace(train, values=4 * train.values), test, neighbours=[k]) == result


@pytest.mark.parametrize("probe", [linear_probe, knn])
def test_features_that_are_no_numbers_are_named_and_not_counted(probe: Any) -> None:
    """Oracle: the sets without those samples."""
    train, test = sets()
    spoiled = [one.values.clone() for one in (train, test)]
    spoiled[0][3, 0], spoiled[1][5] = torch.nan, torch.inf
    found = probe(replace(train, values=spoiled[0]), replace(test, values=spoiled[1]))
    rest = [[row for row in range(len(one)) if row != gone] for one, gone in ((train, 3), (test, 5))]
    plain = probe(shuffled(train, rest[0]), shuffled(test, rest[1]))
    named = found["skipped"]
    assert named["training sample with features that are not finite"] == [train.keys[3]]
    assert named["test sample with features that are not finite"] == [test.keys[5]]
    assert {key: value for key, value in found.items() if key != "skipped"} == {
        key: value for key, value in plain.items() if key != "skipped"
    }


def test_neighbours_are_dinos_as_far_as_they_go() -> None:
    """Oracle: the size of the set, 90."""
    train, test = sets(spread=1.5)
    assert list(knn(train, test)["by_k"]) == ["10", "20"]


def test_many_equal_pictures_are_taken_in_the_order_of_their_keys() -> None:
    """Oracle: the same set in another order; vectors of one direction are equally near, whatever their length."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 9, (7, 37), generator=generator).float()[torch.arange(301) % 7]
    values *= torch.tensor([1.0, 3, 5, 7, 11])[torch.arange(301) % 5, None]
    numbers = torch.randint(9, (301,), generator=generator).tolist()
    train = features(values, [str(number) for number in numbers])
    test = features(*blobs(20, 9, 37, 1))
    test = replace(test, labels=tuple(label[-1] for label in test.labels))
    result = knn(train, test, neighbours=[5, 60])
    for seed in range(3):
        order = torch.randperm(301, generator=torch.Generator().manual_seed(seed)).tolist()
        assert knn(shuffled(train, order), test, neighbours=[5, 60]) == result
    _, rows = nearest(train.values, train.values[:1], 43)
    assert rows.tolist() == [list(range(0, 301, 7))]


@limits(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=3, max_size=30), st.floats(0.05, 0.6), st.data())
def test_held_out_samples_depend_on_keys_alone(labels: list[str], share: float, data: Any) -> None:
    """Oracle: both parts together are everything, each class keeps one to fit, and order does not matter."""
    labels = ["a", "a", "b", *labels]
    train = features(torch.zeros(len(labels), 1), labels)
    to_fit, held = hold_out(match_labels(train, train).train, share)
    assert sorted(to_fit.keys + held.keys) == sorted(train.keys)
    assert set(to_fit.classes_M.tolist()) == set(range(len(set(labels))))
    mixed = shuffled(train, data.draw(st.permutations(range(len(labels)))))
    assert set(hold_out(match_labels(mixed, mixed).train, share)[1].keys) == set(held.keys)


def test_bad_labels_are_named_and_not_counted() -> None:
    """Oracle: the result without them; their keys."""
    train, test = sets()
    clean = linear_probe(train, test, regulariser=1.0), knn(train, test)
    extra = torch.full((1, 6), 1e3)
    bad_train = replace(
        train, keys=(*train.keys, "lost"), labels=(*train.labels, ""), values=torch.cat([train.values, extra])
    )
    bad_test = replace(
        test,
        keys=(*test.keys, "mute", "strange"),
        labels=(*test.labels, "", "zebra"),
        values=torch.cat([test.values, extra, extra]),
    )
    skipped = {
        "training sample with features that are not finite": [],
        "test sample with features that are not finite": [],
        "training sample without a label": ["lost"],
        "test sample without a label": ["mute"],
        "class unknown in training": ["strange"],
    }
    for result, expected in zip(
        (linear_probe(bad_train, bad_test, regulariser=1.0), knn(bad_train, bad_test)), clean, strict=True
    ):
        assert result == {**expected, "skipped": skipped}


def test_ranks_and_shares_by_hand() -> None:
    """Oracle: by hand: equal scores go to the lower class, -inf is never right, classes without tests do not count."""
    scores = torch.tensor([[3.0, 1, 2], [1, 1, 1], [1, 1, 0], [5, -torch.inf, -torch.inf]])
    classes = torch.tensor([2, 0, 1, 1])
    places = ranks(scores, classes)
    assert places.tolist() == [1, 0, 1, 3]
    assert accuracy(places, 3) == {"top1": 0.25, "top5": None}
    assert accuracy(torch.tensor([0, 4, 5, 7]), 8) == {"top1": 0.25, "top5": 0.5}
    assert class_scores(places, classes, ("x", "y", "z", "none")) == {
        **accuracy(places, 4),
        "n_test": 4,
        "n_classes": 4,
        "mean_per_class": 1 / 3,
        "per_class": {"x": {"right": 1, "n": 1}, "y": {"right": 0, "n": 2}, "z": {"right": 0, "n": 1}},
    }


def test_what_cannot_be_probed_is_said() -> None:
    train, test = sets()
    one = replace(train, labels=("a",) * len(train))
    with pytest.raises(UserError, match="1 classes in 90 samples"):
        linear_probe(one, test)
    with pytest.raises(UserError, match="none of the 90 test samples has a class"):
        knn(train, replace(test, labels=("q",) * 90))
    pair = features(torch.eye(2), ["a", "b"])
    with pytest.raises(UserError, match="no class has two training samples"):
        linear_probe(pair, pair)
    assert linear_probe(pair, pair, regulariser=1.0)["top1"] == 1.0
    assert knn(pair, pair)["by_k"].keys() == {"2"}


def test_scores_that_are_no_numbers_are_never_right() -> None:
    scores = torch.tensor([[float("nan"), 1.0], [0.0, float("nan")], [2.0, 1.0]])
    assert ranks(scores, torch.tensor([0, 0, 0])).tolist() == [2, 2, 0]
