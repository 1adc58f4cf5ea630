"""Small models with the attribute names of model libraries, written for the tests of conversions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, biases and norm weights included, in float64 and for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
                module.weight.add_(1.0)
    return model


class Conv1D(nn.Module):
    """A linear layer with its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    b, t, d = q.shape
    q, k, v = (each.view(b, t, heads, -1).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(b, t, d)


class GPT2Attention(nn.Module):
    def __init__(self, d: int, heads: int, p: float) -> None:
        super().__init__()
        self.d, self.heads = d, heads
        self.c_attn, self.c_proj = Conv1D(3 * d, d), Conv1D(d, d)
        self.attn_dropout, self.resid_dropout = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(self.d, -1)
        return self.resid_dropout(self.c_proj(attend(q, k, v, self.heads, causal=True)))


class GPT2MLP(nn.Module):
    def __init__(self, d: int, p: float) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act, self.dropout = (
            Conv1D(4 * d, d),
            Conv1D(d, 4 * d),
            nn.GELU(),
            nn.Dropout(p),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GPT2Block(nn.Module):
    def __init__(self, d: int, heads: int, p: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(d), GPT2Attention(d, heads, p)
        self.ln_2, self.mlp = nn.LayerNorm(d), GPT2MLP(d, p)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = x + self.attn(self.ln_1(x))
        return (x + self.mlp(self.ln_2(x)),)


class GPT2Model(nn.Module):
    def __init__(self, vocabulary: int, d: int, depth: int, heads: int, p: float) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(vocabulary, d), nn.Embedding(16, d), nn.Dropout(p)
        self.h = nn.ModuleList(GPT2Block(d, heads, p) for _ in range(depth))
        self.ln_f = nn.LayerNorm(d)
        self.streams: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1])))
        self.streams = [x]
        for block in self.h:
            (x,) = block(x)
            self.streams.append(x)
        return self.ln_f(x)


class Config:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class GPT2LMHeadModel(nn.Module):
    def __init__(
        self,
        vocabulary: int = 19,
        d: int = 12,
        depth: int = 2,
        heads: int = 3,
        tied: bool = True,
        p: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = Config(tie_word_embeddings=tied)
        self.transformer = GPT2Model(vocabulary, d, depth, heads, p)
        self.lm_head = nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.transformer(tokens))


