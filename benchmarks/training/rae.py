"""Diffusion in latents of many channels, after the paper of representation autoencoders, at toy size.

Width: 16 tokens of 64 channels, one sample, overfitted with the velocity's loss by transformers of widths 32
to 96, two or four blocks deep, and by a 32-wide backbone with a 96-wide head of two blocks. Shift: latents of
1,024 numbers that hold eight degrees of freedom, trained and sampled with and without the shift of times.
Decoder: small decoders of emoji tokens, trained with and without noise on the tokens.

    python -m benchmarks.training.rae [--seeds 0 1 2]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTModel

from benchmarks import record
from benchmarks.architectures.toy import differs, told
from benchmarks.record import Claim
from ditkit.data.emoji import EmojiDataset
from ditkit.models.dit import SiT
from ditkit.models.dit_dh import DiTDH
from ditkit.models.rae import RepresentationAutoencoder
from ditkit.models.teachers import Teacher
from ditkit.processes import Transport
from ditkit.processes.times import dimension_shift
from ditkit.processes.transport_sampling import sample_ode
from ditkit.training.tasks.representation_autoencoder import noise_levels
from ditkit.training.tasks.teacher import moved, words_of

PAPER = "arXiv 2510.11690"
CHANNELS, SIDE = 64, 4  # of the latents: 16 tokens
SHAPE = (CHANNELS, SIDE, SIDE)
SAME: dict[str, Any] = {"input_size": SIDE, "patch_size": 1, "in_channels": CHANNELS, "num_classes": 1}
Values = dict[str, list[float]]


def plain(width: int, depth: int) -> SiT:
    """A transformer of one width."""
    sizes = {"hidden_size": width, "depth": depth, "num_heads": width // 16}
    return SiT(**SAME, **sizes, learn_sigma=False, class_dropout_prob=0.0)


def with_head(narrow: int, wide: int, depth: int) -> DiTDH:
    """A narrow backbone with a wide head of two blocks."""
    heads = (narrow // 16, wide // 16)
    return DiTDH(
        **SAME, hidden_size=(narrow, wide), depth=(depth, 2), num_heads=heads, class_dropout_prob=0.0
    )


WIDTHS: dict[str, Callable[[], nn.Module]] = {
    "width 32, depth 2": lambda: plain(32, 2),
    "width 32, depth 4": lambda: plain(32, 4),
    "width 48, depth 2": lambda: plain(48, 2),
    "width 64, depth 2": lambda: plain(64, 2),
    "width 96, depth 2": lambda: plain(96, 2),
    "32 with a head of 96": lambda: with_head(32, 96, 2),
}


def fit(network: Any, loss: Callable[[], Tensor], steps: int, name: str) -> list[float]:
    """Train by AdamW with a rate that falls to 0 along a cosine; the losses of all steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seen = []
    for _ in tqdm(range(steps), desc=name, leave=False, mininterval=2):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        seen.append(value.item())
    return seen


# --- width --------------------------------------------------------------------------------------------


def overfit(make: Callable[[], nn.Module], seed: int, steps: int, name: str) -> float:
    """The mean loss of the last hundred steps on one random sample."""
    torch.manual_seed(seed)
    network: Any = make().train()
    process, sample, labels = Transport(), torch.randn(1, *SHAPE), torch.zeros(32, dtype=torch.long)

    def loss() -> Tensor:
        batch = sample.expand(32, -1, -1, -1)
        return process.training_losses(lambda x, t: network(x, t, labels).sample, batch)["loss"].mean()

    return statistics.mean(fit(network, loss, steps, name)[-100:])


def width_claims(found: Values) -> list[Claim]:
    floors = {
        name: max(0.0, (CHANNELS - int(name.split()[1].strip(","))) / CHANNELS)
        for name in found
        if "width" in name
    }
    shown = "; ".join(f"{name}: {told(values, 3)}" for name, values in found.items())
    narrow, wide = found["width 32, depth 2"], found["width 96, depth 2"]
    deep, head = found["width 32, depth 4"], found["32 with a head of 96"]
    limit = f"{CHANNELS} channels, 16 tokens, one sample; floors (n - width)/n: " + ", ".join(
        f"{floor:.2f}" for floor in dict.fromkeys(floors.values())
    )
    order = ("width 32, depth 2", "width 48, depth 2", "width 64, depth 2", "width 96, depth 2")
    means = [statistics.mean(found[name]) for name in order]
    falls = means == sorted(means, reverse=True) and means[0] > 0.45 and means[-1] < 0.1
    return [
        Claim("dit-dh", "the loss stays high while the width is below the tokens' channels, and falls above",
              f"{PAPER}, section 4.1", shown, falls, limit),
        Claim("dit-dh", "doubling the depth of a too narrow model does not help", f"{PAPER}, section 4.1",
              f"depth 2: {told(narrow, 3)}, depth 4: {told(deep, 3)}; width 96: {told(wide, 3)}",
              statistics.mean(deep) > 0.8 * statistics.mean(narrow), limit),
        Claim("dit-dh", "a wide head of two blocks on a narrow backbone recovers the low loss",
              f"{PAPER}, section 5", f"32 with a head of 96: {told(head, 3)}, width 96: {told(wide, 3)}, "
              f"width 32: {told(narrow, 3)}", statistics.mean(head) < 2 * statistics.mean(wide), limit),
    ]  # fmt: skip


