"""Learn HarmoniCa's table: which module to compute at which step, along the real denoising path.

"HarmoniCa", arXiv 2410.01723. The network is frozen; a router has a logit for each step and module. Step-wise
denoising training: a whole trajectory is sampled, and at every step the router's step takes one gradient on
    lambda_i mean((teacher - student)^2) + beta sum_j r_ij,   r = sigmoid(logit)
where the student mixes each module's fresh output f with the cached one k, k (1 - r) + f r, and the teacher
computes everything at the same x_i. The next state is the student's. lambda_i, the image error proxy, is how
much the final latent changes when step i is cached too, given that all noisier steps are.

The pipeline's own loop is run, so that every pipeline and every deterministic scheduler is served.

T steps, rows of tables are steps from the noisiest on (the authors count down); U modules in running order.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import ditkit
from ditkit import artifact
from ditkit.analysis.sampling import Sampling, call_arguments
from ditkit.fitting.errors import FittingError
from ditkit.fitting.loop import deferred_interrupt
from ditkit.fitting.recording import transformer_of
from ditkit.fitting.run import PROGRESS, FitData, Progress
from ditkit.registry import register
from ditkit.seams.apply import Host
from ditkit.seams.blocks import Outputs, UnitCache, UnitRef
from ditkit.seams.hooking import Forward
from ditkit.seams.steps import Step
from ditkit.training import checkpoint
from ditkit.training.order import mix

FIRST = 5.0
"""Logit of the first step, which always computes and is not learned."""
LIMIT = 5.0
"""Logits are kept in [-5, 5]."""


class Router(nn.Module):
    """Logits (T, U), a parameter for each step, since a step's gradient must not move the others' moments."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.rows = nn.ParameterList(
            [nn.Parameter(row.clone(), index > 0) for index, row in enumerate(logits)]
        )

    @classmethod
    def random(cls, steps: int, units: int, seed: int) -> Router:
        """Standard normal logits, 5 in the first row."""
        logits = torch.randn(steps, units, generator=torch.Generator().manual_seed(mix(seed, 1)))
        logits[0] = FIRST
        return cls(logits)

    @property
    def logits(self) -> Tensor:
        return torch.stack([row.detach() for row in self.rows])

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(self.rows)[1:], lr=lr, weight_decay=0.0)


class SoftCache(UnitCache):
    """The mixture of fresh and cached outputs, by the router's scores. A method for the fit only.

    Attributes:
        mode: `"soft"`: mix by `scores` and renew the cache; `"full"`: compute, and leave the cache alone;
            `"refill"`: compute, and fill the cache.
        scores: (T, U) in [0, 1]; the first row is not looked at, its step fills the cache.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"blocks"})

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.mode: Literal["soft", "full", "refill"] = "full"
        self.scores: Tensor | Sequence[Tensor] = ()
        self.place = (-1, 0)
        self.units: tuple[UnitRef, ...] = ()
        self._kept: dict[tuple[int, int], Outputs] = {}
        self._generation = -1

    def attach(self, host: Host) -> None:
        """Own the modules of the host's blocks."""
        self.units = host.blocks.units
        host.blocks.cache_units(self)
        host.clock.on_reset(self._kept.clear)

    def replaced(self, step: Step, units: Sequence[UnitRef]) -> Sequence[bool]:
        if self.mode == "soft":
            # Forwards of one step are told apart by their order: teachers come in between.
            before = self.place
            same = (self._generation, before[0]) == (step.generation, step.index)
            self.place = (step.index, before[1] + 1 if same else 0)
            self._generation = step.generation
        return [False] * len(units)

    def store(self, step: Step, unit: UnitRef, outputs: Outputs) -> Outputs | None:
        if self.mode == "full":
            return None
        index, forward = self.place
        kept = self._kept.get((forward, unit.index))
        if index == 0 or kept is None or self.mode == "refill":
            self._kept[forward, unit.index] = tuple(output.detach() for output in outputs)
            return None
        score = self.scores[index][unit.index]
        mixed = tuple(k * (1 - score) + f * score for k, f in zip(kept, outputs, strict=True))
        if float(score.detach()) > self.threshold:
            self._kept[forward, unit.index] = tuple(output.detach() for output in mixed)
        return mixed


