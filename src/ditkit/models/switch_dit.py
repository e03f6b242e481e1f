"""Switch-DiT: a sparse mixture of experts, gated by the timestep, makes the mask of every DiT block.

"Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts", arXiv
2403.09176. Each block has E experts, affine maps of its input; the timestep's embedding picks k of them,
and one plus their gated sum is the mask M of `x_out = block(M x) + (1 - M) x`: real-valued, different for
each token. Experts start at zero, so M at 1 and the network as a DiT. A prior loss pulls the choice of
experts over time towards the sliding windows of DTR, matched to the experts by assignment. Gates are the
softmax's values, not renormalised over the chosen ones, as in the authors' code (the paper's text was not
compared). The authors evaluate the timestep embedding for all S steps at each forward; only the rows in use
matter, so only those are computed here, and a fractional time is allowed.

Dimensions: B batch, T tokens, D width, E experts, N blocks, S timesteps of the schedule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401  (a saved pipeline looks for it beside the model's class)
from diffusers.configuration_utils import register_to_config
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ditkit.models import dit
from ditkit.models.base import chosen
from ditkit.models.dit import DiT, DiTBlock
from ditkit.models.layouts import LAYOUTS, Layout, Settings, State, dit_needs
from ditkit.models.routing import channel_masks
from ditkit.registry import Paper, register


class Mixture(nn.Module):
    """The mask of a block: one plus the gated outputs of the k chosen experts."""

    _called_outside_block = ("f_gate",)  # by the loss on the routers' choices

    def __init__(self, width: int, num_experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.f_gate = nn.Sequential(nn.SiLU(), nn.Linear(width, num_experts))
        self.weight = nn.Parameter(torch.zeros(num_experts, width, width))  # in by out
        self.bias = nn.Parameter(torch.zeros(num_experts, width))

    def probabilities(self, time: Tensor) -> Tensor:
        """Time embedding (..., D) to the gates (..., E), which sum to 1 over all experts."""
        return self.f_gate(time).softmax(dim=-1)

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        """Tokens (B, T, D) and time embedding (B, D) to the mask (B, T, D)."""
        gates, experts = self.probabilities(time).topk(self.active, dim=-1)  # (B, k), (B, k)
        mask = torch.ones_like(hidden_states)
        if torch.is_grad_enabled() and not hidden_states.is_meta:
            # Sample by sample the weights would be copied, and kept for the backward pass.
            for expert in range(len(self.weight)):
                sample, place = (experts == expert).nonzero(as_tuple=True)
                out = hidden_states[sample] @ self.weight[expert] + self.bias[expert]  # (b, T, D)
                mask = mask.index_add(0, sample, (gates[sample, place, None, None] * out).to(mask.dtype))
            return mask
        for place in range(self.active):  # no sizes that depend on the data: nothing waits for the device
            picked = experts[:, place]
            out = torch.baddbmm(self.bias[picked].unsqueeze(1), hidden_states, self.weight[picked])
            mask = mask + gates[:, place, None, None] * out
        return mask


class SwitchDiTBlock(DiTBlock):
    """A DiT block with the mixture of its own mask."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, num_experts: int, active: int) -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.router = Mixture(width, num_experts, active)

    def forward(self, hidden_states: Tensor, conditioning: Tensor, time: Tensor) -> Tensor:
        """Tokens (B, T, D), conditioning (B, T or 1, D) and time embedding (B, D) to tokens (B, T, D)."""
        return super().forward(hidden_states, conditioning, self.router(hidden_states, time))


class SwitchDiT(DiT):
    """The network: a DiT whose blocks are masked by experts.

    Args:
        num_experts: E.
        active_experts: k, how many each timestep takes.
        num_timesteps: S of the schedule that the prior loss ranges over.
        routing: None; the experts are in its place.
        (others): see `DiT`.

    Raises:
        ValueError: for sizes that do not divide, or k out of 1..E.
    """

    authors_guidance = "all"
    _no_split_modules = ["SwitchDiTBlock"]
    _repeated_blocks = ["SwitchDiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        num_experts: int = 3,
        active_experts: int = 2,
        num_timesteps: int = 1000,
        routing: None = None,
    ) -> None:
        if routing is not None:
            raise ValueError("routing and experts both mask the blocks of a Switch-DiT: choose one of them")
        if not 1 <= active_experts <= num_experts:
            raise ValueError(f"active_experts={active_experts} is not in 1..num_experts={num_experts}")
        super().__init__(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio,
            class_dropout_prob,
            num_classes,
            learn_sigma,
        )

    @property
    def expert_counts(self) -> tuple[int, int]:
        """E and k."""
        return self.config["num_experts"], self.config["active_experts"]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As a DiT, with the experts at zero."""
        super().initialize_weights()
        block: Any
        for block in self.blocks:
            nn.init.zeros_(block.router.weight)

    def make_block(self, width: int, num_heads: int, mlp_ratio: float) -> nn.Module:
        return SwitchDiTBlock(width, num_heads, mlp_ratio, *self.expert_counts)

    def gates(self, tokens: Tensor, timestep: Tensor | None, grid: tuple[int, int] | None) -> tuple[Any, ...]:
        """What the blocks get beyond tokens and conditioning: the time embedding (B, D)."""
        if timestep is None:
            raise ValueError("the experts are chosen by the timestep: give run_blocks its timestep=(B,)")
        return (self.t_embedder(timestep, dtype=tokens.dtype),)

    def probabilities(self, timestep: Tensor) -> Tensor:
        """The gates of all blocks at some timesteps (B,), side by side, (B, N E)."""
        time = self.t_embedder(timestep, dtype=self.dtype)
        routers: list[Any] = [block.router for block in self.blocks]
        return torch.cat([router.probabilities(time) for router in routers], dim=-1)

    def choices(self) -> Tensor:
        """Which experts each timestep of the schedule takes, 0 and 1, (S, N E)."""
        num_experts, active = self.expert_counts
        with torch.no_grad():
            gates = self.probabilities(torch.arange(self.config["num_timesteps"], device=self.device))
        gates = gates.unflatten(1, (-1, num_experts))  # (S, N, E)
        best = gates.topk(active, dim=-1).indices
        return torch.zeros_like(gates).scatter(-1, best, 1.0).flatten(1)

    def prior_loss(self, timestep: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The prior loss of a training batch; add it to the diffusion loss (the authors: with weight 1).

        Args:
            timestep: whole timesteps of the schedule, (B,).
            generator: of the CPU, breaks ties between experts; None: the global one.
        """
        num_experts, active = self.expert_counts
        depth, steps = len(self.blocks), self.config["num_timesteps"]
        prior = prior_table(steps, depth, num_experts, active).to(self.device)
        assignment = match(self.choices(), prior, shuffle=True, generator=generator)
        return prior_divergence(self.probabilities(timestep), prior[timestep.long()][:, assignment], depth)