# --- shift --------------------------------------------------------------------------------------------

CODES = 8  # degrees of freedom of a toy picture
NUMBERS = CHANNELS * SIDE * SIDE
SHIFTS = {"without a shift": 1.0, "with the shift": dimension_shift(NUMBERS, base=CHANNELS)}


def toy_latents(count: int, basis: Tensor, centres: Tensor, generator: torch.Generator) -> Tensor:
    """Latents (N, C, H, W) of variance about 1 that hold `CODES` numbers each, near one of some centres."""
    chosen = torch.randint(len(centres), (count,), generator=generator)
    codes = centres[chosen] + 0.15 * torch.randn(count, CODES, generator=generator)  # (N, K)
    return (codes @ basis * math.sqrt(NUMBERS / CODES)).unflatten(1, SHAPE)


def energy_distance(one: Tensor, other: Tensor) -> float:
    """Of two sets of points, (N, D) and (M, D); 0 where they are of one distribution."""
    across, inner, outer = torch.cdist(one, other).mean(), torch.cdist(one, one), torch.cdist(other, other)
    spread = inner.sum() / (len(one) * (len(one) - 1)) + outer.sum() / (len(other) * (len(other) - 1))
    return float(2 * across - spread)


def sample_distance(shift: float, seed: int, steps: int, draws: int, name: str) -> float:
    """The energy distance of drawn latents from the data's, after training and sampling with a shift."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(NUMBERS, CODES, generator=generator))[0].T  # (K, m)
    centres = torch.randn(16, CODES, generator=generator)
    network, process = plain(96, 2).train(), Transport(times="logit-normal", shift=shift)
    labels = torch.zeros(32, dtype=torch.long)

    def loss() -> Tensor:
        batch = toy_latents(32, basis, centres, generator)
        return process.training_losses(lambda x, t: network(x, t, labels).sample, batch)["loss"].mean()

    fit(network, loss, steps, name)
    network.eval()
    start, labels = torch.randn(512, *SHAPE, generator=generator), torch.zeros(512, dtype=torch.long)
    drawn = sample_ode(
        process, lambda x, t: network(x, t, labels).sample, start, method="euler", points=draws + 1
    )[-1]
    real = toy_latents(512, basis, centres, generator)
    return energy_distance(drawn.flatten(1), real.flatten(1)) / math.sqrt(NUMBERS)


def shift_claims(found: Values, draws: int) -> list[Claim]:
    off, on = found["without a shift"], found["with the shift"]
    verdict = "" if differs(on, off) else ": within seed noise"
    return [
        Claim("rae", "shifting the times towards noise helps in latents of many numbers",
              f"{PAPER}: gFID 23.08 to 4.81", f"energy distance of {draws}-step samples: with {told(on, 4)}, "
              f"without {told(off, 4)}, {len(on)} seeds{verdict}", statistics.mean(on) < statistics.mean(off),
              f"toy latents: {CODES} degrees of freedom in {NUMBERS} numbers, shift "
              f"{SHIFTS['with the shift']:.0f} against {CHANNELS} numbers"),
    ]  # fmt: skip


# --- decoder ------------------------------------------------------------------------------------------

TAUS = {"without noise": 0.0, "tau 0.8": 0.8}
TEST_NOISE = 0.3
SLIGHTLY = 1.0  # dB


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    """Emoji at 32 x 32 in [-1, 1]: to train on, their words (N, K), and held out."""
    train, held = EmojiDataset("train"), EmojiDataset("heldout")
    words = [words_of(row.caption) for row in train.rows]
    names = sorted(name for name in set().union(*words) if sum(name in there for there in words) >= 20)
    labels = torch.tensor([[name in there for name in names] for there in words], dtype=torch.float32)
    shrunk = [torch.nn.functional.avg_pool2d(part.images(), 2) for part in (train, held)]
    return shrunk[0], labels, shrunk[1]


def trained_teacher(images: Tensor, labels: Tensor, steps: int) -> Teacher:
    """A small vision transformer that knows the words of emoji names, as the `teacher` task trains it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    network = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=4), add_pooling_layer=False)
    head = nn.Linear(64, labels.shape[1])

    def loss() -> Tensor:
        rows = torch.randint(len(images), (32,))
        seen = network(pixel_values=moved(images[rows], torch.rand(32, 3), 0.1)).last_hidden_state[:, 1:]
        return nn.functional.binary_cross_entropy_with_logits(head(seen.mean(1)), labels[rows])

    fit(nn.ModuleList([network, head]), loss, steps, "teacher")
    return Teacher(network, [0.5] * 3, [0.5] * 3)


