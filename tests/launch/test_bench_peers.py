"""`riverrun bench`: other libraries, by stand-ins with their signatures, get what they expect and compute the same."""

from types import SimpleNamespace

import pytest
import torch

from riverrun.kernels.benchmarks import BENCHMARKS, contenders, run
from tests.launch.benches import LINEAR, LOSS, MEMORY_BOUND, case_of, errors, nothing


def hgrn(x, decay):
    h, out = torch.zeros_like(x[:, 0]), []
    for x_t, g_t in zip(x.unbind(1), decay.unbind(1)):
        h = g_t.exp() * h + x_t
        out.append(h)
    return torch.stack(out, 1), None


def selective_scan(u, delta, A, B, C):
    """u, delta (B, D, T), A (D, N), B, C (B, N, T) → (B, D, T)."""
    h, out = torch.zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = (delta[..., t, None] * A).exp() * h + (delta * u)[..., t, None] * B[:, None, :, t]
        out.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(out, -1)


@pytest.mark.parametrize("op", ["para_gru", "head_rnn"])
def test_linear_scans_are_called_as_their_packages_want(op):
    """Stand-ins of the documented signatures; the packages need a GPU."""
    packages = {
        "fla.ops.hgrn": SimpleNamespace(fused_recurrent_hgrn=hgrn, chunk_hgrn=hgrn),
        "mamba_ssm.ops.selective_scan_interface": SimpleNamespace(selective_scan_fn=selective_scan),
    }
    case = case_of("lstm" if op == "head_rnn" else "")
    inputs = run.make_inputs(BENCHMARKS[op], case, "fresh")
    for contender in contenders.linear_scans():
        work = contender.build(inputs, case, packages.__getitem__)
        h = work.forward()
        assert h.numel() == case.elements and h.isfinite().all()
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(h.sum(), work.leaves))


@pytest.mark.parametrize("cell", ["lstm", "slstm", "gru", "elman"])
def test_flashrnn_gets_its_layout(cell):
    """A stand-in with FlashRNN's conventions: R (G, H, out, in), and in its GRU a recurrent gate and a bias for n
    that stand first."""
    from riverrun.kernels.benchmarks.head_rnn import flashrnn
    from riverrun.kernels.head_rnn.cells import CELLS

    def stand_in(Wx, R, b, function, backend, dtype):
        assert dtype == "float32" and b.shape == (len(R) + (function == "gru"), *R.shape[1:3])
        state, out = [Wx.new_zeros(Wx.shape[0], *R.shape[1:3]) for _ in CELLS[function].states], []
        for token in Wx.unbind(1):
            rec = [torch.einsum("hij,bhj->bhi", r, state[-1]) for r in R]
            rec = [rec[1], rec[2], rec[0]] if function == "gru" else rec
            state = CELLS[function].step(tuple(state), token.unbind(1), tuple(rec))
            out.append(state[-1])
        return torch.stack(out, 1)[None], None

    packages = {"flashrnn": SimpleNamespace(flashrnn=stand_in)}
    build = flashrnn("cuda")
    assert max(errors("head_rnn", case_of(cell), lambda i, c, _: build(i, c, packages.__getitem__)).values()) < 1e-5


