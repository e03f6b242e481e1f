"""D2iT on smooth pictures with a textured disc: three of the paper's claims at a small scale.

A picture has 16 x 16 pixels: a slight gradient of colour and, in the quadrant that is its class, a disc of
sinusoidal texture. Regions have 4 x 4 pixels, so there are 16 of them; a fine one has four codes, a coarse
one has one. For each seed, everything is trained anew:
(a) one autoencoder at fine ratios r drawn at random, one with a uniform grid of 6 x 6 codes (the same
network, its fine codes averaged to 6 x 6 and interpolated back): mean absolute error on held-out pictures;
(b) codes drawn on held-out pictures' maps, on drawn maps, on random ones: Frechet distance to held-out
pictures in 64 features, the mean colour and the contrast of each region;
(c) the noise's error in fine regions, with two blocks and two refining ones, and with four blocks.
In (b) and (c) a code is the mean colour of its cell or region, so that no autoencoder's faults are in them.

    python -m benchmarks.architectures.d2it [--seeds 3] [--coder-steps 250] [--steps 400]
"""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm.auto import trange

from benchmarks.record import Claim, arguments, write
from ditkit.models.d2it import D2iT, GrainTransformer, dynamic_grain_loss
from ditkit.models.d2it_autoencoder import (
    DualGrainAutoencoder,
    fit_threshold,
    multi_grained_noise,
    region_entropy,
    share_in_regions,
    to_cells,
)
from ditkit.pipelines.dynamic_grain import DynamicGrainPipeline
from ditkit.processes import GaussianDiffusion

CLASSES, SIDE, REGION, GRID = 4, 16, 4, 4
KNOWN, HELD_OUT, DRAWN = 4096, 512, 256
RATIOS = (0.1, 0.2, 0.4)  # at 0.4 a picture has 16 (1 + 3 r) = 35.2 codes, the uniform grid has 36
UNIFORM = 6
PROCESS = GaussianDiffusion.create(1000)


# --- pictures -----------------------------------------------------------------------------------------


