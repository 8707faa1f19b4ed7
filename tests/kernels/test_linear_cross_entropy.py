"""linear_cross_entropy against F.cross_entropy on the full logits, in float64; and what it never allocates."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from riverrun.kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy

N, D, V = 23, 6, 37


def make_inputs(n=N, dtype=torch.float64, ignore_index=-100):
    hidden = torch.randn(n, D, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (n,))
    targets[::4] = ignore_index
    return hidden, weight, targets


def full(hidden, weight, targets, z_loss=0.0, ignore_index=-100):
    """Per-token cross-entropy and z-loss from all logits at once."""
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    return loss, z_loss * logits.logsumexp(1).square() * (targets != ignore_index)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 23, 64])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_equals_full_logits(reduction, chunk_size, ignore_index):
    """Values, and the gradients for unequal upstream gradients of the loss and of the z-loss."""
    hidden, weight, targets = make_inputs(ignore_index=ignore_index)
    out = linear_cross_entropy(
        hidden, weight, targets, z_loss=0.3, ignore_index=ignore_index, chunk_size=chunk_size, reduction=reduction
    )
    want = full(hidden, weight, targets, 0.3, ignore_index)
    if reduction == "sum":
        want = tuple(t.sum() for t in want)
    torch.testing.assert_close((out.loss, out.z_loss), want, rtol=1e-12, atol=1e-12)
    assert out.num_targets.dtype == torch.int64
    assert out.num_targets == (targets != ignore_index).sum() < N
    upstream = [torch.randn_like(t) for t in want]
    got = torch.autograd.grad((out.loss, out.z_loss), (hidden, weight), upstream)
    torch.testing.assert_close(got, torch.autograd.grad(want, (hidden, weight), upstream), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("vocabulary", [1, 37, 5000])
def test_triton_equals_full_logits(chunk_size, vocabulary):
    hidden, weight = torch.randn(9, D), 3 * torch.randn(vocabulary, D)
    targets = torch.randint(0, vocabulary, (9,))
    targets[2] = -100
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        if dtype == torch.float32:
            out = linear_cross_entropy(
                *leaves, targets, z_loss=0.3, reduction="none", chunk_size=chunk_size, backend="triton"
            )[:2]
        else:
            out = full(*leaves, targets, 0.3)
        upstream = [torch.linspace(-1, 2, 9, dtype=dtype)] * 2
        outcomes.append([*out, *torch.autograd.grad(out, leaves, upstream)])
    for got, want in zip(*outcomes):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_backends():
    hidden, weight, targets = make_inputs()
    for backend, problem in (("triton", "float64"), ("reference", "no step-by-step form"), ("x", "unknown backend")):
        with pytest.raises(ValueError, match=problem):
            linear_cross_entropy(hidden, weight, targets, backend=backend)


def test_gradcheck():
    hidden, weight, targets = make_inputs(5)

    def run(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, z_loss=0.1, chunk_size=2, reduction="none")[:2]

    assert torch.autograd.gradcheck(run, (hidden, weight))


def test_gradient_of_one_output_or_one_input_alone():
    hidden, weight, targets = make_inputs()
    for i, name in enumerate(("loss", "z_loss")):
        got = torch.autograd.grad(getattr(linear_cross_entropy(hidden, weight, targets, z_loss=0.3), name), hidden)
        want = torch.autograd.grad(full(hidden, weight, targets, 0.3)[i].sum(), hidden)
        torch.testing.assert_close(got, want)
    frozen = linear_cross_entropy(hidden.detach(), weight, targets, chunk_size=4).loss
    want = torch.autograd.grad(full(hidden, weight, targets)[0].sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(frozen, weight), want)


def test_no_target_at_all():
    hidden, weight, targets = make_inputs()
    out = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), z_loss=0.3, chunk_size=4)
    assert out.loss == 0 and out.z_loss == 0 and out.num_targets == 0
    for grad in torch.autograd.grad(out.loss + out.z_loss, (hidden, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_huge_logits_are_finite():
    hidden, weight, targets = make_inputs(dtype=torch.float32)
    out = linear_cross_entropy(hidden * 1e4, weight, targets, z_loss=1e-4)
    assert all(torch.isfinite(t).all() for t in (*out, *torch.autograd.grad(out.loss + out.z_loss, (hidden, weight))))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_is_near_float64(dtype, tolerance, autocast):
    hidden, weight, targets = make_inputs(200)
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = linear_cross_entropy(hidden, weight, targets, z_loss=1e-2, chunk_size=16)
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = [t.sum() for t in full(*exact_inputs, targets, 1e-2)]
    # logits, softmax and sums are float32 whatever the inputs
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.z_loss.double(), exact[1], rtol=1e-5, atol=0)
    got = torch.autograd.grad(out.loss + out.z_loss, (hidden, weight))
    for g, e in zip(got, torch.autograd.grad(exact[0] + exact[1], exact_inputs)):
        assert g.dtype == dtype
        assert (g - e).norm() < tolerance * e.norm()


def test_weight_gradient_is_summed_in_float32():
    """Many chunks of one token each: a bfloat16 sum would lose the small terms, as 256 + 1 is 256 there."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    out = linear_cross_entropy(hidden, weight, torch.zeros(1024, dtype=torch.int64), chunk_size=1)
    (grad,) = torch.autograd.grad(out.loss, weight)
    torch.testing.assert_close(grad, torch.tensor([[-512.0], [512.0]]).bfloat16(), rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


class Products(TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += "mm" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("total", "forward", "backward"),
    [
        (lambda out: (out.loss + out.z_loss) / 7, 3, 0),  # the gradients are made while the logits are there
        (lambda out: out.loss + 2 * out.z_loss, 3, 3),  # and again, if they are not those of the sum
        (lambda out: out.loss, 3, 3),
    ],
)
def test_computes_the_logits_once_for_the_sum_of_the_losses(total, forward, backward):
    hidden, weight, targets = make_inputs()
    with Products() as products:
        loss = total(linear_cross_entropy(hidden, weight, targets, z_loss=0.3, chunk_size=8))
    assert products.number == 3 * forward  # chunks
    with Products() as products:
        got = torch.autograd.grad(loss, (hidden, weight))
    assert products.number == 3 * backward
    parts = LinearCrossEntropy(*(part.sum() for part in full(hidden, weight, targets, 0.3)), N)
    torch.testing.assert_close(got, torch.autograd.grad(total(parts), (hidden, weight)), rtol=1e-12, atol=1e-12)
    with Products() as products, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, chunk_size=8)
    assert products.number == 3