def learn(
    router: Router,
    optimizer: torch.optim.Optimizer,
    index: int,
    difference: Tensor,
    weight: float,
    beta: float,
) -> dict[str, float]:
    """One gradient on the router's row of a step.

    Args:
        difference: teacher - student, with a graph to the row's scores; any shape.
        weight: lambda of the step.
        beta: weight of the number of computed modules.
    """
    data = difference.float().square().mean()
    scores = router.rows[index].sigmoid().sum()
    loss = weight * data + beta * scores
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for row in router.rows:
            row.clamp_(-LIMIT, LIMIT)
    found = {"data_loss": data, "score_sum": scores, "loss": loss}
    return {name: float(value.detach()) for name, value in found.items()}


@torch.no_grad()
def image_error_proxy(final: Callable[[Tensor], Tensor], scores: Tensor) -> list[float]:
    """lambda of every step, (T,); 0 for the first, which is not cached.

    Args:
        final: the final latent of a generation, always from the same noise, given scores (T, U).
        scores: the router's.
    """
    active = torch.ones_like(scores)
    before, found = final(active), [0.0]
    for index in range(1, len(scores)):
        active[index] = scores[index]
        after = final(active)
        found.append(float((after - before).float().square().mean()))
        before = after
    return found


@register(
    "fitter", "harmonica", summary="learn which modules to compute at which step, along the denoising path"
)
@dataclass(frozen=True)
class HarmoniCaFitter:
    """Learn a table for one model, one number of steps and the pipeline's scheduler.

    Args:
        steps: T >= 2, denoising steps of the generations that the table is for.
        epochs: trajectories to learn on, >= 1; each gives T - 1 gradients.
        batch: pictures in a trajectory, >= 1.
        lr: of AdamW, without weight decay. 0.01 by the authors.
        beta: how much a computed module costs: the larger, the more is reused. lambda spans orders of
            magnitude, so it has to be found for each model and T; 7e-8 for DiT-XL/2 at T = 10.
        reuse: share of modules to reuse, in (0, 1), the first step not counted; beta then is only where the
            search starts: after every epoch it rises while the mean score is above 1 - reuse and falls while
            it is below. None: beta stays as it is, as the authors have it.
        threshold: in [0, 1): of scores, for renewing the cache here, and for computing later.
        lambda_every: epochs between two measurements of lambda, which cost T generations each. The authors
            count 500 gradients at T = 10.
        guidance: scale; None: the pipeline's own default.
        ablation: what to leave out, to see what it is worth: `"lambda"` weighs every step by 1; `"path"`
            lets each step's cache come from a step computed in full, as Learning-to-Cache does.
        repeat_batches: noise and prompts start again after every lambda, as in the authors' code, which
            seeds all random generators there.
        seed: of logits, noise and prompts.

    Raises:
        FittingError: an option out of range.
    """

    steps: int = 10
    epochs: int = 100
    batch: int = 4
    lr: float = 0.01
    beta: float = 7e-8
    reuse: float | None = None
    threshold: float = 0.1
    lambda_every: int = 50
    guidance: float | None = None
    ablation: Literal["none", "lambda", "path"] = "none"
    repeat_batches: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("epochs", 1), ("batch", 1), ("lambda_every", 1)):
            if getattr(self, name) < least:
                raise FittingError(f"{name} must be at least {least}; got {getattr(self, name)!r}")
        if not self.lr > 0 or not self.beta >= 0:
            raise FittingError(f"lr must be above 0 and beta at least 0; got {self.lr!r} and {self.beta!r}")
        if not 0 <= self.threshold < 1:
            raise FittingError(f"threshold must be in [0, 1); got {self.threshold!r}")
        if self.reuse is not None and not 0 < self.reuse < 1:
            raise FittingError(f"reuse must be above 0 and below 1, or None; got {self.reuse!r}")
        if self.reuse is not None and not self.beta:
            raise FittingError("reuse needs a beta above 0 to start from; got 0")
        if self.ablation not in ("none", "lambda", "path"):
            raise FittingError(f"ablation must be none, lambda or path; got {self.ablation!r}")

    def fit(self, pipe: Any, data: FitData, folder: Path, progress: Progress) -> None:
        """Learn and write; see `ditkit.fitting.run`."""
        model, soft = transformer_of(pipe), SoftCache(self.threshold)
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            with ditkit.apply(pipe, soft, count_flops=False) as run:
                course = _Course(self, pipe, run.hosts[0], soft, data.prompts)
                course.go(folder / PROGRESS / "states", progress)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        artifact.save(
            folder,
            "harmonica",
            {
                "steps": self.steps,
                "threshold": self.threshold,
                "scheduler": type(pipe.scheduler).__name__,
                "guidance": self.guidance,
                "beta": course.beta,
            },
            artifact.model_facts(model),
            {"logits": course.router.logits, "lambda": torch.tensor(course.weights)},
        )


