"""SeeDNorm (arXiv 2510.22777): an RMSNorm whose scale depends on the token.

    y = (tanh(x . beta) * alpha + gamma) * x / sqrt(mean(x^2) + eps)

In plain PyTorch: there is no code of the authors to compare with, and a kernel waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narrowgauge.norm import _arguments
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.norm.rms_norm import rms_norm
from narrowgauge.ops import checks
from narrowgauge.ops.system import system


def seed_norm(x: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, eps: float = 1e-6) -> Tensor:
    """``(tanh(x . beta) * alpha + gamma) * rms_norm(x)``, with one dot product per row.

    Args:
        x: Input of shape ``(..., d)``; float32, bfloat16, float16 or float64.
        alpha: What the row's own factor scales, shape ``(d,)``; in the dtype of x or float32, as are beta and gamma.
        beta: What a row is multiplied with to give its factor, shape ``(d,)``.
        gamma: The scale that all rows share, shape ``(d,)``.
        eps: Added to the mean square. Default 1e-6.

    Returns:
        A tensor of the shape and dtype of x. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or eps does not fit.

    Source: arXiv 2510.22777; the formula is from a description of the paper.
    """
    (d,) = _arguments.last_size("seed_norm", x)
    vectors = {"alpha": alpha, "beta": beta, "gamma": gamma}
    for name, vector in vectors.items():
        if not isinstance(vector, Tensor):
            raise TypeError(f"seed_norm: {name} must be a tensor, got {type(vector).__name__}")
    checks.check_floating("seed_norm", x=x, **vectors)
    checks.check_eps("seed_norm", eps)
    checks.check_same_device("seed_norm", "x", x, **vectors)
    for name, vector in vectors.items():
        if tuple(vector.shape) != (d,):
            raise ValueError(f"seed_norm: {name} has shape {tuple(vector.shape)}; expected ({d},)")
    _arguments.check_companions("seed_norm", x, **vectors)
    compute = compute_dtype(x.dtype)
    s, a, b, c = (tensor.to(compute) for tensor in (x, alpha, beta, gamma))
    factor = torch.tanh((s * b).sum(-1, keepdim=True))
    return ((factor * a + c) * rms_norm(s, d, None, eps)).to(x.dtype)


class SeeDNorm(nn.Module):
    """Self-rescaled dynamic normalization over the last dimension.

    Args:
        dim: Its size.
        eps: Added to the mean square. Default 1e-6.
        alpha_init: Initial value of alpha. Default 1: the paper's own value was not available.

    Parameters are ``alpha``, ``beta`` (zeros, so that the layer starts as an RMSNorm) and ``gamma`` (ones), all of
    shape (dim,). In plain PyTorch. Source: arXiv 2510.22777.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        alpha_init: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps("SeeDNorm", eps)
        self.dim, self.eps, self.alpha_init = dim, eps, alpha_init
        self.alpha, self.beta, self.gamma = (
            nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha to its initial value, beta to zero and gamma to one."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.zeros_(self.beta)
        nn.init.ones_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return seed_norm(x, self.alpha, self.beta, self.gamma, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, alpha_init={self.alpha_init}"


system(
    "seed_norm",
    title="SeeDNorm",
    source="arXiv 2510.22777",
    page="norm/polynorm.md",
    functions=("seed_norm",),
    modules=("SeeDNorm",),
    reasons={
        "cpu": "in plain PyTorch until the authors' code is there to compare with",
        "cuda": "in plain PyTorch until the authors' code is there to compare with",
        "reference": "a function over rms_norm, not an operator",
        "golden": "no code of the authors was found",
        "bench": "no kernel",
    },
)
