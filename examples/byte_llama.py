"""A Llama-style language model over bytes, in plain PyTorch: the model that `narrowgauge demo` trains.

Nothing here knows of narrowgauge except `main`, which swaps the norms, trains for a moment on the source of
the standard library and lets the model write: `python -m narrowgauge.examples.byte_llama`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class Config:
    dim: int = 192
    layers: int = 4
    head_dim: int = 64
    norm_eps: float = 1e-5
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.dim < 1 or self.dim % self.head_dim:
            raise ValueError(
                f"dim is {self.dim}; it must be a positive multiple of head_dim, {self.head_dim}"
            )

    @property
    def hidden(self) -> int:
        """Width of the feed-forward: 8/3 of dim, rounded up to a multiple of 64."""
        return -(-8 * self.dim // (3 * 64)) * 64


def rotary_angles(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, `[length, head_dim / 2]`, of position times frequency."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (first half, second half) of the head dimension by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))


class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ByteLlama(nn.Module):
    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = config or Config()
        self.embedding = nn.Embedding(BYTES, self.config.dim)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(self.config.layers))
        self.norm = nn.RMSNorm(self.config.dim, eps=self.config.norm_eps)
        self.head = nn.Linear(self.config.dim, BYTES, bias=False)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes `[batch, length]` to the logits of the next byte, `[batch, length, 256]`."""
        config = self.config
        cos, sin = rotary_angles(tokens.shape[1], config.head_dim, config.rotary_base, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte, computed in float32."""
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def write(self, prompt: bytes, length: int, generator: torch.Generator | None = None) -> bytes:
        """Continues a prompt by sampling one byte at a time."""
        tokens = torch.tensor([list(prompt)], device=self.embedding.weight.device)
        for _ in range(length):
            probabilities = self(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        return bytes(tokens[0].tolist())


def main(steps: int = 20) -> float:
    import narrowgauge as ng
    from narrowgauge.examples.standard_library_text import Batches, standard_library_text

    torch.manual_seed(0)
    model = ByteLlama(Config(dim=64, layers=2))
    print(ng.swap(model))
    optimizer = ng.optim.AdamW(model.parameters(), lr=3e-3)
    batches = Batches(standard_library_text().train, steps, batch_size=8, length=64, seed=0)
    for step in range(steps):
        loss = model.loss(*batches[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after {steps} steps: {loss.item():.3f} nats per byte")
    print(model.write(b"def ", 60).decode(errors="replace"))
    return loss.item()


if __name__ == "__main__":
    main()