def test_never_holds_all_logits():
    hidden, weight, targets = make_inputs(300)
    with LargestTensor() as chunked:
        out = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, chunk_size=64)
        (out.loss + out.z_loss).backward()
    assert chunked.elements == 64 * V
    with LargestTensor() as whole:  # the measurement sees the full logits when there are any
        full(hidden, weight, targets)[0].sum().backward()
    assert whole.elements == 300 * V


def test_default_chunks_have_64_mebibytes_of_logits():
    vocab, n = 2**20, 40
    hidden, weight = torch.randn(n, 1).requires_grad_(), torch.randn(vocab, 1)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, torch.zeros(n, dtype=torch.int64)).loss.backward()
    assert largest.elements == 16 * vocab


def test_compiles_without_graph_breaks():
    hidden, weight, targets = make_inputs()

    def run(hidden, weight):
        out = linear_cross_entropy(hidden, weight, targets, z_loss=0.3, chunk_size=8)
        return out.loss + out.z_loss

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got, want = compiled(hidden, weight), run(hidden, weight)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t, (hidden, weight)) for t in (got, want)))


def test_bad_arguments():
    hidden, weight, targets = make_inputs()
    for arguments in [(hidden[None], weight, targets), (hidden, weight[:, 1:], targets), (hidden, weight[0], targets)]:
        with pytest.raises(ValueError, match="expected hidden"):
            linear_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="targets must have shape"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="mean")
    with pytest.raises(ValueError, match="chunk_size"):
        linear_cross_entropy(hidden, weight, targets, chunk_size=0)
