"""Training-side network: a plain Qwen3/SDAR in torch, with the two-stream attention of block diffusion.

Parameter names are those of the Hugging Face checkpoint, so exporting is a plain copy. One pass encodes a document
once and many *segments* with it. A segment holds one question: first its clean blocks, then noisy copies of its answer
block. A segment sees the whole document and itself, never another question.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16


@dataclass
class Shape:
    """Sizes of the network; the field names are those of the exported config.json."""

    vocab_size: int = 1637
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e8
    rms_norm_eps: float = 1e-6

    def dict(self) -> dict:
        """The fields as a plain dictionary."""
        return asdict(self)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm computed in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class RMSNorm(nn.Module):
    """Holds the gain of an RMSNorm."""

    def __init__(self, size: int, eps: float, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` to unit root mean square, then by the learned gain."""
        return rms_norm(x, self.weight, self.eps)


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [..., 1, dim] for integer positions [...]."""
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = positions.float()[..., None] * inverse
    angles = torch.cat((angles, angles), -1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Neox-style rotary embedding."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * rope[0] + turned * rope[1]


def norm_to(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm, cast for the matrix products."""
    return rms_norm(x, weight, eps).to(dtype)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Per-head RMSNorm of queries or keys, then rotary embedding."""
    return rotate(rms_norm(x, weight, eps), (cos, sin)).to(x.dtype)


def gate_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's elementwise half."""
    return F.silu(gate) * up


def compile_pieces() -> None:
    """Fuse the elementwise pieces; they are memory-bound and would otherwise take most of a training step."""
    global norm_to, norm_rotate, gate_mul
    torch._dynamo.config.recompile_limit = 64  # one version per shape of the curriculum
    norm_to, norm_rotate, gate_mul = (torch.compile(f, dynamic=False) for f in (norm_to, norm_rotate, gate_mul))


class SegmentAttention(torch.autograd.Function):
    """Attention of segments over (document, own segment) without copying the document's keys per segment.

    Both parts run through the fused kernel and are merged by their log-sum-exp. The backward pass hands the merged
    output and log-sum-exp to the fused backward of each part, which then yields that part's share of the gradient.
    """

    @staticmethod
    def forward(ctx, q, k_doc, v_doc, k_own, v_own, mask):
        """q [B,n,S,H,D]; k_doc/v_doc [B,G,T,D]; k_own/v_own [B,n,S,G,D]; mask [B,n,S,S] additive -> like q."""
        B, n, S, H, D = q.shape
        G = k_doc.shape[1]
        scale = D**-0.5
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        # the document part needs no mask: the query heads of a group and all segments are rows of one big query
        q_doc = q.reshape(B, n * S, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * n * S, D)
        o_doc, l_doc = flash(q_doc, k_doc, v_doc, 0.0, False, scale=scale)
        q_own = q.reshape(B * n, S, H, D).transpose(1, 2)
        repeat = H // G
        ko = k_own.reshape(B * n, S, G, D).transpose(1, 2).repeat_interleave(repeat, 1)
        vo = v_own.reshape(B * n, S, G, D).transpose(1, 2).repeat_interleave(repeat, 1)
        mask = mask.reshape(B * n, 1, S, S)
        o_own, l_own = flash(q_own, ko, vo, 0.0, False, attn_mask=mask, scale=scale)
        l_own = l_own.reshape(B * n, H, S) if l_own.shape[1] == H else l_own.transpose(1, 2)
        l_doc = l_doc.reshape(B, G, -1) if l_doc.shape[1] == G else l_doc.transpose(1, 2)

        # bring the own part to the document part's layout and merge
        def to_doc(x):
            return x.reshape(B, n, G, repeat, S, -1).permute(0, 2, 3, 1, 4, 5).reshape(B, G, repeat * n * S, -1)

        o_own2, l_own2 = to_doc(o_own), to_doc(l_own.unsqueeze(-1)).squeeze(-1)
        l_all = torch.logaddexp(l_doc, l_own2)
        share_doc, share_own = (l_doc - l_all).exp().unsqueeze(-1), (l_own2 - l_all).exp().unsqueeze(-1)
        out = (o_doc.float() * share_doc + o_own2.float() * share_own).to(q.dtype)
        ctx.save_for_backward(q_doc, k_doc, v_doc, q_own, ko, vo, mask, out, l_all)
        ctx.sizes = (B, n, S, H, G, D)
        return out.reshape(B, G, repeat, n, S, D).permute(0, 3, 4, 1, 2, 5).reshape(B, n, S, H, D)

    @staticmethod
    def backward(ctx, grad):
        """Gradients through the fused backward of both parts with the merged statistics."""
        q_doc, k_doc, v_doc, q_own, ko, vo, mask, out, l_all = ctx.saved_tensors
        B, n, S, H, G, D = ctx.sizes
        repeat, scale = H // G, D**-0.5
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad = grad.to(out.dtype)
        g_doc = grad.reshape(B, n * S, G, repeat, D).permute(0, 2, 3, 1, 4).reshape(B, G, repeat * n * S, D)
        dq1, dk1, dv1 = back(g_doc, q_doc, k_doc, v_doc, out, l_all, 0.0, False, scale=scale)

        def to_own(x):
            return x.reshape(B, G, repeat, n, S, -1).permute(0, 3, 1, 2, 4, 5).reshape(B * n, H, S, -1)

        # the own part is small tiles, for which plain matrix products beat the fused backward
        o_own, g_own = to_own(out), to_own(g_doc)
        p = torch.matmul(q_own, ko.transpose(-1, -2)).float().mul_(scale).add_(mask)
        p = p.sub_(to_own(l_all.unsqueeze(-1))).exp_()
        delta = (g_own.float() * o_own.float()).sum(-1, keepdim=True)
        ds = torch.matmul(g_own, vo.transpose(-1, -2)).float().sub_(delta).mul_(p).mul_(scale).to(q_own.dtype)
        dv2 = torch.matmul(p.to(q_own.dtype).transpose(-1, -2), g_own)
        dq2, dk2 = torch.matmul(ds, ko), torch.matmul(ds.transpose(-1, -2), q_own)
        dq1 = dq1.reshape(B, G, repeat, n, S, D).permute(0, 3, 4, 1, 2, 5).reshape(B, n, S, H, D)
        dq = dq1 + dq2.reshape(B, n, H, S, D).transpose(2, 3)
        dk2 = dk2.reshape(B, n, G, repeat, S, D).sum(3).permute(0, 1, 3, 2, 4)
        dv2 = dv2.reshape(B, n, G, repeat, S, D).sum(3).permute(0, 1, 3, 2, 4)
        return dq, dk1, dv1, dk2, dv2, None


