"""Does a small LaMamba-Diff need both of its mixers? Scan and window attention, or one of them, with wider
MLPs in place of the other, so that all have as many parameters.

    python -m benchmarks.architectures.lamamba_diff [--steps 200] [--seeds 0 1 2]
"""

from __future__ import annotations

from typing import Any

from benchmarks.architectures import toy
from benchmarks.record import Claim
from ditkit.models.lamamba_diff import LaMambaDiff

PLAN = toy.Plan(steps=200, seeds=(0, 1, 2), batch=16)
CONFIG: dict[str, Any] = toy.CONFIG | {
    "input_size": toy.SIDE,
    "patch_size": 2,
    "hidden_size": 16,
    "depth": (1, 1, 0, 0),
    "middle_depth": 1,
    "num_heads": 2,
    "window_size": 4,
    "ssm_state": 1,
    "extra_decoder_blocks": False,
    "learn_sigma": False,
}
MIXERS = {"scan and windows": ("op", "attn"), "scan alone": ("op",), "windows alone": ("attn",)}


def built(mixers: tuple[str, ...], mlp_ratio: float = 4.0) -> LaMambaDiff:
    """A network whose other mixer adds nothing."""
    model = LaMambaDiff(**CONFIG, mlp_ratio=mlp_ratio)
    stage: Any
    for stage in (*model.layers, model.mid_layer, *model.layers_up):
        for block in stage.blocks:
            for name in {"op", "attn"} - set(mixers):
                setattr(block, name, toy.Nothing())
    return model


def matched_ratio(mixers: tuple[str, ...]) -> float:
    """Hidden width of the MLPs over the width with which a network has the parameters of the complete one."""
    missing = toy.parameters(built(("op", "attn"))) - toy.parameters(built(mixers))
    each = toy.parameters(built(mixers, 5.0)) - toy.parameters(built(mixers, 4.0))
    return 4 + round(16 * missing / each) / 16  # the narrowest stage is 16 wide


def claims(found: dict[str, list[toy.Trained]], ratios: dict[str, float], plan: toy.Plan) -> list[Claim]:
    errors = {name: toy.losses(runs) for name, runs in found.items()}
    counts = [toy.parameters(built(MIXERS[name], ratios[name])) for name in MIXERS]
    limit = (
        f"{plan}, first width {CONFIG['hidden_size']}, 8x8 to 2x2 tokens; "
        f"{min(counts):,} to {max(counts):,} parameters"
    )
    claimed = []
    for alone in ("scan alone", "windows alone"):
        holds, measured = toy.compare(
            ("scan and windows", errors["scan and windows"]), (alone, errors[alone])
        )
        text = f"scan and window attention reach a lower error than {alone}, at equal parameters"
        claimed.append(Claim("lamamba-diff", text, "arXiv 2408.02615, by FID", measured, holds, limit))
    return claimed


def main() -> None:
    options = toy.arguments(__file__, __doc__, PLAN).parse_args()
    plan = toy.plan_of(options)
    ratios = {name: matched_ratio(mixers) for name, mixers in MIXERS.items()}
    variants = {
        name: lambda name=name, mixers=mixers: built(mixers, ratios[name]) for name, mixers in MIXERS.items()
    }
    found = toy.study(variants, plan)
    toy.write(options.json, claims(found, ratios, plan), plan, found, mlp_ratios=ratios)


if __name__ == "__main__":
    main()
