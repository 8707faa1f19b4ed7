"""ParaLSTM."""
import torch
from riverrun.kernels.common.chunks import sequence_bounds
def _steps(gates, weight, peephole, s):
    c,h=s.unbind(1); out=[]; a_f,a_o,a_c=weight; c_f,c_o=peephole
    for u in gates.unbind(1):
        uf,uo,uc=u.unbind(-2)
        f=torch.sigmoid(a_f*h+c_f*c+uf); q=torch.tanh(a_c*h+uc); c=f*c+(1-f)*q; o=torch.sigmoid(a_o*h+c_o*c+uo); h=o*torch.tanh(c); out.append(h)
    return torch.stack(out,1), torch.stack([c,h],1)
def para_lstm(gates, weight, peephole, *, initial_state=None, cu_seqlens=None, backend="auto", chunk_size=None, tolerance=1e-5):
    dt=torch.promote_types(gates.dtype, torch.float32); S=gates.shape[0] if cu_seqlens is None else len(cu_seqlens)-1
    s=gates.new_zeros(S,2,gates.shape[-1],dtype=dt) if initial_state is None else initial_state.to(dt)
    g=gates.to(dt); w=weight.to(dt); p=peephole.to(dt)
    if cu_seqlens is None:
        h,f=_steps(g,w,p,s); return h.to(gates.dtype),f
    b=sequence_bounds(gates,cu_seqlens).tolist(); r=[_steps(g[:,b[i]:b[i+1]],w,p,s[i:i+1]) for i in range(S)]
    return torch.cat([a for a,_ in r],1).to(gates.dtype), torch.cat([b_ for _,b_ in r])