class Attention(nn.Module):
    """Grouped-query attention with per-head RMSNorm on q and k."""

    def __init__(self, shape: Shape, gain: float):
        super().__init__()
        h, d = shape.hidden_size, shape.head_dim
        self.shape = shape
        self.q_proj = nn.Linear(h, shape.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(h, shape.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(h, shape.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * d, h, bias=False)
        self.q_norm = RMSNorm(d, shape.rms_norm_eps, gain)
        self.k_norm = RMSNorm(d, shape.rms_norm_eps, gain)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [B, T + n*S, hidden]: document tokens first, then the segments."""
        B, N, _ = x.shape
        H, G, D = self.shape.num_attention_heads, self.shape.num_key_value_heads, self.shape.head_dim
        q = F.linear(x, self.q_proj.weight.to(x.dtype)).view(B, N, H, D)
        k = F.linear(x, self.k_proj.weight.to(x.dtype)).view(B, N, G, D)
        q = norm_rotate(q, self.q_norm.weight, self.q_norm.eps, *layout.rope)
        k = norm_rotate(k, self.k_norm.weight, self.k_norm.eps, *layout.rope)
        v = F.linear(x, self.v_proj.weight.to(x.dtype)).view(B, N, G, D)
        T, n, S = layout.doc, layout.segments, layout.length
        k_doc, v_doc = k[:, :T].transpose(1, 2), v[:, :T].transpose(1, 2)
        parts = []
        if T:
            doc = F.scaled_dot_product_attention(
                q[:, :T].transpose(1, 2),
                k_doc.repeat_interleave(H // G, 1),
                v_doc.repeat_interleave(H // G, 1),
                attn_mask=layout.doc_mask,
            )
            parts.append(doc.transpose(1, 2))
        if n:
            own = SegmentAttention.apply(
                q[:, T:].view(B, n, S, H, D),
                k_doc.contiguous(),
                v_doc.contiguous(),
                k[:, T:].view(B, n, S, G, D),
                v[:, T:].view(B, n, S, G, D),
                layout.segment_mask,
            )
            parts.append(own.reshape(B, n * S, H, D))
        out = torch.cat(parts, 1).reshape(B, N, H * D)
        return F.linear(out, self.o_proj.weight.to(x.dtype))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gated feed-forward."""
        gate, up = F.linear(x, self.gate_proj.weight.to(x.dtype)), F.linear(x, self.up_proj.weight.to(x.dtype))
        return F.linear(gate_mul(gate, up), self.down_proj.weight.to(x.dtype))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape, gain: float):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, gain)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention, then feed-forward, each on a residual."""
        norm = self.input_layernorm
        x = x + self.self_attn(norm_to(x, norm.weight, norm.eps, layout.dtype), layout)
        norm = self.post_attention_layernorm
        return x + self.mlp(norm_to(x, norm.weight, norm.eps, layout.dtype))


@dataclass
class Layout:
    """Where document and segments lie in the token dimension, and who may see whom."""

    doc: int
    segments: int
    length: int
    rope: tuple[Tensor, Tensor]
    doc_mask: Tensor | None
    segment_mask: Tensor | None
    dtype: torch.dtype


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean visibility to an additive mask."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def block_causal(length: int, dtype: torch.dtype) -> Tensor:
    """Document mask: position i sees j iff block(j) <= block(i)."""
    block = torch.arange(length) // BLOCK
    return additive(block[None, :] <= block[:, None], dtype)


def segment_visibility(block: Tensor, instance: Tensor, clean: Tensor) -> Tensor:
    """Visibility inside segments [..., S, S]: earlier clean blocks, and the own instance of the own block."""
    earlier = clean[..., None, :] & (block[..., None, :] < block[..., :, None])
    return earlier | (instance[..., None, :] == instance[..., :, None])


class Body(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, shape: Shape, gain: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, gain) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Network(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape, gain: float = 1.5, mimetic: float = 1.0, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.model = Body(shape, gain)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.initialise(mimetic)

    @torch.no_grad()
    def initialise(self, mimetic: float) -> None:
        """Random weights, with content matching and value copying built in after the first layer.

        There each query head starts as a noisy copy of its group's key projection, so a query finds keys whose
        content is alike, and the output projection starts as a transpose of the value projection, so the values found
        are copied. Without this the search for the right key takes long to begin.
        """
        shape, depth = self.shape, self.shape.num_hidden_layers
        h, d = shape.hidden_size, shape.head_dim
        H, G = shape.num_attention_heads, shape.num_key_value_heads
        scale = 0.02
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=scale)
        for layer in self.model.layers:
            for p in (layer.self_attn.o_proj, layer.mlp.down_proj):
                p.weight.mul_((2 * depth) ** -0.5)
        if not mimetic:
            return
        embedding = self.model.embed_tokens.weight
        nn.init.normal_(embedding, std=0.1)
        common = torch.nn.functional.normalize(torch.randn(h), dim=0)
        embedding.sub_((embedding @ common)[:, None] * common)
        self.lm_head.weight.copy_(0.3 * embedding)
        embedding.add_(0.1 * h**0.5 * common)
        for index, layer in enumerate(self.model.layers):
            attn = layer.self_attn
            if index == 0:
                self.look_back(attn, common)
            else:
                k = attn.k_proj.weight
                k.sub_((k @ common)[:, None] * common)
                noise = torch.randn(G, H // G, d, h) * scale
                mixed = mimetic * k.view(G, 1, d, h) + (1 - mimetic**2) ** 0.5 * noise
                attn.q_proj.weight.copy_(mixed.reshape(H * d, h))
            if index < 3:
                values = attn.v_proj.weight.view(G, 1, d, h).expand(G, H // G, d, h).reshape(H * d, h)
                attn.o_proj.weight.copy_(values.T)

    @torch.no_grad()
    def look_back(self, attn: Attention, common: Tensor) -> None:
        """Give the first layer's heads a view of the tokens just before, near and farther, by rotary phase alone.

        All embeddings share one direction. Keys read it into a few rotary frequencies; a query reads it into the same
        frequencies turned by the wished distance, so the score peaks there.
        """
        shape = self.shape
        d, half = shape.head_dim, shape.head_dim // 2
        repeat = shape.num_attention_heads // shape.num_key_value_heads
        speed = shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        strength = 0.02 * shape.hidden_size**0.5
        bands = [(0.03, 1.1), (0.015, 0.25)]
        distances = [1.0, 3.0, 4.0, 9.0]
        for head in range(shape.num_attention_heads):
            group = head // repeat
            low, high = bands[group % 2]
            used = ((speed >= low) & (speed <= high)).float()
            used *= (half / used.sum()) ** 0.5
            # q(i) k(j) peaks where i - j = distance: turn the query back by `distance` positions
            angle = -distances[head % 4] * speed
            turned = torch.cat((used * angle.cos(), used * angle.sin()))
            flat = torch.cat((used, torch.zeros(half)))
            attn.q_proj.weight[head * d : (head + 1) * d].add_(strength * turned[:, None] * common)
            if head % repeat == 0:
                attn.k_proj.weight[group * d : (group + 1) * d].add_(strength * flat[:, None] * common)

    def hidden(self, ids: Tensor, layout: Layout) -> Tensor:
        """Final hidden states."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, layout)
        return self.model.norm(x)

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Scores over the vocabulary in fp32."""
        return F.linear(hidden.to(dtype), self.lm_head.weight.to(dtype)).float()
