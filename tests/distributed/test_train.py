"""The engine against plain torch on one process, and whole runs that are killed and resumed, on one and two ranks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_workers as workers
from training_workers import CASES, CLIP, DECAY, LR, MUON_LR, STEPS, Z_LOSS, Tiny, batches, run

# the engine


@pytest.fixture(scope="module", params=[1, 2])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    codes = run(workers.train_tiny, folder, world=request.param, log=folder / "log")
    assert set(codes) == {0}, workers.read(folder / "log")
    return {case: torch.load(folder / f"{case}.pt", weights_only=True) for case in [*CASES, "accumulation", "halves"]}


def plain_torch(optimizer, dtype, stage):
    """The same training written out: fp32 master weights, fp32 accumulation, torch's clipping, AdamW and Muon."""
    model, dtype = Tiny(), {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    master = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def cast():
        for name, p in model.named_parameters():
            p.data = master[name].detach().to(torch.float32 if name == "scale.A_log" and stage == 1 else dtype)

    muon = {"gate.weight", "up.weight", "down.weight"} if optimizer == "muon" else set()
    decayed = {"emb.weight", "gate.weight", "up.weight", "down.weight", "conv.weight", "head.weight"}
    groups = [
        {"params": [p for n, p in master.items() if n not in muon and (n in decayed) == decay], "weight_decay": d}
        for decay, d in ((True, DECAY), (False, 0.0))
    ]
    optimizers = [torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)]
    if muon:
        matrices = [master[name] for name in sorted(muon)]
        optimizers.append(torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=DECAY))
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]

    losses, norms = [], []
    cast()
    for step in range(STEPS):
        total = sum(b.num_targets for b in batches(step))
        for p in master.values():
            p.grad = torch.zeros_like(p)
        losses.append(0.0)
        for batch in batches(step):
            out = model(batch.input_ids, batch.targets, num_targets=total, z_loss=Z_LOSS)
            out.loss.backward()
            losses[-1] += out.cross_entropy.item() / total
            for name, p in model.named_parameters():
                master[name].grad += p.grad
                p.grad = None
        norms.append(torch.nn.utils.clip_grad_norm_(master.values(), CLIP).item())
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks):
            group["lr"] = peak * (1 - step / STEPS)
        for o in optimizers:
            o.step()
        cast()
    with torch.no_grad():
        held_out = sum(model(b.input_ids, b.targets, num_targets=1).cross_entropy.item() for b in batches(99))
    return {
        "losses": losses,
        "norms": norms,
        "weights": {n: p.detach() for n, p in master.items()},
        "held_out": held_out,
    }


def newton_schulz_fp32(gradient, coefficients, steps, eps):
    """torch's works in bf16, where a difference in the last bit grows to some percent."""
    a, b, c = coefficients
    x = gradient.mT if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if gradient.shape[0] > gradient.shape[1] else x


@pytest.mark.parametrize("case", CASES)
def test_the_engine_trains_as_plain_torch_does(trained, case, monkeypatch):
    """Uneven numbers of targets, accumulation, clipping, decay groups, z-loss; one rank and two."""
    if case == "muon-fp32-1":
        monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz_fp32)
    got, want = trained[case], plain_torch(*CASES[case])
    assert min(want["norms"]) > CLIP, "clipping must matter"
    assert got["weights"].keys() == want["weights"].keys()
    errors = [(got["weights"][name] - weight).abs() for name, weight in want["weights"].items()]
    if CASES[case][1] == "bf16":  # kernels round differently for weights that lie elsewhere in memory
        losses, weights = 6e-3, sum(e.sum() for e in errors) / sum(e.numel() for e in errors)
        assert weights < 1e-3
    else:
        losses = 5e-6
        assert max(e.max() for e in errors) < losses
    assert got["losses"] == pytest.approx(want["losses"], abs=losses)
    assert got["norms"] == pytest.approx(want["norms"], abs=5 * losses)
    assert got["held_out"] == pytest.approx(want["held_out"], rel=losses)


def test_every_loss_of_an_objective_is_a_mean_over_the_global_batch(trained):
    """Micro batches and ranks have other shares of each loss's predictions."""
    model = Tiny()
    parts = [workers.halved(batch) for batch in batches(0)]
    sums = [torch.zeros(()), torch.zeros(())]
    for part in parts:
        losses = model(part.input_ids, part.targets, token_losses=True, late=part.extra["late"]).token_losses
        sums = [a + b for a, b in zip(sums, workers.Halves().losses(losses, part))]
    counts = [sum(part) for part in zip(*map(workers.Halves().counts, parts))]
    assert counts[0] > 0 and counts[0] != counts[1]
    total = sum(weight * value / count for weight, value, count in zip((1.0, 0.25), sums, counts))
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]).norm().item()
    for stage, got in trained["halves"].items():
        assert got["sums"] == pytest.approx([value.item() for value in sums], rel=1e-5), stage
        assert got["norm"] == pytest.approx(norm, rel=1e-5), stage


def test_gradients_are_accumulated_in_fp32(trained):
    """The norm of many bf16 gradients' sum is that of an fp32 sum, and not that of a bf16 sum."""
    for case, (got, fp32, bf16) in trained["accumulation"].items():
        assert got == pytest.approx(fp32, rel=1e-6), case
        assert abs(bf16 - fp32) > 1e-4 * fp32, "the example must tell them apart"