# --- the prior loss -----------------------------------------------------------------------------------


def prior_table(num_timesteps: int, depth: int, num_experts: int, active: int) -> Tensor:
    """The prior over all experts, 0 and 1, (S, N E): DTR's sliding windows with k/E of the units active."""
    return channel_masks(num_timesteps, depth * num_experts, active / num_experts, alpha=4.0)


def matching_cost(choices: Tensor, prior: Tensor) -> Tensor:
    """In how many timesteps expert a and unit b differ: (S, A), (S, A) -> (A, A), both of 0 and 1."""
    return choices.T @ (1 - prior) + (1 - choices).T @ prior


def match(
    choices: Tensor, prior: Tensor, shuffle: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """The prior's unit for each expert, (A,), so that their differences over time are least in sum.

    Args:
        choices: the experts taken at each timestep, (S, A).
        prior: (S, A).
        shuffle: break ties at random, as in the authors' training.
        generator: of that draw, on the CPU; None: the global one.
    """
    cost = matching_cost(choices, prior).cpu()
    order = columns = torch.arange(len(cost))
    if shuffle:
        order, columns = (torch.randperm(len(cost), generator=generator) for _ in range(2))
    rows, units = linear_sum_assignment(cost[order][:, columns].numpy())
    assignment = torch.empty(len(cost), dtype=torch.long)
    assignment[order[torch.from_numpy(rows)]] = columns[torch.from_numpy(units)]
    return assignment.to(choices.device)


def prior_divergence(probabilities: Tensor, prior: Tensor, depth: int, eps: float = 1e-6) -> Tensor:
    """Jensen-Shannon divergence of the gates and their matched prior, mean of the batch.

    Args:
        probabilities: gates of all blocks, (B, N E); they sum to N.
        prior: matched rows of the prior, (B, N E), 0 and 1.
        depth: N.
        eps: added inside the logarithms.
    """
    gates = probabilities / depth
    target = prior / prior.sum(dim=1, keepdim=True)
    middle = (gates + target) / 2
    terms = [p * ((p + eps).log() - (middle + eps).log()) for p in (gates, target)]
    return (0.5 * (terms[0] + terms[1])).sum(dim=1).mean()


# --- in the registry ----------------------------------------------------------------------------------


@register(
    "model",
    "switch-dit",
    summary="DiT with timestep-gated experts that mask each block; switch-dit-{s,b,l,xl}/{2,4,8}",
    paper=Paper(
        "Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse Mixture-of-Experts",
        "2403.09176",
        2024,
    ),
    seam=("architecture",),
    variants=tuple(dit.VARIANTS),
)
def switch_dit(variant: str | None = None, **config: Any) -> SwitchDiT:
    """A fresh Switch-DiT of a named variant ("xl/2"; None: the defaults), with changes to its config."""
    return SwitchDiT(**{**chosen(dit.VARIANTS, variant), **config})


def _infer(state: State, options: Mapping[str, Any]) -> Settings:
    settings = dit.infer(state, options)
    experts = state.get("routers.0.experts.w")
    if experts is not None:
        settings["num_experts"] = len(experts)
    table = state.get("prior._unit_mapping")
    if table is not None and "depth" in settings:
        settings["num_timesteps"] = len(table)
        settings["active_experts"] = round(float(table[0].sum()) / settings["depth"])
    return settings


def _rename(state: State) -> dict[str, Tensor]:
    """Routers stand beside the blocks there, inside them here; fixed tables are computed."""
    renamed = {}
    for name, value in state.items():
        if name in ("prior._unit_mapping", "full_time"):
            continue
        name = re.sub(r"^routers\.(\d+)\.", r"blocks.\1.router.", name)
        renamed[name.replace(".experts.w", ".weight").replace(".experts.b", ".bias")] = value
    return renamed


LAYOUTS["switch-dit"] = Layout(infer=_infer, needs=dit_needs, variants=dit.VARIANTS, rename=_rename)