def reconstruction(
    teacher: Teacher, images: Tensor, held: Tensor, tau: float, seed: int, steps: int, name: str
) -> tuple[float, float]:
    """PSNR in dB of held-out pictures decoded from their tokens, and from tokens with noise of 0.3."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
    decoder = {f"decoder_{key}": value for key, value in sizes.items()}
    model = RepresentationAutoencoder.around(teacher, grid=8, patch_size=4, **decoder)

    def loss() -> Tensor:
        batch = images[torch.randint(len(images), (32,))]
        tokens = model.tokens(batch)
        sigma = noise_levels(torch.rand(len(batch)), tau, "uniform")
        restored = model.restore(tokens + sigma[:, None, None] * torch.randn_like(tokens))
        return (restored - batch).abs().mean() / 2

    fit(model.decoder, loss, steps, name)
    tokens = model.tokens(held)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        errors = [
            (model.restore(tokens + level * noise) - held).square().mean() for level in (0.0, TEST_NOISE)
        ]
    clean, noisy = (10 * math.log10(4 / float(error)) for error in errors)
    return clean, noisy


def decoder_claims(clean: Values, noisy: Values) -> list[Claim]:
    (off_clean, on_clean), (off_noisy, on_noisy) = (
        (values["without noise"], values["tau 0.8"]) for values in (clean, noisy)
    )
    limit = "emoji at 32 x 32, our own small teacher's tokens, L1 alone, a few hundred steps"
    better = statistics.mean(on_noisy) > statistics.mean(off_noisy)
    return [
        Claim("rae", "a decoder trained under noise restores noisy latents better", f"{PAPER}, section 4.3",
              f"PSNR of tokens with noise {TEST_NOISE}: {told(on_noisy, 2)} dB, without training under noise "
              f"{told(off_noisy, 2)} dB{'' if differs(on_noisy, off_noisy) else ': within seed noise'}",
              better, limit),
        Claim("rae", f"and clean latents only slightly worse: by less than {SLIGHTLY:g} dB",
              f"{PAPER}, section 4.3: rFID 0.49 to 0.57",
              f"PSNR of clean tokens: {told(on_clean, 2)} dB, without {told(off_clean, 2)} dB"
              f"{'' if differs(on_clean, off_clean) else ': within seed noise'}",
              0 < statistics.mean(off_clean) - statistics.mean(on_clean) < SLIGHTLY, limit),
    ]  # fmt: skip


def main() -> None:
    parser = record.arguments(__file__, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="at least two")
    parser.add_argument("--width-steps", type=int, default=1200)
    parser.add_argument("--shift-seeds", type=int, nargs="+", default=tuple(range(6)), help="of the shift's")
    parser.add_argument("--shift-steps", type=int, default=1200)
    parser.add_argument("--draws", type=int, default=20, help="sampling steps of the shift's test")
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--decoder-steps", type=int, default=300)
    options = parser.parse_args()
    widths = _study(
        WIDTHS, options.seeds, lambda make, seed, name: overfit(make, seed, options.width_steps, name)
    )
    shifts = _study(
        SHIFTS,
        options.shift_seeds,
        lambda shift, seed, name: sample_distance(shift, seed, options.shift_steps, options.draws, name),
    )
    images, labels, held = pictures()
    teacher = trained_teacher(images, labels, options.teacher_steps)
    both = _study(
        TAUS,
        options.seeds,
        lambda tau, seed, name: reconstruction(teacher, images, held, tau, seed, options.decoder_steps, name),
    )
    clean, noisy = ({name: [pair[i] for pair in pairs] for name, pairs in both.items()} for i in (0, 1))
    claims = width_claims(widths) + shift_claims(shifts, options.draws) + decoder_claims(clean, noisy)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    plan = {name: value for name, value in vars(options).items() if name != "json"}
    record.write(
        options.json, claims, machine, plan=plan, widths=widths, shifts=shifts, clean=clean, noisy=noisy
    )


def _study(
    variants: Mapping[str, Any], seeds: tuple[int, ...], measure: Callable[[Any, int, str], Any]
) -> dict[str, list[Any]]:
    """Every variant measured under every seed."""
    found: dict[str, list[Any]] = {name: [] for name in variants}
    for seed in seeds:
        for name, variant in variants.items():
            found[name].append(measure(variant, seed, f"{name}, seed {seed}"))
            tqdm.write(f"{name}, seed {seed}: {found[name][-1]}")
    return found


if __name__ == "__main__":
    main()