@pytest.mark.parametrize(("op", "variant"), LINEAR + LOSS)
def test_peers_get_their_layout(op, variant):
    """Stand-ins with the packages' signatures: k, v and beta of n steps one after another; D by name; a sum, with z."""
    from riverrun.kernels.gated_delta import gated_delta
    from riverrun.kernels.linear_cross_entropy import linear_cross_entropy
    from riverrun.kernels.ssd import ssd

    def rule(q, k, v, g, beta, num_householder=1, use_qk_l2norm_in_kernel=False):
        k, v, beta = (x.unflatten(1, (-1, num_householder)) for x in (k, v, beta))
        return gated_delta(q, k, v, beta, g, qk_l2norm=use_qk_l2norm_in_kernel)

    def scan(x, dt, A, B, C, chunk_size, D=None):
        return ssd(x, dt, A, B, C, D)[0]

    class Loss:
        @staticmethod
        def apply(hidden, weight, targets, bias, class_weight, ignore_index, z_loss, smoothing, reduction):
            assert reduction == "sum"
            out = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, ignore_index=ignore_index)
            return out.loss + out.z_loss, None

    packages = {
        "fla.ops.common.chunk_o": SimpleNamespace(),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=rule),
        "fla.ops.gated_delta_product": SimpleNamespace(chunk_gated_delta_product=rule),
        "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=scan),
        "liger_kernel.ops.fused_linear_cross_entropy": SimpleNamespace(LigerFusedLinearCrossEntropyFunction=Loss),
    }
    case = case_of(variant)
    (peer,) = (c for c in BENCHMARKS[op].contenders(case) if c.name in ("fla", "mamba_ssm", "Liger"))
    assert max(errors(op, case, lambda i, c, _: peer.build(i, c, packages.__getitem__)).values()) < 1e-5


@pytest.mark.parametrize(("op", "variant"), [found for found in MEMORY_BOUND if found[1] != "complex"])
def test_peers_of_memory_bound_ops_get_their_layout(op, variant):
    """Stand-ins with the packages' signatures: channels before time, but neighbours; log a; the norm by name."""
    from riverrun.kernels.causal_conv1d import causal_conv1d
    from riverrun.kernels.gated_rms_norm import gated_rms_norm

    def tri_dao(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                final_states_out=None, activation=None):  # fmt: skip
        assert x.stride(1) == 1 and (seq_idx is None) == (variant == "rows")
        if seq_idx is None:
            return causal_conv1d(x.mT, weight, bias, activation=activation)[0].mT
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == (1, x.shape[2]) and seq_idx.is_contiguous()
        documents = x.mT.split(seq_idx[0].unique_consecutive(return_counts=True)[1].tolist(), dim=1)
        return torch.cat([causal_conv1d(d, weight, bias, activation=activation)[0] for d in documents], dim=1).mT

    def fla_conv(x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False,
                 activation=None, backend="triton", cu_seqlens=None):  # fmt: skip
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        return causal_conv1d(x, weight, bias, activation=activation, cu_seqlens=cu_seqlens)[0], None

    def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        assert bias is None and group_size is None
        return gated_rms_norm(x, z, weight, eps=eps, norm_before_gate=norm_before_gate)

    def rms_norm_gated(x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False,
                       eps=1e-6):  # fmt: skip
        assert bias is None and activation == "swish" and not prenorm
        return gated_rms_norm(x, g, weight, eps=eps, norm_before_gate=True)

    packages = {
        "causal_conv1d": SimpleNamespace(causal_conv1d_fn=tri_dao),
        "fla.modules.convolution": SimpleNamespace(causal_conv1d=fla_conv),
        "mamba_ssm.ops.triton.layernorm_gated": SimpleNamespace(rmsnorm_fn=rmsnorm_fn),
        "fla.modules.fused_norm_gate": SimpleNamespace(rms_norm_gated=rms_norm_gated),
        "fla.modules.layernorm_gated": SimpleNamespace(rmsnorm_fn=rmsnorm_fn),
        "fla.ops.hgrn": SimpleNamespace(fused_recurrent_hgrn=hgrn, chunk_hgrn=hgrn),
    }
    case = case_of(variant)
    peers = [c for c in BENCHMARKS[op].contenders(case) if c.needs_cuda]
    assert len(peers) == 2 and all(peer.same_maths for peer in peers)
    for build in (peer.build for peer in peers):
        assert max(errors(op, case, lambda i, c, _, build=build: build(i, c, packages.__getitem__)).values()) < 1e-5


def test_cudnn_contenders_have_all_gradients():
    case = case_of()
    inputs = run.make_inputs(BENCHMARKS["para_gru"], case, "fresh")
    for cell in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        work = contenders.cudnn(cell).build(inputs, case, nothing)
        h = work.forward()
        assert h.shape == (2, 40, 16)
        assert len(torch.autograd.grad(h.sum(), work.leaves)) == 5
