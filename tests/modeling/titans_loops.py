"""Titans' three blocks one token at a time, from their parameters alone: the definition that the mixers are tested
against. Nothing of theirs is used, the inner gradient is autograd's, and one sequence is a list of tokens."""

import torch
from torch.nn import functional as F


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x, position, theta):
    """x (H, D): channels i and i + D / 2 are a complex number that turns by the position. Angles are float32."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-2 * torch.arange(half) / x.shape[-1])
    z = torch.complex(x[:, :half], x[:, half:]) * torch.complex(angle.cos().to(x), angle.sin().to(x))
    return torch.cat([z.real, z.imag], dim=-1)


def attention(q, keys, values):
    """q (H, D) of one token, and lists of (H, D) that it sees."""
    k, v = torch.stack(keys, 1), torch.stack(values, 1)
    scores = (k @ q[..., None]).squeeze(-1) / q.shape[-1] ** 0.5
    return (scores.softmax(-1)[..., None] * v).sum(1)


class Conv:
    """A depthwise convolution and SiLU of a stream of tokens (H · D,)."""

    def __init__(self, weight):
        self.weight, self.past = weight, [torch.zeros_like(weight[:, 0])] * (weight.shape[1] - 1)

    def __call__(self, x):
        taken = [*self.past, x]
        self.past = taken[1:]
        return F.silu(sum(w * t for w, t in zip(self.weight.unbind(1), taken)))


class Memory:
    """f(x) = x + γ LN(gelu(x W₁) W₂), or x W; with momentum, gates of heads and no cap of θ. Chunks have one anchor."""

    def __init__(self, params, options):
        self.p = {name.removeprefix("memory."): p for name, p in params.items() if name.startswith("memory.")}
        self.o = options
        self.W = [self.p[f"memory_{i}"] for i in range(options.depth)]
        self.S = [torch.zeros_like(w) for w in self.W]
        self.anchor, self.written = self.W, 0
        self.convs = self.fresh_convs()

    def fresh_convs(self):
        return {name: Conv(self.p[f"{name}_conv.weight"]) for name in "qkv"}

    def heads(self, name, x, convs=None):
        y = (convs or self.convs)[name](self.p[f"{name}_proj.weight"] @ x).view(self.o.num_heads, -1)
        return y if name == "v" else unit(y)

    def read(self, q, W=None):
        W = W or self.W
        if len(W) == 1:
            return torch.einsum("hk,hkv->hv", q, W[0])
        z = F.gelu(torch.einsum("hk,hkf->hf", q, W[0]))
        u = torch.einsum("hf,hfv->hv", z, W[1])
        u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-2).sqrt()
        return q + u * self.p["norm_gain"]

    def write(self, x, convs=None, chunk=None):
        """Of one token's x (hidden_size,)."""
        if self.written % (chunk or self.o.chunk_size) == 0:
            self.anchor = self.W
        self.written += 1
        k, v = self.heads("k", x, convs), self.heads("v", x, convs)
        gate = {
            name: self.p[f"{name}_proj.weight"] @ x + self.p[f"{name}_bias"][0] for name in ("alpha", "theta", "eta")
        }
        alpha, eta = gate["alpha"].sigmoid(), gate["eta"].sigmoid()
        theta = gate["theta"].sigmoid()
        # as they are in the loss, and not in x, which may have been read from them
        at = [w.view_as(w) if w.requires_grad else w.clone().requires_grad_() for w in self.anchor]
        loss = (self.read(k, at) - v).square().sum() / 2
        gradients = torch.autograd.grad(loss, at, create_graph=True)
        column = (slice(None), None, None)
        self.S = [eta[column] * s - theta[column] * g for s, g in zip(self.S, gradients)]
        self.W = [(1 - alpha)[column] * w + s for w, s in zip(self.W, self.S)]

    def begin(self, persistent):
        """A sequence: persistent tokens are a chunk of their own, and convolutions do not look back at them."""
        convs = self.fresh_convs()
        for x in persistent:
            self.write(x, convs, chunk=len(persistent))
        self.written = 0

    def __call__(self, x):
        """Learns, and is asked: (H, D)."""
        q = self.heads("q", x)
        self.write(x)
        return self.read(q)


