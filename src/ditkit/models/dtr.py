"""DTR: each noise level sees its own window of channels; an add-on without parameters to isotropic models.

"Denoising Task Routing for Diffusion Models", arXiv 2310.07138. A mask of the timestep, the same in every
block, chooses which channels of the residual stream the block reads. Windows of constant size slide with
the timestep, faster at high noise. The masks are in `routing` (`channel_masks`, `ChannelRouting`, `route`):
they are an option of every isotropic model here, not a model. This file holds the paper's defaults, the
loss weightings of its reported combinations (Min-SNR, ANT's uncertainty weighting) and the authors'
checkpoints. All formulas are those of the authors' code; its P2 weighting fails on its own shapes and is
left out. Not in the code, inferred: a time in [0, 1], 0 being noise, takes row round((1 - t) (T - 1)).

Dimensions: B batch, T timesteps, G groups of timesteps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditkit import models
from ditkit.models import dit
from ditkit.models.building import SETTINGS, DataShape, settings_for
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, dit_needs
from ditkit.models.routing import channel_masks
from ditkit.registry import Paper, register

if TYPE_CHECKING:
    from ditkit.processes import GaussianDiffusion

# --- loss weightings ----------------------------------------------------------------------------------


def min_snr_weights(process: GaussianDiffusion, t: Tensor, k: float = 5.0) -> Tensor:
    """min(SNR, k) / SNR at steps t (B,) of a process, (B,), float32."""
    abar = process.abar[t.cpu()]
    snr = abar / (1 - abar)
    return (snr.clamp(max=k) / snr).float().to(t.device)


def min_snr_losses(
    process: GaussianDiffusion, losses: dict[str, Tensor], t: Tensor, k: float = 5.0
) -> dict[str, Tensor]:
    """Losses of each sample with the squared error weighted by min(SNR, k) / SNR; the bound is not weighted.

    Args:
        process: whose `training_losses` these are.
        losses: "mse" and, with a learned variance, "vb"; each (B,).
        t: steps of that process, (B,).
        k: the signal-to-noise ratio above which steps weigh less.
    """
    weighted = {**losses, "mse": min_snr_weights(process, t, k) * losses["mse"]}
    return {**weighted, "loss": weighted["mse"] + losses.get("vb", 0.0)}


def grouped_timesteps(
    batch: int, num_timesteps: int = 1000, groups: int = 8, generator: torch.Generator | None = None
) -> Tensor:
    """Timesteps (B,): the i-th part of the batch lies in the i-th part of the schedule, least noise first.

    Raises:
        ValueError: a batch that the groups do not divide.
    """
    if batch % groups or num_timesteps % groups:
        raise ValueError(f"a batch of {batch} and {num_timesteps} steps: both must be multiples of {groups}")
    length = num_timesteps // groups
    start = torch.arange(groups).repeat_interleave(batch // groups) * length
    return start + torch.randint(length, (batch,), generator=generator)


class UncertaintyWeighting(nn.Module):
    """One learned weight for each group of timesteps: losses (B,), laid out by group, -> the loss.

    The loss is `sum_i (exp(-s_i) l_i + s_i) / 2`, l_i the mean of group i over the number of groups. The
    authors give `s` its own learning rate, 0.025, and no weight decay.
    """

    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.loss_scale = nn.Parameter(torch.zeros(groups))

    def forward(self, losses: Tensor) -> Tensor:
        groups = len(self.loss_scale)
        if len(losses) % groups:
            raise ValueError(f"{len(losses)} losses can't be laid out in {groups} groups")
        means = losses.unflatten(0, (groups, -1)).mean(1) / groups  # (G,)
        return (0.5 * (torch.exp(-self.loss_scale) * means + self.loss_scale)).sum()

    def weights(self, group: Tensor) -> Tensor:
        """What the loss of a sample of each group (B,) is multiplied with, (B,).

        The mean over the whole batch of the losses so weighted, and `penalty`, add up to `forward`; both may
        be taken of parts of a batch.
        """
        return 0.5 * torch.exp(-self.loss_scale)[group]

    def penalty(self) -> Tensor:
        """What keeps the weights from vanishing, a scalar."""
        return 0.5 * self.loss_scale.sum()


# --- in the registry ----------------------------------------------------------------------------------


@register(
    "model",
    "dtr",
    summary="any isotropic model with channels routed by the timestep; dtr-dit-{s,b,l,xl}/{2,4,8}, dtr-sit-"
    "{s,b,l,xl}/{2,4,8}, ...",
    paper=Paper("Denoising Task Routing for Diffusion Models", "2310.07138", 2023),
    seam=("architecture",),
    variants=tuple(dit.VARIANTS),
)
def dtr(variant: str | None = None, routing: Mapping[str, Any] | None = None, **config: Any) -> Any:
    """A fresh routed model.

    Args:
        variant: of any isotropic model ("dit-l/2", "sit-b/4", "lit-s/2"); "l/2" alone is a DiT's.
        routing: options of `ChannelRouting`; its defaults are the paper's.
        **config: changes to the model's configuration.
    """
    name = _full_name(variant)
    return models.create(name, routing={"sharing_ratio": 0.8, **(routing or {})}, **config)


def _for_data(shape: DataShape, variant: str | None) -> dict[str, Any]:
    """As the model that is routed."""
    return settings_for(_full_name(variant), shape)


SETTINGS["dtr"] = _for_data


def _full_name(variant: str | None) -> str:
    return "dit" if variant is None else f"dit-{variant}" if variant in dit.VARIANTS else variant


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    settings = dit.infer(state, options)
    table = state.get("blocks.0.routing._unit_mapping")
    if table is None:
        return {"routing": {"sharing_ratio": 0.8}, **settings}
    steps, width = table.shape
    ratios = (0.8, (float(table[0].sum()) + 0.5) / width)  # any ratio that truncates to this many channels
    for ratio in (min(ratio, 1.0) for ratio in ratios):
        if torch.equal(channel_masks(steps, width, ratio), table.float()):
            settings["routing"] = {"sharing_ratio": ratio, "num_timesteps": steps}
            break
    return settings


def _needs(settings: Settings) -> Iterable[tuple[str, str]]:
    yield from dit_needs(settings)
    yield "routing", "its mask table is not that of alpha=4: give config={'routing': {'alpha': ...}}"


def _rename(state: State) -> dict[str, Tensor]:
    """One table is computed where the authors keep one for each block."""
    return {name: value for name, value in state.items() if not name.endswith("routing._unit_mapping")}


LAYOUTS["dtr"] = Layout(
    infer=_infer,
    needs=_needs,
    variants={
        name: dimensions for size, dimensions in dit.VARIANTS.items() for name in (size, f"dit-{size}")
    },
    rename=_rename,
)