def pictures(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, 16, 16) in [-1, 1] of labels (B,), the disc's quadrant."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), *shape, 1, 1, generator=generator)

    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    slope = uniform(-0.15, 0.15, 3) * (row / SIDE - 0.5) + uniform(-0.15, 0.15, 3) * (column / SIDE - 0.5)
    ground = uniform(-0.3, 0.3, 3) + slope  # (B, 3, H, W)
    top, left = (labels // 2).view(-1, 1, 1), (labels % 2).view(-1, 1, 1)
    y, x = 4 + 7 * top + uniform(-1.5, 1.5), 4 + 7 * left + uniform(-1.5, 1.5)  # (B, 1, 1)
    inside = (row - y).square() + (column - x).square() < uniform(3, 5).square()  # (B, H, W)
    angle, wavelength = uniform(0, torch.pi), uniform(3, 5)
    phase = 2 * torch.pi / wavelength * (row * angle.sin() + column * angle.cos())
    texture = 0.8 * torch.sin(phase + uniform(0, 2 * torch.pi))[:, None] * uniform(0.5, 1, 3)
    return torch.where(inside[:, None], texture, ground).clamp(-1, 1)


def batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return pictures(labels, generator), labels


def features(codes: Tensor) -> Tensor:
    """Mean colour and contrast (deviation of the grey) of each region of codes (B, 3, 2h, 2w), (B, 64)."""
    regions = codes.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (B, 3, h, w, 4)
    return torch.cat([regions.mean(-1).flatten(1), regions.mean(1).std(-1).flatten(1)], dim=1)


def frechet(one: Tensor, other: Tensor) -> float:
    """Frechet distance of the normals fitted to features (N, D) and (M, D)."""
    first, second = one.double(), other.double()
    values, vectors = torch.linalg.eigh(first.T.cov())
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp(min=0).sqrt().sum()
    traces = first.T.cov().trace() + second.T.cov().trace() - 2 * cross
    return float((first.mean(0) - second.mean(0)).square().sum() + traces)


# --- (a) the autoencoder ------------------------------------------------------------------------------


def restored(model: DualGrainAutoencoder, images: Tensor, grain: Tensor | None) -> Tensor:
    """Pictures encoded and decoded at these grains; None: by a uniform grid of 6 x 6 codes."""
    if grain is not None:
        return model.decode(model.encode(images, grain).mode(), return_dict=False)[0]
    codes = model.encoder(images)[1].chunk(2, dim=1)[0]  # means on the fine grid, (B, z, 2h, 2w)
    few = F.adaptive_avg_pool2d(codes, UNIFORM)
    again = F.interpolate(few, codes.shape[2:], mode="bilinear", align_corners=False)
    return model.decode(again, return_dict=False)[0]


def train_autoencoder(uniform: bool, thresholds: dict[float, float], steps: int, seed: int) -> Any:
    """One trained on the mean absolute error, without the KL term (1e-6) and its noise."""
    torch.manual_seed(seed)
    model = DualGrainAutoencoder(
        ch=8, ch_mult=(1, 2, 4), decoder_ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(),
        resolution=SIDE, norm_num_groups=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in trange(steps, desc="uniform" if uniform else "two grains"):
        images, _ = batch(16, generator)
        which = int(torch.randint(len(RATIOS), (), generator=generator))
        grain = region_entropy(images, REGION) > thresholds[RATIOS[which]]
        loss = (restored(model, images, None if uniform else grain) - images).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return model.eval().requires_grad_(False)


# --- (b), (c) what draws ------------------------------------------------------------------------------


class Codes(NamedTuple):
    """Pictures as the transformers see them: codes (N, 3, 2h, 2w), grains (N, h, w), labels (N,)."""

    codes: Tensor
    grain: Tensor
    labels: Tensor

    def take(self, count: int, generator: torch.Generator) -> Codes:
        rows = torch.randint(len(self.labels), (count,), generator=generator)
        return Codes(*(part[rows] for part in self))


def encoded(images: Tensor, labels: Tensor, threshold: float) -> Codes:
    """Mean colours of cells and regions, scaled to a deviation near 1."""
    grain = region_entropy(images, REGION) > threshold
    return Codes(share_in_regions(3 * F.avg_pool2d(images, 2), grain), grain, labels)


def predicted(model: D2iT, codes: Codes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The noise's prediction, the noise, and the grains, at times and noise from the generator."""
    clean, grain, labels = codes
    noise = multi_grained_noise(torch.randn(clean.shape, generator=generator), grain)
    t = torch.randint(1000, labels.shape, generator=generator)
    return model(PROCESS.q_sample(clean, t, noise), t, labels, grain=grain).sample, noise, grain


def train_content(known: Codes, depth: int, refine_depth: int, steps: int, seed: int) -> D2iT:
    torch.manual_seed(seed)
    model = D2iT(
        input_size=2 * GRID, in_channels=3, hidden_size=48, depth=depth, refine_depth=refine_depth,
        num_heads=4, num_classes=CLASSES, learn_sigma=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in trange(steps, desc=f"{depth} blocks, {refine_depth} refining"):
        loss = dynamic_grain_loss(*predicted(model, known.take(32, generator), generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return model.eval()


def train_grain(known: Codes, steps: int, seed: int) -> GrainTransformer:
    torch.manual_seed(seed)
    model = GrainTransformer(GRID, hidden_size=48, depth=2, num_heads=4, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in trange(steps, desc="maps"):
        codes = known.take(64, generator)
        optimizer.zero_grad()
        model.loss(codes.grain, codes.labels).mean().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def fine_error(model: D2iT, codes: Codes) -> float:
    """Squared error of the noise in fine cells, over four draws of times and noise."""
    generator, errors, cells = torch.Generator().manual_seed(0), 0.0, 0.0
    for _ in range(4):
        prediction, noise, grain = predicted(model, codes, generator)
        fine = to_cells(grain).float()
        errors += float(((prediction - noise).square().mean(1) * fine).sum())
        cells += float(fine.sum())
    return errors / cells


# --- all of it ----------------------------------------------------------------------------------------


def measure(seed: int, coder_steps: int, steps: int) -> dict[str, float]:
    """What one seed gives."""
    generator = torch.Generator().manual_seed(1000 + seed)
    known, known_labels = batch(KNOWN, generator)
    entropies = region_entropy(known, REGION)
    thresholds = {ratio: fit_threshold(entropies, ratio) for ratio in RATIOS}
    images, labels = batch(HELD_OUT, generator)
    coders = coded(images, thresholds, coder_steps, seed)
    codes = encoded(known, known_labels, thresholds[RATIOS[-1]])
    return coders | drawn(codes, encoded(images, labels, thresholds[RATIOS[-1]]), steps, seed)


@torch.no_grad()
def coded(images: Tensor, thresholds: dict[float, float], steps: int, seed: int) -> dict[str, float]:
    """Errors of the autoencoders, (a)."""
    with torch.enable_grad():
        uniform = train_autoencoder(True, thresholds, steps, seed)
        dynamic = train_autoencoder(False, thresholds, steps, seed)
    result = {"error_uniform_36": (restored(uniform, images, None) - images).abs().mean().item()}
    for ratio, threshold in thresholds.items():
        grain = region_entropy(images, REGION) > threshold
        result[f"codes_r{ratio}"] = GRID**2 * (1 + 3 * grain.float().mean().item())
        result[f"error_r{ratio}"] = (restored(dynamic, images, grain) - images).abs().mean().item()
    return result


def drawn(known: Codes, held_out: Codes, steps: int, seed: int) -> dict[str, float]:
    """Distances of what is drawn, (b), and errors in fine regions, (c)."""
    refined = train_content(known, 2, 2, steps, seed)
    result = {
        "fine_error_2_and_2": fine_error(refined, held_out),
        "fine_error_4_and_0": fine_error(train_content(known, 4, 0, steps, seed), held_out),
        "distance_data": frechet(features(known.codes[:DRAWN]), features(held_out.codes)),
    }
    pipe: Any = DynamicGrainPipeline(
        refined, DDIMScheduler(clip_sample_range=3.0, timestep_spacing="trailing"),
        grain_transformer=train_grain(known, steps, seed), fine_ratio=known.grain.float().mean().item(),
    )  # fmt: skip
    for name, grain in (("true", held_out.grain[:DRAWN]), ("drawn", None), ("random", "random")):
        codes = pipe(
            held_out.labels[:DRAWN], guidance_scale=1.0, num_inference_steps=20, grain=grain,
            output_type="latent", generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        result[f"distance_{name}"] = frechet(features(codes), features(held_out.codes))
    return result


def claims(runs: list[dict[str, float]], limit: str) -> list[Claim]:
    """The claims beside means and deviations over the seeds; one holds where it does for every seed."""

    def shown(key: str) -> str:
        values = [run[key] for run in runs]
        return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0.0:.4f}"

    def rising(*keys: str) -> bool:
        return all(run[a] < run[b] for run in runs for a, b in pairwise(keys))

    codes = {ratio: mean(run[f"codes_r{ratio}"] for run in runs) for ratio in RATIOS}
    errors = [f"error_r{ratio}" for ratio in reversed(RATIOS)]
    return [
        Claim(
            "d2it-vae",
            "two grains restore pictures better than a uniform grid of as many codes",
            "arXiv 2504.09454, at a small scale",
            f"mean absolute error {shown(errors[0])} with {codes[RATIOS[-1]]:.1f} codes on the mean, "
            f"{shown('error_uniform_36')} with 36 uniform ones",
            rising(errors[0], "error_uniform_36"),
            limit,
        ),
        Claim(
            "d2it-vae",
            "the error rises as fewer regions are fine",
            "arXiv 2504.09454, figure 5, at a small scale",
            ", ".join(f"{shown(f'error_r{r}')} at r = {r} ({codes[r]:.1f} codes)" for r in reversed(RATIOS)),
            rising(*errors),
            limit,
        ),
        Claim(
            "d2it",
            "pictures on true maps are nearer to the data than on drawn maps, and those than on random ones",
            "arXiv 2504.09454, table 5 (FID 4.35, 4.47, 15.93)",
            f"Frechet distance in 64 features {shown('distance_true')} on true maps, "
            f"{shown('distance_drawn')} on drawn ones, {shown('distance_random')} on random ones "
            f"(pictures of the data: {shown('distance_data')})",
            rising("distance_true", "distance_drawn", "distance_random"),
            f"{limit}; {DRAWN} pictures, DDIM with 20 steps, no guidance",
        ),
        Claim(
            "d2it",
            "two refining blocks, moved out of the base, lower the noise's error in fine regions",
            "arXiv 2504.09454, table 4 (FID 22.11 against 25.15)",
            f"squared error {shown('fine_error_2_and_2')} with 2 + 2 blocks, "
            f"{shown('fine_error_4_and_0')} with 4 + 0",
            rising("fine_error_2_and_2", "fine_error_4_and_0"),
            limit,
        ),
    ]


def main() -> None:
    parser = arguments(__file__, __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--coder-steps", type=int, default=250, help="of each autoencoder")
    parser.add_argument("--steps", type=int, default=400, help="of each content transformer")
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        runs.append(measure(seed, options.coder_steps, options.steps))
        limit = (
            f"{len(runs)} seeds, ± their deviation, each must agree; 16 x 16 pixels, {options.coder_steps} "
            f"steps of the autoencoders, {options.steps} of the transformers of width 48"
        )
        # After each seed, so that a stopped run leaves what it has.
        write(options.json, claims(runs, limit), {"torch": torch.__version__}, runs=runs)


if __name__ == "__main__":
    main()