class NanoLayerNorm(nn.Module):
    """A LayerNorm with an optional bias, as nanoGPT has."""

    def __init__(self, d: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class LayerScale(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmAttention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj, self.proj_drop = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(attend(*self.qkv(x).chunk(3, -1), self.heads, causal=False)))


class TimmMlp(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop2 = (
            nn.Linear(d, 2 * d),
            nn.GELU(),
            nn.Linear(2 * d, d),
            nn.Dropout(0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.act(self.fc1(x))))


class TimmBlock(nn.Module):
    def __init__(self, d: int, heads: int, scale: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(d), TimmAttention(d, heads), nn.Identity()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(d), TimmMlp(d), nn.Identity()
        if scale:
            self.ls1, self.ls2 = LayerScale(d), LayerScale(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PostNormBlock(TimmBlock):
    """The same names, but the norms stand at the end of the branches."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.norm1(self.attn(x)))
        return x + self.ls2(self.norm2(self.mlp(x)))


class PatchEmbed(nn.Module):
    def __init__(self, d: int, norm: bool) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, d, 4, 4), nn.LayerNorm(d) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class TimmVisionTransformer(nn.Module):
    def __init__(
        self,
        d: int = 12,
        depth: int = 2,
        heads: int = 3,
        *,
        scale: bool = False,
        pre_norm: bool = False,
        patch_norm: bool = False,
        average: bool = False,
        distilled: bool = False,
        block: type[TimmBlock] = TimmBlock,
    ) -> None:
        super().__init__()
        self.average = average
        self.patch_embed = PatchEmbed(d, patch_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, d)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 4 + 1 + distilled, d))
        self.pos_drop, self.norm_pre = nn.Dropout(0.0), nn.LayerNorm(d) if pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(block(d, heads, scale) for _ in range(depth)))
        self.norm = nn.Identity() if average else nn.LayerNorm(d, 1e-6)
        self.fc_norm = nn.LayerNorm(d, 1e-6) if average else nn.Identity()
        self.head_drop, self.head = nn.Dropout(0.5), nn.Linear(d, 7)
        self.head_dist = nn.Linear(d, 7) if distilled else None

    def forward(self, images: Tensor) -> Tensor:
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        x = self.patch_embed(images)
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], 1) + self.pos_embed
        self.streams = [self.norm_pre(self.pos_drop(x))]
        for block in self.blocks:
            self.streams.append(block(self.streams[-1]))
        x = self.norm(self.streams[-1])
        y = self.head(self.head_drop(self.fc_norm(x[:, 1:].mean(1) if self.average else x[:, 0])))
        return y if self.head_dist is None else (y + self.head_dist(x[:, 1])) / 2


def module(**children: Any) -> nn.Module:
    """A module of named children."""
    parent = nn.Module()
    for name, child in children.items():
        setattr(parent, name, child)
    return parent


class HFViTLayer(nn.Module):
    def __init__(self, d: int, heads: int, dino: bool) -> None:
        super().__init__()
        self.heads, self.dino = heads, dino
        projections = module(query=nn.Linear(d, d), key=nn.Linear(d, d), value=nn.Linear(d, d))
        self.attention = module(
            attention=projections, output=module(dense=nn.Linear(d, d), dropout=nn.Dropout(0.1))
        )
        if dino:
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.layer_scale1, self.layer_scale2 = LayerScale1(d), LayerScale1(d)
            self.mlp = module(fc1=nn.Linear(d, 2 * d), fc2=nn.Linear(2 * d, d))
        else:
            self.layernorm_before, self.layernorm_after = nn.LayerNorm(d), nn.LayerNorm(d)
            self.intermediate = module(dense=nn.Linear(d, 2 * d))
            self.output = module(dense=nn.Linear(2 * d, d), dropout=nn.Dropout(0.1))

    def _attention(self, x: Tensor) -> Tensor:
        inner = self.attention.attention
        y = attend(inner.query(x), inner.key(x), inner.value(x), self.heads, causal=False)
        return self.attention.output.dropout(self.attention.output.dense(y))

    def forward(self, x: Tensor) -> Tensor:
        if self.dino:
            x = x + self.layer_scale1(self._attention(self.norm1(x)))
            return x + self.layer_scale2(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))
        x = x + self._attention(self.layernorm_before(x))
        hidden = F.gelu(self.intermediate.dense(self.layernorm_after(x)))
        return x + self.output.dropout(self.output.dense(hidden))


class LayerScale1(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class HFViTEmbeddings(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.cls_token, self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, d)),
            nn.Parameter(torch.zeros(1, 1, d)),
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, 5, d))
        self.patch_embeddings, self.dropout = module(projection=nn.Conv2d(3, d, 4, 4)), nn.Dropout(0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embeddings.projection(images).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :1] * 0 + self.mask_token, x[:, 1:]], 1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.dropout(x + self.position_embeddings)


class HFViT(nn.Module):
    def __init__(self, d: int = 12, depth: int = 2, heads: int = 3, dino: bool = False) -> None:
        super().__init__()
        self.vit = module(
            embeddings=HFViTEmbeddings(d),
            encoder=module(layer=nn.ModuleList(HFViTLayer(d, heads, dino) for _ in range(depth))),
            layernorm=nn.LayerNorm(d),
        )
        self.classifier = nn.Linear(d, 7)

    def forward(self, images: Tensor) -> Tensor:
        self.streams = [self.vit.embeddings(images)]
        for layer in self.vit.encoder.layer:
            self.streams.append(layer(self.streams[-1]))
        return self.classifier(self.vit.layernorm(self.streams[-1])[:, 0])
