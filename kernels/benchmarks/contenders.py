"""Contenders that several benchmarks share: the step loop, cuDNN's RNNs, and linear scans over as many elements."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import reset as reset_compiler
from torch._functorch import config as autograd_config
from torch.nn import functional as F

from riverrun.kernels.benchmarks.benchmark import Case, Contender, Inputs, Load, Work

LOOP_STEPS = 512  # a loop over more takes seconds a call
NARROW = {torch.bfloat16: torch.float16}
MAMBA_STATE = 16


def compiled_loop(
    step: Callable[..., Any], gates: torch.Tensor, initial: tuple[torch.Tensor, ...], *weights: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A call that runs `step(*states, gates of a token, *weights) → states`, compiled, over all tokens → h (B, T, …).

    `step` returns a tensor if it has one state; the last state is h. The arithmetic is float32, as in our kernels.
    """
    reset_compiler()  # earlier shapes count against the limit of recompilations, beyond which the loop would be eager
    compiled = torch.compile(step, fullgraph=True, dynamic=False)

    def run() -> torch.Tensor:
        # a backward pass that is run again and again must keep its buffers
        with autograd_config.patch(donated_buffer=False):
            states, out = initial, []
            wide = [w.float() for w in weights]
            for token in gates.float().unbind(1):
                states = compiled(*states, token, *wide)
                states = states if isinstance(states, tuple) else (states,)
                out.append(states[-1])
            return torch.stack(out, dim=1).to(gates.dtype)

    return run


def cudnn(cell: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]) -> Contender:
    """torch's RNN of the same width. Its recurrence is dense, and its own projection is part of every figure."""

    def build(inputs: Inputs, case: Case, load: Load) -> Work:
        dtype = NARROW.get(case.dtype, case.dtype)
        rnn = cell(case.D, case.D, batch_first=True, device=case.device, dtype=dtype)
        rnn.flatten_parameters()
        x = inputs["x"].detach().to(dtype).requires_grad_()
        leaves = (x, *rnn.parameters())

        def run() -> torch.Tensor:
            return rnn(x)[0]

        return Work(run, leaves, run, leaves)

    note = "other maths: dense D × D recurrence; its projection is in every figure; float16 for bfloat16"
    return Contender(f"cuDNN {cell.__name__}", build, note, same_maths=False, needs_cuda=True)


def linear_scans() -> list[Contender]:
    """h_t = decay_t h + x_t over B · T · D elements, by other packages."""

    def hgrn(function: str) -> Callable[[Inputs, Case, Load], Work]:
        def build(inputs: Inputs, case: Case, load: Load) -> Work:
            run = getattr(load("fla.ops.hgrn"), function)
            x = inputs["x"]
            decay = F.logsigmoid(_first_gate(inputs)).detach().requires_grad_()
            return Work(lambda: run(x, decay)[0], (x, decay))

        return build

    def mamba(inputs: Inputs, case: Case, load: Load) -> Work:
        scan = load("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        like: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
        x, dt = (
            y.detach().transpose(1, 2).contiguous().requires_grad_()
            for y in (inputs["x"], F.softplus(_first_gate(inputs)))
        )
        A = (-torch.rand(case.D, MAMBA_STATE, device=case.device)).requires_grad_()
        B, C = (torch.randn(case.B, MAMBA_STATE, case.T, **like).requires_grad_() for _ in range(2))
        return Work(lambda: scan(x, dt, A, B, C), (x, dt, A, B, C))

    other = "other maths: a linear scan of as many elements"
    return [
        Contender("fla fused_recurrent_hgrn", hgrn("fused_recurrent_hgrn"), other, same_maths=False, needs_cuda=True),
        Contender("fla chunk_hgrn", hgrn("chunk_hgrn"), other, same_maths=False, needs_cuda=True),
        Contender(
            "mamba_ssm selective scan", mamba, f"{other}, {MAMBA_STATE} states each", same_maths=False, needs_cuda=True
        ),
    ]


def _first_gate(inputs: Inputs) -> torch.Tensor:
    """(B, T, D) pre-activations."""
    return inputs["gates"][:, :, 0].detach().flatten(2)
