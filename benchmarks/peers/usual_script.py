"""The usual DiT training script in plain PyTorch, against which the trainer's throughput is measured.

Written anew after what public DiT training scripts do, without a handicap: a DiT with fused qkv and
`scaled_dot_product_attention`, Gaussian diffusion with learned variance, AdamW, an average of the weights
updated parameter by parameter in Python, float32 or autocast to bf16. Parameter names are those of the DiT
checkpoints, so both sides start from the same weights.

Dimensions: B batch, C channels, H x W latent, P patch size, T tokens, D width.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1000


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(width, hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Patches(nn.Module):
    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Times(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Labels(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        self.null = classes

    def forward(self, labels: Tensor, dropped: Tensor) -> Tensor:
        return self.embedding_table(torch.where(dropped, self.null, labels))


class Head(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class UsualDiT(nn.Module):
    """The network; its weights are loaded from the other side's."""

    def __init__(
        self, side: int, patch: int, channels: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patch, self.rows, self.outputs = patch, side // patch, 2 * channels
        self.x_embedder = Patches(patch, channels, width)
        self.t_embedder = Times(width)
        self.y_embedder = Labels(classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.rows**2, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = Head(width, patch * patch * self.outputs)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, dropped: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(labels, dropped)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)  # (B, T, P P 2C)
        x = x.reshape(len(x), self.rows, self.rows, self.patch, self.patch, self.outputs)
        side = self.rows * self.patch
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.outputs, side, side)


class Diffusion:
    """Linear betas, noise prediction, learned variance: numpy tables, indexed and cast at every use."""

    def __init__(self) -> None:
        betas = np.linspace(0.0001, 0.02, STEPS, dtype=np.float64)
        alphas, abar = 1 - betas, np.cumprod(1 - betas)
        before = np.append(1.0, abar[:-1])
        variance = betas * (1 - before) / (1 - abar)
        self.signal, self.spread = np.sqrt(abar), np.sqrt(1 - abar)
        self.log_betas, self.log_variance = np.log(betas), np.log(np.append(variance[1], variance[1:]))
        self.mean_clean = betas * np.sqrt(before) / (1 - abar)
        self.mean_state = (1 - before) * np.sqrt(alphas) / (1 - abar)
        self.recip, self.recip_less = np.sqrt(1 / abar), np.sqrt(1 / abar - 1)

    @staticmethod
    def take(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        values = torch.from_numpy(table).to(device=t.device)[t].float()
        return values[:, None, None, None] + torch.zeros_like(like)

    def loss(self, model: UsualDiT, clean: Tensor, t: Tensor, noise: Tensor, labels: Tensor, dropped: Tensor):
        state = self.take(self.signal, t, clean) * clean + self.take(self.spread, t, clean) * noise
        output = model(state, t, labels, dropped).float()
        predicted, between = output.chunk(2, dim=1)
        mse = (noise - predicted).square().mean(dim=(1, 2, 3))
        return (mse + self.bound(predicted.detach(), between, clean, state, t)).mean()

    def bound(self, predicted: Tensor, between: Tensor, clean: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The variational bound in bits, which trains the variance alone."""
        low, high = self.take(self.log_variance, t, clean), self.take(self.log_betas, t, clean)
        fraction = (between + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        guess = self.take(self.recip, t, clean) * state - self.take(self.recip_less, t, clean) * predicted
        weight, rest = self.take(self.mean_clean, t, clean), self.take(self.mean_state, t, clean)
        true_mean, mean = weight * clean + rest * state, weight * guess + rest * state
        ratio, distance = (
            torch.exp(low - log_variance),
            (true_mean - mean).square() * torch.exp(-log_variance),
        )
        kl = (0.5 * (-1.0 + log_variance - low + ratio + distance)).mean(dim=(1, 2, 3))
        centred, inverse = clean - mean, torch.exp(-0.5 * log_variance)
        above, below = (_cdf(inverse * (centred + edge)) for edge in (1 / 255, -1 / 255))
        inside = (above - below).clamp(min=1e-12).log()
        ends = torch.where(clean > 0.999, (1 - below).clamp(min=1e-12).log(), inside)
        logs = torch.where(clean < -0.999, above.clamp(min=1e-12).log(), ends)
        return torch.where(t == 0, -logs.mean(dim=(1, 2, 3)), kl) / math.log(2.0)


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


class UsualScript:
    """Network, average, optimizer; `step` is one turn of the script's loop."""

    def __init__(self, model: UsualDiT, lr: float = 1e-4, decay: float = 0.9999, bf16: bool = False) -> None:
        self.model, self.decay, self.diffusion = model.train(), decay, Diffusion()
        self.bf16 = bf16
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0
        )

    def step(self, clean: Tensor, labels: Tensor, t: Tensor, noise: Tensor, dropped: Tensor) -> float:
        """One update from latents (B, C, H, W), labels, times 0..999 and drops (B,); the loss."""
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.diffusion.loss(self.model, clean, t, noise, labels, dropped)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            average = dict(self.average.named_parameters())
            for name, parameter in self.model.named_parameters():
                average[name].mul_(self.decay).add_(parameter.data, alpha=1 - self.decay)
        return loss.item()
