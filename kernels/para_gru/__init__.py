"""ParaGRU."""
import torch
from riverrun.kernels.para_gru.reference import para_gru_reference
def para_gru(gates, weight, *, initial_state=None, cu_seqlens=None, backend="auto", chunk_size=None, tolerance=1e-5):
    dt=torch.promote_types(gates.dtype, torch.float32); S=gates.shape[0] if cu_seqlens is None else len(cu_seqlens)-1
    s=gates.new_zeros(S,gates.shape[-1],dtype=dt) if initial_state is None else initial_state.to(dt)
    h,f=para_gru_reference(gates.to(dt),weight.to(dt),s,cu_seqlens); return h.to(gates.dtype),f
