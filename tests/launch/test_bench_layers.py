"""`riverrun bench` of whole layers: what recurrence and glue take, and peers' layers with the same parameters."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from riverrun.kernels.benchmarks import BENCHMARKS, run
from riverrun.kernels.benchmarks.benchmark import Case, Unavailable
from riverrun.kernels.benchmarks.timing import Time
from riverrun.launch.bench_report import Report
from riverrun.modeling.benchmarks import LAYERS
from tests.launch.benches import (
    WHOLE,
    WITH_PEERS,
    case_of,
    errors,
    invoke,
    nothing,
)


@pytest.mark.parametrize(("op", "variant"), WHOLE)
def test_a_layer_is_run_with_the_share_of_its_recurrence_and_glue(op, variant, tmp_path):
    options = [
        "--batch",
        "1",
        "--seq-len",
        "16",
        "--width",
        "128",
        "--device",
        "cpu",
        "--repeats",
        "2",
        "--sweep",
        "none",
    ]
    variants = ["--variant", variant] if variant else []
    result = invoke(op, *options, *variants, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / f"{op}.json").read_text())["regimes"]["fresh"]
    assert document["case"]["H"] == (4 if op == "mamba2_layer" else 1)  # heads of 64 in 2 D, of 128 in D
    found = {c["name"]: c for c in document["contenders"]}
    for name in ("riverrun auto", "projections alone", "riverrun attention"):
        assert all(found[name][what]["median"] > 0 for what in ("forward", "backward", "layer")), name
        assert set(found[name]["error"]) == ({"output", "gradients"} if name == "riverrun auto" else set())
    assert found["riverrun auto"]["error"]["output"] < 2e-2
    if op == "titans_lmm_layer":
        assert found["riverrun gated_delta"]["layer"]["median"] > 0
        assert found["fla's op"]["skipped"] == "needs CUDA"
    else:
        assert found["fla"]["skipped"] == "needs CUDA"
    share = 1 - found["projections alone"]["layer"]["median"] / found["riverrun auto"]["layer"]["median"]
    assert document["recurrence_and_glue"] == {"riverrun auto": pytest.approx(share)}
    line = f"recurrence and glue: {share:.0%} of the layer's time, riverrun auto"
    assert line in result.stdout and line in (tmp_path / f"{op}.md").read_text()


def test_recurrence_and_glue_are_what_the_products_do_not_take():
    def result(name, ms):
        return run.Result(name, layer=Time(ms, ms, 1) if ms else None)

    case = Case(1, 16, 128, 4, torch.bfloat16, torch.device("cpu"))
    report = Report(LAYERS["mamba2_layer"], case, 1e12, 1, "", cold=True)
    ours, peer = result("riverrun auto", 20.0), result("mamba_ssm", 30.0)
    others = [result("fla", None), result("riverrun attention", 25.0)]
    report.results["fresh"] = [ours, result("projections alone", 15.0), peer, *others]
    assert report.shares("fresh") == {"riverrun auto": 0.25, "mamba_ssm": 0.5}
    first, second, third, *_ = report.notes()
    assert first.startswith(
        "recurrence and glue: 25% of the layer's time, riverrun auto: 1 − projections alone / layer"
    )
    assert second.startswith("recurrence and glue: 50% of the layer's time, mamba_ssm: ")
    assert third.startswith("fresh: ")
    report.results["fresh"] = [ours, peer]
    assert report.shares("fresh") == {} and report.notes()[0].startswith("fresh: ")
    kernel = replace(report, benchmark=BENCHMARKS["para_gru"])
    assert kernel.shares("fresh") == {}


@pytest.mark.parametrize(("op", "variant"), WHOLE)
def test_the_projections_alone_are_all_of_the_layers_products(op, variant):
    from torch.utils.flop_counter import FlopCounterMode

    case = case_of(variant)
    inputs = run.make_inputs(LAYERS[op], case, "fresh")
    (alone,) = (c for c in LAYERS[op].contenders(case) if c.name == "projections alone")
    work = alone.build(inputs, case, nothing)
    with FlopCounterMode(display=False) as counter:
        out = work.layer()
    weights = [w for name, w in inputs.items() if name.endswith("_proj.weight")]
    assert counter.get_total_flops() == 2 * case.B * case.T * sum(w.numel() for w in weights)
    assert sorted(w.data_ptr() for w in work.leaves[1:]) == sorted(w.data_ptr() for w in weights)

    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(out, work.layer_leaves, torch.randn_like(out))
    # the gradients of inputs and of weights; the random numbers between need none
    assert counter.get_total_flops() == 2 * 2 * case.B * case.T * sum(w.numel() for w in weights)
    assert all(g.shape == w.shape and g.any() for g, w in zip(grads, work.layer_leaves, strict=True))


@pytest.mark.parametrize(("op", "variant"), WHOLE)
def test_contenders_of_a_layer_share_its_parameters(op, variant):
    case = case_of(variant)
    inputs = run.make_inputs(LAYERS[op], case, "fresh")
    leaves = LAYERS[op].contenders(case)[0].build(inputs, case, nothing).leaves
    assert [x.data_ptr() for x in leaves] == [x.data_ptr() for x in inputs.values()]
    narrow = run.make_inputs(LAYERS[op], replace(case, dtype=torch.bfloat16), "fresh")
    wide = {name for name, x in narrow.items() if x.dtype == torch.float32}
    decays = {"A_log", "dt_bias"}
    assert (
        wide
        == {
            "mamba2_layer": decays | {"D"},
            "gated_delta_layer": decays,
            "titans_lmm_layer": {f"memory.{gate}_bias" for gate in ("alpha", "eta", "theta")},
        }[op]
    )


class TheirMamba2(torch.nn.Module):
    """A stand-in with the parameters of mamba_ssm's and fla's Mamba2: one projection to z, x, B, C, dt."""

    def __init__(self, D, N, W, expand, P, eps=1e-5):
        super().__init__()
        self.P, self.N, self.eps, inner = P, N, eps, expand * D
        H = inner // P
        self.sizes = [inner, inner + 2 * N, H]
        self.in_proj = torch.nn.Linear(D, sum(self.sizes), bias=False)
        self.conv1d = torch.nn.Conv1d(inner + 2 * N, inner + 2 * N, W, groups=inner + 2 * N, padding=W - 1)
        self.dt_bias, self.A_log, self.D = (torch.nn.Parameter(torch.zeros(H)) for _ in range(3))
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.zeros(inner))
        self.out_proj = torch.nn.Linear(inner, D, bias=False)

    def forward(self, x):
        from riverrun.kernels.ssd import ssd

        z, xBC, dt = self.in_proj(x).split(self.sizes, -1)
        xBC = torch.nn.functional.silu(self.conv1d(xBC.mT)[..., : x.shape[1]].mT)
        x, B, C = xBC.split([self.sizes[0], self.N, self.N], -1)
        dt = torch.nn.functional.softplus(dt + self.dt_bias)
        y = ssd(x.unflatten(2, (-1, self.P)), dt, -self.A_log.exp(), B[:, :, None], C[:, :, None], self.D)[0].flatten(2)
        y = torch.nn.functional.rms_norm(y * torch.nn.functional.silu(z), z.shape[-1:], self.norm.weight, self.eps)
        return self.out_proj(y)


def mamba_ssm_layer(d_model, d_state, d_conv, expand, headdim, ngroups):
    assert ngroups == 1
    return TheirMamba2(d_model, d_state, d_conv, expand, headdim)


class FlaMamba2(TheirMamba2):
    def __init__(self, hidden_size, head_dim, state_size, expand, n_groups, conv_kernel, norm_eps):
        assert n_groups == 1
        super().__init__(hidden_size, state_size, conv_kernel, expand, head_dim, norm_eps)

    def forward(self, x):
        return super().forward(x), None, None


class FlaDelta(torch.nn.Module):
    """A stand-in for fla's GatedDeltaNet and GatedDeltaProduct."""

    def __init__(self, hidden_size, num_heads, head_dim, expand_v, conv_size, allow_neg_eigval, norm_eps,
                 num_householder=1):  # fmt: skip
        super().__init__()
        assert expand_v == 1.0 and allow_neg_eigval
        H, K, n, self.eps = num_heads, head_dim, num_householder, norm_eps
        self.H, self.K, self.n = H, K, n
        for name, size in (("q", H * K), ("k", n * H * K), ("v", n * H * K), ("b", n * H), ("a", H), ("g", H * K)):
            setattr(self, f"{name}_proj", torch.nn.Linear(hidden_size, size, bias=False))
            if name in "qkv":
                conv = torch.nn.Conv1d(size, size, conv_size, groups=size, padding=conv_size - 1, bias=False)
                setattr(self, f"{name}_conv1d", conv)
        self.A_log, self.dt_bias = (torch.nn.Parameter(torch.zeros(H)) for _ in range(2))
        self.o_norm = torch.nn.Module()
        self.o_norm.weight = torch.nn.Parameter(torch.zeros(K))
        self.o_proj = torch.nn.Linear(H * K, hidden_size, bias=False)

    def forward(self, x):
        from riverrun.kernels.gated_delta import gated_delta

        q, k, v = (
            torch.nn.functional.silu(conv(proj(x).mT)[..., : x.shape[1]].mT)
            for proj, conv in ((self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d))
        )
        steps, heads = (self.n, self.H, self.K), (self.H, self.K)
        beta = 2 * self.b_proj(x).sigmoid().unflatten(2, steps[:2])
        g = -self.A_log.exp() * torch.nn.functional.softplus(self.a_proj(x) + self.dt_bias)
        o = gated_delta(
            q.unflatten(2, heads), k.unflatten(2, steps), v.unflatten(2, steps), beta, g, qk_l2norm=True
        )[0]  # fmt: skip
        o = torch.nn.functional.rms_norm(o, (self.K,), self.o_norm.weight, self.eps)
        o = o * torch.nn.functional.silu(self.g_proj(x).unflatten(2, heads))
        return self.o_proj(o.flatten(2)), None, None


