"""The chunked losses against the plain ones: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.passes.training import (
    HeadRows,
    LogitRows,
    TopRows,
    Weights,
    compute_chunked_losses,
    top_rows,
)

T, V, X = 37, 301, 24
SMALL = 5 * V  # logits of a chunk


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def plain(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, counted: Tensor, weights: Weights
) -> Tensor:
    t = weights.temperature
    pairs = (F.log_softmax(logits / t, -1), F.log_softmax(teacher / t, -1))
    kl = F.kl_div(*pairs, log_target=True, reduction="none").sum(-1)[counted].mean()
    ce = F.cross_entropy(logits, labels) if labels is not None else logits.new_zeros(())
    return weights.kl * t * t * kl + weights.ce * ce


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize(
    "weights",
    [Weights(), Weights(0.7, 0.3), Weights(1.0, 0.0, 2.5), Weights(0.0, 1.0)],
    ids=["kl", "both", "warm", "ce"],
)
def test_values_and_gradients_are_those_of_the_plain_loss(weights: Weights) -> None:
    hidden, weight, bias = normal(T, X, seed=0), normal(V, X, seed=1), normal(V, seed=2)
    teacher = HeadRows(normal(T, 8, seed=3), normal(V, 8, seed=4))
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(5))
    labels[::6] = -100
    counted = torch.arange(T) % 5 != 1
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    got = compute_chunked_losses(HeadRows(*ours), teacher, labels, counted, weights, elements=SMALL)
    logits = theirs[0] @ theirs[1].T + theirs[2]
    expected = plain(logits, teacher.hidden_TX @ teacher.weight_VX.T, labels, counted, weights)
    torch.testing.assert_close(got.total, expected, rtol=1e-5, atol=1e-5)
    (got.total * 3).backward()
    (expected * 3).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-5 * max(1.0, float(b.grad.abs().max()))


def test_given_logits_get_the_gradient_of_the_plain_loss() -> None:
    (ours,), (theirs,) = leaves(normal(T, V, seed=0)), leaves(normal(T, V, seed=0))
    teacher = normal(T, V, seed=1)
    everything = torch.ones(T, dtype=torch.bool)
    got = compute_chunked_losses(LogitRows(ours), LogitRows(teacher), elements=SMALL)
    got.total.backward()
    plain(theirs, teacher, None, everything, Weights()).backward()
    assert ours.grad is not None and theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() <= 1e-5
    assert got.ce == 0 and got.kl == got.total


def test_a_tied_head_gathers_both_gradients() -> None:
    (table,), (other,) = leaves(normal(V, X, seed=0)), leaves(normal(V, X, seed=0))
    ids, teacher = torch.arange(T), normal(T, V, seed=1)
    compute_chunked_losses(
        HeadRows(table[ids], table), LogitRows(teacher), elements=SMALL
    ).total.backward()
    plain(
        other[ids] @ other.T, teacher, None, torch.ones(T, dtype=torch.bool), Weights()
    ).backward()
    assert table.grad is not None and other.grad is not None
    assert (table.grad - other.grad).abs().max() <= 1e-5


def test_all_tokens_as_top_tokens_are_the_full_divergence() -> None:
    teacher = LogitRows(normal(T, V, seed=1))
    (a,), (b,) = leaves(normal(T, V, seed=0)), leaves(normal(T, V, seed=0))
    full = compute_chunked_losses(LogitRows(a), teacher, elements=SMALL).total
    top = compute_chunked_losses(LogitRows(b), top_rows(teacher, V), elements=SMALL).total
    torch.testing.assert_close(top, full, rtol=1e-5, atol=1e-5)
    full.backward()
    top.backward()
    assert a.grad is not None and b.grad is not None and (a.grad - b.grad).abs().max() <= 1e-5


def test_the_gradient_of_top_tokens_is_that_of_their_divergence() -> None:
    """KL over k tokens and one outcome for all others, written out and differentiated by
    autograd."""
    top = top_rows(LogitRows(normal(T, V, seed=1)), 7)
    (ours,), (theirs,) = leaves(normal(T, V, seed=0)), leaves(normal(T, V, seed=0))
    got = compute_chunked_losses(LogitRows(ours), top, elements=SMALL).total
    log_q = F.log_softmax(theirs, -1).gather(-1, top.indices_Tk.long())
    p, rest = top.log_probs_Tk.exp(), 1 - top.log_probs_Tk.exp().sum(-1)
    others = (p * (top.log_probs_Tk - log_q)).sum(-1)
    expected = (others + rest * (rest.log() - (1 - log_q.exp().sum(-1)).log())).mean()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.backward()
    expected.backward()
    assert (
        ours.grad is not None
        and theirs.grad is not None
        and (ours.grad - theirs.grad).abs().max() <= 1e-5
    )
    assert got < compute_chunked_losses(LogitRows(ours), LogitRows(normal(T, V, seed=1))).total


def test_a_token_that_both_forbid_counts_nothing() -> None:
    student, teacher = normal(T, V, seed=0), normal(T, V, seed=1)
    student[:, 5] = teacher[:, 5] = -torch.inf
    (logits,) = leaves(student)
    total = compute_chunked_losses(LogitRows(logits), LogitRows(teacher)).total
    total.backward()
    without = [torch.cat([t[:, :5], t[:, 6:]], -1) for t in (student, teacher)]
    expected = plain(*without, None, torch.ones(T, dtype=torch.bool), Weights())
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_low_precision_heads_are_close() -> None:
    ours = leaves(normal(T, X, seed=0), normal(V, X, seed=1, scale=0.2))
    teacher = LogitRows(normal(T, V, seed=2))
    exact = compute_chunked_losses(HeadRows(*ours), teacher).total
    exact.backward()
    wanted = [t.grad.clone() for t in ours if t.grad is not None]
    for t in ours:
        t.grad = None
    rough = compute_chunked_losses(
        HeadRows(*ours, dtype=torch.bfloat16), teacher, elements=SMALL
    ).total
    rough.backward()
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=1e-2)
    for t, g in zip(ours, wanted, strict=True):
        assert t.grad is not None and t.grad.dtype == torch.float32
        assert (t.grad - g).norm() <= 1e-2 * g.norm()


def test_what_does_not_fit_is_refused() -> None:
    logits = LogitRows(normal(T, V, seed=0))
    with pytest.raises(ValueError, match="301"):
        compute_chunked_losses(logits, LogitRows(normal(T, V + 1, seed=0)))
    with pytest.raises(ValueError, match="36 rows"):
        compute_chunked_losses(logits, LogitRows(normal(T - 1, V, seed=0)))
    with pytest.raises(ValueError, match="labels have 3 rows"):
        compute_chunked_losses(logits, None, torch.zeros(3, dtype=torch.int64))
    (ours,) = leaves(normal(T, V, seed=0))
    total = compute_chunked_losses(LogitRows(ours), logits).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


class Bytes(TorchDispatchMode):
    """Counts the bytes of storages that ops made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.see(value.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        import weakref

        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def peak(work) -> int:  # type: ignore[no-untyped-def]
    with Bytes() as counted:
        work()
    return counted.peak


def test_the_peak_is_a_quarter_of_the_plain_one_at_most() -> None:
    rows, vocabulary, width = 256, 2048, 16
    hidden, weight = normal(rows, width, seed=0), normal(vocabulary, width, seed=1)
    teacher = HeadRows(normal(rows, width, seed=2), normal(vocabulary, width, seed=3))
    everything = torch.ones(rows, dtype=torch.bool)

    def ours() -> None:
        student = HeadRows(*leaves(hidden, weight))
        compute_chunked_losses(student, teacher, elements=16 * vocabulary).total.backward()

    def theirs() -> None:
        h, w = leaves(hidden, weight)
        plain(
            h @ w.T, teacher.hidden_TX @ teacher.weight_VX.T, None, everything, Weights()
        ).backward()

    full = rows * vocabulary * 4
    assert peak(theirs) >= 4 * full, (
        "the yardstick itself: the plain way holds several full tensors"
    )
    assert peak(ours) <= peak(theirs) / 4
    assert peak(ours) < 2 * full


def test_a_top_teacher_keeps_its_rows() -> None:
    top = top_rows(HeadRows(normal(T, X, seed=0), normal(V, X, seed=1)), 9)
    assert isinstance(top, TopRows) and top.count_rows == T
    assert top.indices_Tk.shape == (T, 9) and top.indices_Tk.dtype == torch.int32
    assert (top.log_probs_Tk.diff(dim=-1) <= 0).all() and (top.log_probs_Tk.exp().sum(-1) < 1).all()