def finish(p, o, x, y, m=None):
    """What a block makes of what attention says, y (H, D), and of what its memory does."""
    out = rms(y, p["attention_norm_weight"], o.norm_eps)
    if o.output_gate:
        out = out * F.silu(p["g_proj.weight"] @ x).view_as(out)
    if m is not None:
        out = out * rms(m, p["norm_weight"], o.norm_eps).sigmoid()
    return p["o_proj.weight"] @ out.flatten()


def split(weight, x, o):
    return (weight @ x).view(o.num_heads, -1)


def rotated(x, t, o):
    return turn(x, t, o.rope_theta) if o.rope else x


def mag(p, o, tokens):
    memory, persistent = Memory(p, o), p.get("persistent", ())
    memory.begin(persistent)
    keys, values, outputs = [], [], []
    shown = [[split(p[f"{name}_proj.weight"], x, o) for x in persistent] for name in "kv"]
    for t, x in enumerate(tokens):
        keys.append(rotated(split(p["k_proj.weight"], x, o), t, o))
        values.append(split(p["v_proj.weight"], x, o))
        q, near = rotated(split(p["q_proj.weight"], x, o), t, o), slice(max(0, t + 1 - o.attention_window), None)
        y = attention(q, shown[0] + keys[near], shown[1] + values[near])
        outputs.append(finish(p, o, x, y, memory(x)))
    return torch.stack(outputs)


def mal(p, o, tokens):
    memory = Memory(p, o)
    memory.begin(p.get("persistent", ()))
    keys, values, outputs = [], [], []
    shown = [list(p[f"persistent_{name}"].unbind(1)) if o.num_persistent else [] for name in "kv"]
    for t, x in enumerate(tokens):
        m = rms(memory(x), p["norm_weight"], o.norm_eps)
        q, k, v = (torch.einsum("hd,hde->he", m, p[f"{name}_weight"]) for name in "qkv")
        keys.append(rotated(k, t, o))
        values.append(v)
        near = slice(max(0, t + 1 - o.attention_window), None)
        y = attention(rotated(q, t, o), shown[0] + keys[near], shown[1] + values[near])
        outputs.append(finish(p, o, x, y))
    return torch.stack(outputs)


def mac(p, o, tokens):
    memory, persistent = Memory(p, o), p.get("persistent", ())
    over_x = Conv(p["memory.q_conv.weight"])
    shown = [[split(p[f"{name}_proj.weight"], x, o) for x in persistent] for name in "kv"]
    outputs = []
    for t, x in enumerate(tokens):
        if t % o.segment == 0:
            found, keys, values, h_keys, h_values = memory.W, [], [], [], []
        asked = unit(over_x(p["memory.q_proj.weight"] @ x).view(o.num_heads, -1))
        h = rms(memory.read(asked, found), p["h_norm_weight"], o.norm_eps)
        h_keys.append(torch.einsum("hd,hde->he", h, p["h_k_weight"]))
        h_values.append(torch.einsum("hd,hde->he", h, p["h_v_weight"]))
        keys.append(rotated(split(p["k_proj.weight"], x, o), t, o))
        values.append(split(p["v_proj.weight"], x, o))
        q = rotated(split(p["q_proj.weight"], x, o), t, o)
        y = attention(q, shown[0] + h_keys + keys, shown[1] + h_values + values)
        stream = rms(p["y_proj.weight"] @ y.flatten(), p["y_norm.weight"], 1e-6)
        outputs.append(finish(p, o, x, y, memory(stream)))
    return torch.stack(outputs)