LAYER_PACKAGES = {
    "mamba_ssm.modules.mamba2": SimpleNamespace(Mamba2=mamba_ssm_layer),
    "fla.layers.mamba2": SimpleNamespace(Mamba2=FlaMamba2, is_fast_path_available=True),
    "fla.layers.gated_deltanet": SimpleNamespace(GatedDeltaNet=FlaDelta),
    "fla.layers.gated_deltaproduct": SimpleNamespace(GatedDeltaProduct=FlaDelta),
}


@pytest.mark.parametrize(("op", "variant"), WITH_PEERS)
def test_peers_get_the_layers_parameters(op, variant):
    """Stand-ins with the packages' signatures and parameters; every gradient is compared with that of ours."""
    case = case_of(variant)
    peers = [c for c in LAYERS[op].contenders(case) if c.name in ("fla", "mamba_ssm")]
    assert len(peers) == (2 if op == "mamba2_layer" else 1)
    for build in (peer.build for peer in peers):
        assert (
            max(errors(op, case, lambda i, c, _, build=build: build(i, c, LAYER_PACKAGES.__getitem__)).values()) < 1e-5
        )


def test_flas_mamba2_needs_mamba_ssm():
    case = case_of()
    inputs = run.make_inputs(LAYERS["mamba2_layer"], case, "fresh")
    (peer,) = (c for c in LAYERS["mamba2_layer"].contenders(case) if c.name == "fla")
    slow = SimpleNamespace(Mamba2=FlaMamba2, is_fast_path_available=False)
    with pytest.raises(Unavailable, match="mamba_ssm, which is not installed"):
        peer.build(inputs, case, lambda name: slow)
