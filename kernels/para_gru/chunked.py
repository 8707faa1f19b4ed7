"""The ParaGRU cell for the shooting solver: its steps, its Jacobian and its vector-Jacobian product, without autograd.

With s' = s(1 − s) for the sigmoids, and u the pre-activations, the step's derivatives are

    ∂h/∂u_z = (n − h₋) z',    ∂h/∂u_n = z (1 − n²),    ∂h/∂u_r = ∂h/∂u_n · a_n h₋ r',
    ∂h/∂h₋  = (1 − z) + a_z ∂h/∂u_z + a_r ∂h/∂u_r + a_n r ∂h/∂u_n.
"""

import torch

from riverrun.kernels.common.shooting import Jacobian, States, define_op


class ParaGRUCell:
    """State h; gates z, r, n."""

    num_states = 1

    def run(self, start: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor, states: States) -> None:
        h, a_zr, a_n = start[:, 0], weight[:2], weight[2]
        for u_zr, u_n, out in zip(gates[:, :, :2].unbind(1), gates[:, :, 2].unbind(1), states[0].unbind(1)):
            z, r = torch.addcmul(u_zr, a_zr, h[:, None]).sigmoid_().unbind(1)
            n = torch.addcmul(u_n, a_n, r.mul_(h)).tanh_()
            h = torch.lerp(h, n, z, out=out)

    def linearise(
        self, before: States, gates: torch.Tensor, after: States, weight: torch.Tensor
    ) -> tuple[Jacobian, torch.Tensor, torch.Tensor]:
        (h,), (a_z, a_r, a_n) = before, weight
        z, r = torch.addcmul(gates[..., :2, :], weight[:2], h[..., None, :]).sigmoid_().unbind(-2)
        rh = r * h
        n = torch.addcmul(gates[..., 2, :], a_n, rh).tanh_()
        by_gates = torch.empty_like(gates)
        by_z, by_r, by_n = by_gates.unbind(-2)
        torch.mul(n - h, z - z * z, out=by_z)
        torch.addcmul(z, z, n.square_(), value=-1, out=by_n)
        torch.mul(by_n * a_n, torch.addcmul(rh, r, rh, value=-1), out=by_r)
        J = (1 - z).addcmul_(by_z, a_z).addcmul_(by_r, a_r).addcmul_(by_n * a_n, r)
        return [[J]], by_gates, rh

    def gradients(
        self, adjoint: States, before: States, after: States, by_gates: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad = by_gates.mul_(adjoint[0][:, None])
        times = (before[0], before[0], factor)  # h₋, h₋, r h₋
        return grad, torch.stack([(g * x).sum(0) for g, x in zip(grad.unbind(1), times)])


para_gru_chunked = define_op("para_gru", ParaGRUCell())
