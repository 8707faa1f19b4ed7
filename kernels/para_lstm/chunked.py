"""The ParaLSTM cell for the shooting solver: its steps, its Jacobian and its vector-Jacobian product, without autograd.

With s' = s(1 − s) for the sigmoids, q = tanh(a_c h₋ + u_c), and u the pre-activations, the step's derivatives are

    ∂c/∂u_f = (c₋ − q) f',    ∂c/∂u_c = (1 − f)(1 − q²),    ∂h/∂u_o = tanh(c) o',
    ∂h/∂c   = o (1 − tanh²c) + c_o ∂h/∂u_o =: κ,
    ∂c/∂c₋  = f + c_f ∂c/∂u_f,                 ∂c/∂h₋ = a_f ∂c/∂u_f + a_c ∂c/∂u_c,
    ∂h/∂c₋  = κ ∂c/∂c₋,                        ∂h/∂h₋ = κ ∂c/∂h₋ + a_o ∂h/∂u_o.
"""

import torch

from riverrun.kernels.common.shooting import Jacobian, States, define_op


class ParaLSTMCell:
    """States c, h; gates f, o, c; weight (5, D): a_f, a_o, a_c and the peepholes c_f, c_o."""

    num_states = 2

    def run(self, start: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor, states: States) -> None:
        (c, h), a, c_f, c_o = start.unbind(1), weight[:3], weight[3], weight[4]
        for u, out_c, out_h in zip(gates.unbind(1), states[0].unbind(1), states[1].unbind(1)):
            f, o, q = torch.addcmul(u, a, h[:, None]).unbind(1)
            f.addcmul_(c_f, c).sigmoid_()
            c = torch.lerp(q.tanh_(), c, f, out=out_c)
            o.addcmul_(c_o, c).sigmoid_()
            h = torch.mul(o, c.tanh(), out=out_h)

    def linearise(
        self, before: States, gates: torch.Tensor, after: States, weight: torch.Tensor
    ) -> tuple[Jacobian, torch.Tensor, torch.Tensor]:
        (old_c, old_h), (c, _) = before, after
        a_f, a_o, a_c, c_f, c_o = weight
        f, o, q = torch.addcmul(gates, weight[:3], old_h[..., None, :]).unbind(-2)
        f.addcmul_(c_f, old_c).sigmoid_()
        o.addcmul_(c_o, c).sigmoid_()
        q.tanh_()
        tanh_c = c.tanh()
        by_gates = torch.empty_like(gates)
        by_f, by_o, by_c = by_gates.unbind(-2)
        torch.mul(old_c - q, f - f * f, out=by_f)
        torch.mul(1 - f, 1 - q * q, out=by_c)
        torch.mul(tanh_c, o - o * o, out=by_o)
        h_by_c = torch.addcmul(o, o, tanh_c.square_(), value=-1).addcmul_(by_o, c_o)
        J_cc = torch.addcmul(f, by_f, c_f)
        J_ch = (by_f * a_f).addcmul_(by_c, a_c)
        J_hh = (by_o * a_o).addcmul_(h_by_c, J_ch)
        return [[J_cc, J_ch], [h_by_c * J_cc, J_hh]], by_gates, h_by_c

    def gradients(
        self, adjoint: States, before: States, after: States, by_gates: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (mu_c, mu_h), (old_c, old_h) = adjoint, before
        f, o, c = by_gates.unbind(1)
        total_c = torch.addcmul(mu_c, factor, mu_h)  # factor: ∂h/∂c
        f.mul_(total_c)
        o.mul_(mu_h)
        c.mul_(total_c)
        pairs = [(f, old_h), (o, old_h), (c, old_h), (f, old_c), (o, after[0])]
        return by_gates, torch.stack([(g * x).sum(0) for g, x in pairs])


para_lstm_chunked = define_op("para_lstm", ParaLSTMCell())
