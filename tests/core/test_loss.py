"""Caption loss. Oracles: torch's cross entropy with ignore_index, a loop over tokens, equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from open_clip_ov2.core import IGNORE_INDEX, CaptionLoss, caption_targets

EOS = 9


def plain_targets(ids: list[int]) -> list[int]:
    """Slow and plain: everything after the first end of text is padding, whatever its id."""
    out, ended = [], False
    for position, token in enumerate(ids):
        if position:
            out.append(IGNORE_INDEX if ended else token)
        ended = ended or token == EOS
    return out


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, EOS), min_size=6, max_size=6), min_size=1, max_size=4))
def test_targets_match_the_plain_loop(rows: list[list[int]]) -> None:
    assert caption_targets(torch.tensor(rows), EOS).tolist() == [plain_targets(row) for row in rows]


def test_the_id_of_padding_may_be_a_word() -> None:
    """OpenCLIP's tokenizer: 0 is both padding and "!"."""
    ids = torch.tensor([[8, 0, 0, EOS, 0, 0]])
    assert caption_targets(ids, EOS).tolist() == [[0, 0, EOS, IGNORE_INDEX, IGNORE_INDEX]]


def test_sums_equal_cross_entropy() -> None:
    logits, labels = torch.randn(4, 7, 20), torch.randint(0, 20, (4, 7))
    labels[:, 4:] = IGNORE_INDEX
    sums = CaptionLoss()(logits, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(sums.nll / sums.num_targets, expected, atol=1e-6, rtol=0)
    assert sums.num_targets == 16
    assert torch.equal(sums.nll, sums.objective)


def test_options_equal_their_equations() -> None:
    logits, labels = torch.randn(5, 11), torch.tensor([1, 2, IGNORE_INDEX, 4, 10])
    log_p = logits.log_softmax(-1)
    real = labels != IGNORE_INDEX
    nll = -sum(log_p[i, labels[i]] for i in range(5) if real[i])
    smooth = -sum(0.9 * log_p[i, labels[i]] + 0.1 * log_p[i].mean() for i in range(5) if real[i])
    z = sum(logits[i].logsumexp(-1) ** 2 for i in range(5) if real[i])
    sums = CaptionLoss(label_smoothing=0.1, z_loss=1e-2)(logits, labels)
    torch.testing.assert_close(sums.nll, nll)
    torch.testing.assert_close(sums.objective, smooth + 1e-2 * z)


class Products(TorchDispatchMode):
    """Notes the shape of every matrix product's result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(out.shape)
        return out

    def rows_by_vocabulary(self, vocabulary: int) -> list[int]:
        return [shape[0] for shape in self.shapes if shape[1] == vocabulary]


def test_from_hidden_equals_full_logits_and_computes_each_target_once() -> None:
    hidden = torch.randn(3, 6, 8, requires_grad=True)
    head = nn.Linear(8, 13, bias=False)
    labels = torch.randint(0, 13, (3, 6))
    labels[0, 2:], labels[2, 5:] = IGNORE_INDEX, IGNORE_INDEX
    real = labels != IGNORE_INDEX
    with Products() as products:
        sums = CaptionLoss().from_hidden(hidden[real], head, labels[real])
    assert products.rows_by_vocabulary(13) == [sums.num_targets] == [int(real.sum())]
    (gradient,) = torch.autograd.grad(sums.objective, hidden)
    plain = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(sums.nll, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, hidden)[0])


@pytest.mark.parametrize("bad", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}])
def test_options_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CaptionLoss(**bad)