class _Course:
    """One fit under way: the pipeline's loop, watched at its transformer."""

    def __init__(
        self, options: HarmoniCaFitter, pipe: Any, host: Host, soft: SoftCache, prompts: Sequence[str]
    ) -> None:
        self.options, self.pipe, self.soft, self.prompts = options, pipe, soft, prompts
        self.host = host
        self.router = Router.random(options.steps, len(soft.units), options.seed)
        self.optimizer = self.router.optimizer(options.lr)
        self.weights = [1.0] * options.steps
        self.beta = options.beta
        self.history: list[float] = []
        self._learning = False
        self._losses: list[float] = []
        self._passes = 0
        self._forwards: list[int] = []
        self._differences: list[Tensor] = []
        # Outside the clock, so that teacher and student are forwards of their own.
        host.hooks.around(host.entry, "fit", self._forward)

    def go(self, states: Path, progress: Progress) -> None:
        """All epochs, from a saved state where there is one."""
        self._restore(states)
        options = self.options
        with deferred_interrupt() as stopped:
            while len(self.history) < options.epochs:
                epoch = len(self.history)
                if options.ablation != "lambda" and epoch % options.lambda_every == 0:
                    progress("image error proxy", epoch, options.epochs)
                    self.weights = image_error_proxy(self._final(epoch), self.router.logits.sigmoid())
                if not self._passes:
                    self._final(epoch)(torch.ones(options.steps, len(self.soft.units)))
                self._learning, self._losses = True, []
                self._generate(mix(self._start(epoch), 4))
                self._learning = False
                self._steer()
                self.history.append(math.fsum(self._losses))
                progress(f"loss {self.history[-1]:.3g}", len(self.history), options.epochs)
                done = len(self.history) == options.epochs
                if stopped() or done or len(self.history) % 10 == 0:
                    self._save(states)
                if stopped():
                    raise KeyboardInterrupt

    def _steer(self) -> None:
        """Move beta towards the share of modules that is asked for."""
        if self.options.reuse is not None:
            score = float(self.router.logits[1:].sigmoid().mean())
            self.beta *= math.exp(2 * (score - 1 + self.options.reuse))

    def _start(self, epoch: int) -> int:
        """The number that noise and prompts of an epoch are drawn by."""
        return epoch % self.options.lambda_every if self.options.repeat_batches else epoch

    def _final(self, epoch: int) -> Callable[[Tensor], Tensor]:
        """Generations from one noise with given scores."""

        def final(scores: Tensor) -> Tensor:
            self.soft.mode, self.soft.scores = "soft", [row.clone() for row in scores]
            self._forwards.clear()
            latent = self._generate(mix(epoch, 3))
            self._count_passes()
            return latent

        return final

    def _count_passes(self) -> None:
        """Forwards of the transformer in a step, seen in a whole generation."""
        steps, passes = self.options.steps, {self._forwards.count(index) for index in set(self._forwards)}
        if len(set(self._forwards)) != steps or len(passes) != 1 or max(passes) > 2:
            raise FittingError(
                f"{type(self.pipe).__name__} called its transformer {len(self._forwards)} times for {steps} "
                "steps; one or two forwards in each step are understood. Choose a scheduler that evaluates "
                "once a step, and guidance at all steps or none"
            )
        self._passes = passes.pop()

    @torch.no_grad()
    def _generate(self, number: int) -> Tensor:
        """The final latent of a batch drawn by a number, (B, ...)."""
        options = self.options
        source = torch.Generator().manual_seed(mix(options.seed, 2, number))
        chosen = torch.randint(len(self.prompts), (options.batch,), generator=source).tolist()
        seeds = torch.randint(2**31, (options.batch,), generator=source).tolist()
        arguments = self._arguments([self.prompts[i] for i in chosen])
        self.host.clock.restart()
        with _last_state(self.pipe.scheduler) as states:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            self.pipe(**arguments, generator=generators, output_type="latent")
        return states[-1]

    def _arguments(self, prompts: list[Any]) -> dict[str, Any]:
        """Of the pipeline's call; a class-conditional one gets its labels as prompts."""
        known, options = inspect.signature(self.pipe.__call__).parameters, self.options
        if "prompt" in known:
            sampling = Sampling(options.steps, options.guidance)
            return {"prompt": prompts, **call_arguments(self.pipe, sampling, len(prompts))}
        if "class_labels" not in known:
            raise FittingError(f"{type(self.pipe).__name__} takes neither prompts nor class labels")
        try:
            labels = [int(prompt) for prompt in prompts]
        except ValueError:
            raise FittingError(
                f"{type(self.pipe).__name__} takes class labels: the prompts must be numbers; got "
                f"{prompts[0]!r}"
            ) from None
        scale = {} if options.guidance is None else {"guidance_scale": options.guidance}
        return {"class_labels": labels, "num_inference_steps": options.steps, **scale}

    # What happens at the transformer.

    def _forward(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._learning:
            output = forward(*args, **kwargs)
            self._forwards.append(self.soft.place[0])
            return output
        soft, along_path = self.soft, self.options.ablation != "path"
        soft.mode = "soft"
        with torch.enable_grad():
            soft.scores = [row.sigmoid() for row in self.router.rows]
            student = forward(*args, **kwargs)
        index, number = soft.place
        if index == 0:
            return _detached(student)
        soft.mode = "full" if along_path else "refill"
        teacher = forward(*args, **kwargs)
        with torch.enable_grad():
            self._differences.append(_tensor(teacher) - _tensor(student))
            if number == self._passes - 1:
                difference, self._differences = self._guided(self._differences), []
                weight, beta = self.weights[index], self.beta
                found = learn(self.router, self.optimizer, index, difference, weight, beta)
                if not math.isfinite(found["loss"]):
                    raise FittingError(f"the loss at step {index} is {found['loss']}; lower lr")
                self._losses.append(found["loss"])
        return _detached(student) if along_path else teacher

    def _guided(self, differences: list[Tensor]) -> Tensor:
        """The difference after guidance, which is linear in the transformer's outputs."""
        if len(differences) == 2:
            conditional, unconditional = differences
        elif len(differences[0]) == 2 * self.options.batch:
            first, second = differences[0].chunk(2)
            # Pipelines of classes put the condition first, those of text the empty prompt.
            by_class = "prompt" not in inspect.signature(self.pipe.__call__).parameters
            conditional, unconditional = (first, second) if by_class else (second, first)
        else:
            return differences[0]
        return unconditional + self._scale() * (conditional - unconditional)

    def _scale(self) -> float:
        if self.options.guidance is not None:
            return self.options.guidance
        known = inspect.signature(self.pipe.__call__).parameters
        name = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
        return float(known[name].default)

    # On disk.

    def _save(self, states: Path) -> None:
        tensors, facts = checkpoint.pack_optimizer(self.optimizer.state_dict())
        state = {
            "optimizer": facts, "weights": self.weights, "history": self.history, "beta": self.beta,
        }  # fmt: skip
        parts = {"router": {"logits": self.router.logits}, "optimizer": tensors}
        checkpoint.write(states, checkpoint.Checkpoint(len(self.history), parts, state), keep=1)

    def _restore(self, states: Path) -> None:
        saved = checkpoint.newest(states)
        if saved is None:
            return
        with torch.no_grad():
            for row, value in zip(self.router.rows, saved.tensors["router"]["logits"], strict=True):
                row.copy_(value)
        facts = checkpoint.unpack_optimizer(saved.tensors["optimizer"], saved.state["optimizer"])
        self.optimizer.load_state_dict(facts)
        self.weights, self.history = list(saved.state["weights"]), list(saved.state["history"])
        self.beta = float(saved.state["beta"])


@contextlib.contextmanager
def _last_state(scheduler: Any) -> Iterator[list[Tensor]]:
    """The state after the scheduler's latest step, as the one entry of a list."""
    original, states = scheduler.step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        states[:] = [_tensor(result)]
        return result

    scheduler.step = step
    try:
        yield states
    finally:
        del scheduler.step


def _tensor(result: Any) -> Tensor:
    """The tensor in what a transformer or a scheduler's step returned."""
    return result if isinstance(result, Tensor) else result[0]


def _detached(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach()
    if isinstance(result, tuple):
        return tuple(part.detach() for part in result)
    return type(result)(**{name: value.detach() for name, value in result.items()})
