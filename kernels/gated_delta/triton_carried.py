"""`gated_delta` in Triton, for ranks that share sequences and exchange states on the way."""

from dataclasses import dataclass

import torch

from riverrun.kernels.common.self_check import is_due
from riverrun.kernels.gated_delta.triton_op import Exchange, check, delta, delta_backward

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

    def transfer(self, inputs: Inputs, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """→ the product of the transitions (S, H, K, K)."""
        _, k, v, beta, g = inputs
        assert k is not None and v is not None and beta is not None
        (B, _, _, H, K), unread = k.shape, k[:, :, 0].contiguous()  # queries
        nothing = v.new_zeros(k.shape)  # written to the identity, which becomes the transitions' product
        sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        identity = torch.eye(K, device=k.device).expand(sequences, H, -1, -1).contiguous()
        return delta(unread, k, nothing, beta, g, self.scale, True, identity, cu_seqlens, self.exact)[1]

    def run(self, inputs: Inputs, cu_seqlens: torch.Tensor | None, enter: Exchange) -> torch.Tensor:
        self._check(inputs, cu_seqlens, back=False)
        q, k, v, beta, g = inputs
        return delta(q, k, v, beta, g, self.scale, True, None, cu_seqlens, self.exact, enter=enter)[0]  # type: ignore[arg-type]

    def gradients(
        self,
        grad: torch.Tensor,
        inputs: Inputs,
        initial: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        leave: Exchange,
    ) -> Inputs:
        self._check(inputs, cu_seqlens, back=True)
        q, k, v, beta, g = inputs
        *grads, of_beta, of_g, _ = delta_backward(
            grad, None, q, k, v, beta, g, self.scale, True, initial, cu_seqlens, self.exact, leave=leave  # type: ignore[arg-type]
        )  # fmt: skip
        assert beta is not None
        return *grads, of_beta.to(beta.dtype), None if g is None else of_g

    def _check(self, inputs: Inputs, cu_seqlens: torch.Tensor | None, *, back: bool) -> None:
        _, k, v, _, g = inputs
        assert k is not None and v is not None
        if is_due(k):
            check(k, v, g is not None, True, True, cu_seqlens is not None, self.exact, back)

    def apply(self, transfer: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return transfer @ state

    def apply_adjoint(self, transfer: torch.Tensor, adjoint: torch.Tensor) -> torch.Tensor:
        return transfer.mT @ adjoint
