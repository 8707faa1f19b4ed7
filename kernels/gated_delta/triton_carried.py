"""`gated_delta` in Triton, in the pieces that ranks which share sequences run between what they exchange."""

from dataclasses import dataclass

import torch

from riverrun.kernels.gated_delta.triton_op import _backward, _forward, adjoint

Inputs = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class CarriedGatedDelta:
    """Inputs: q, k, v, beta, g as `as_kernels_take` returns them; keys and queries are brought to unit length.

    Attributes:
        scale: of the outputs.
        exact: β may exceed 1.
    """

    scale: float
    exact: bool

    def summary(
        self, inputs: Inputs, cu_seqlens: torch.Tensor | None, with_transfer: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """→ the product of the transitions (S, H, K, K), if wanted, and the final states from zeros (S, H, K, V)."""
        _, k, v, beta, g = inputs
        assert k is not None and v is not None
        unread = k[:, :, 0].contiguous()  # queries
        _, added = _forward(unread, k, v, beta, g, self.scale, True, None, cu_seqlens, self.exact)
        if not with_transfer:
            return None, added
        nothing = v.new_zeros(k.shape)  # written to the identity, which becomes the transitions' product
        identity = torch.eye(k.shape[-1], device=k.device).expand(len(added), added.shape[1], -1, -1).contiguous()
        return _forward(unread, k, nothing, beta, g, self.scale, True, identity, cu_seqlens, self.exact)[1], added

    def run(self, inputs: Inputs, initial: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        return _forward(*inputs, self.scale, True, initial, cu_seqlens, self.exact)[0]

    def adjoint(self, grad: torch.Tensor, inputs: Inputs, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        q, k, v, beta, g = inputs
        return adjoint(grad, q, k, v, beta, g, self.scale, True, cu_seqlens, self.exact)  # type: ignore[arg-type]

    def gradients(
        self,
        grad: torch.Tensor,
        grad_final: torch.Tensor,
        inputs: Inputs,
        initial: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> Inputs:
        beta, g = inputs[3:]
        *grads, of_beta, of_g, _ = _backward(
            grad, grad_final, *inputs, self.scale, True, initial, cu_seqlens, self.exact
        )
        assert beta is not None
        return *grads, of_beta.to(beta.dtype), None if g is None else of_g

    def apply(self, transfer: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return transfer @ state

    def apply_adjoint(self, transfer: torch.Tensor, adjoint: torch.Tensor) -> torch.Tensor:
        return transfer.mT @ adjoint
