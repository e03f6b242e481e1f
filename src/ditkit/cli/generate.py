"""`ditkit generate`: pictures and clips from text, pictures of classes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit.cli.common import UsageError, bar, existing_file, guarded, listed, notices, writable_file

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CLIPS = (".mp4", ".gif")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="micro-flux, micro-wan, a folder of a pipeline, such as training exports, or a hub id.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale; the model's own if not given.")
]
Size = Annotated[
    str | None,
    typer.Option("--size", help="Pixels, 64 or 96x64 (width x height); the model's own if not given."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Picture i starts from the noise of seed + i.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="At most so many pictures at a time.")]


StepsOfRecipe = Annotated[
    int | None, typer.Option("--steps", min=1, help="Denoising steps; the recipe's, else 28, if not given.")
]
STEPS = 28


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog='Example: ditkit generate "red apple" --with taylorseer:interval=4 --seed 7 --out apple.png'
    )(guarded(generate))


def generate(
    prompt: Annotated[
        list[str],
        typer.Argument(
            help="What to draw, a class's name or number for a class-conditional model; several prompts "
            "give several pictures."
        ),
    ],
    model: Model = "micro-flux",
    with_: Annotated[
        list[str] | None,
        typer.Option("--with", "-w", help="A method as name:option=value,...; repeat it to combine methods."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="A recipe.yaml that `ditkit tune` wrote; methods of --with come after it."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="A folder that `ditkit adapt` wrote, or FOLDER:0.7 to add so much of it; several add up.",
        ),
    ] = None,
    seed: Seed = 0,
    steps: StepsOfRecipe = None,
    guidance: Guidance = None,
    guide_model: Annotated[
        Path | None,
        typer.Option(
            "--guide-model",
            help="Folder of a weaker model of the same classes: guide away from its prediction, instead of "
            "from that without a class.",
        ),
    ] = None,
    guide_range: Annotated[
        str | None,
        typer.Option(
            "--guide-range",
            help="Shares of noise between which guidance acts, such as 0.1,0.9; 0,1 if not given.",
        ),
    ] = None,
    size: Size = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Frames of a clip; the model's own if not given.")
    ] = None,
    batch: Batch = 8,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="One picture with all prompts side by side.")
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="A clip ends in .mp4 or .gif; as a picture it is five frames side by side. Several prompts: "
            "numbered files apple-1.png, apple-2.png, ...",
        ),
    ] = Path("out/picture.png"),
) -> None:
    """Draw pictures or clips from text, with any methods applied."""
    writable_file(out, (*PICTURES, *CLIPS))
    if any(not text.strip() for text in prompt):
        raise UsageError("a prompt is empty")
    pixels, interval = parse_size(size), parse_interval(guide_range)
    from ditkit.analysis import pictures
    from ditkit.analysis.contestants import parse
    from ditkit.analysis.sampling import Sampling, draws_classes, draws_clips, sample
    from ditkit.analysis.videos import save_clip
    from ditkit.recipes import Recipe

    methods = [method for text in with_ or () for method in parse(text)]
    opened = None if recipe is None else Recipe.load(existing_file(recipe, "--recipe"))
    if opened is not None:
        methods = [*opened.build(), *methods]
        told = opened.settings
        steps = steps or opened.steps or told.steps
        guidance, pixels = told.guidance if guidance is None else guidance, pixels or told.size
    wanted = [_weighted(text) for text in adapter or ()]
    pipe = load(model)
    if wanted:
        _put_on(pipe, wanted)
    if out.suffix.lower() in CLIPS and not draws_clips(pipe):
        raise UsageError(
            f"--out {out}: {model} draws pictures, not clips; end the name in {' or '.join(PICTURES)}"
        )
    if frames is not None and not draws_clips(pipe):
        raise UsageError(f"--frames {frames}: {model} draws pictures, not clips")
    check_prompts(pipe, prompt)
    if not draws_classes(pipe) and (guide_model is not None or interval is not None):
        raise UsageError(
            f"--guide-model and --guide-range are of class-conditional models; {model} draws from text"
        )
    if guide_model is not None:
        _guide(pipe, guide_model)
    if opened is not None:
        opened.check(pipe)
    sampling = Sampling(steps or STEPS, guidance, pixels, seed, frames, interval)
    with applied(pipe, methods) as run, step_bar(sampling.steps * -(-len(prompt) // batch)) as on_step:
        drawn = sample(pipe, prompt, sampling, on_step, batch)
        report = run.report() if run is not None else None
    if drawn.clips is not None and out.suffix.lower() in CLIPS:
        targets = numbered(out, len(prompt))
        written = [save_clip(clip, path) for clip, path in zip(drawn.clips, targets, strict=True)]
    elif sheet:
        cell = 112 if drawn.clips is None else 320  # a clip is a strip of frames
        written = [pictures.save(pictures.sheet({"": drawn.pictures}, prompt, cell), out)]
    else:
        targets = numbered(out, len(prompt))
        images = [pictures.to_image(picture) for picture in drawn.pictures]
        written = [pictures.save(image, path) for image, path in zip(images, targets, strict=True)]
    listed(written)
    what = "picture(s)" if drawn.clips is None else "clip(s)"
    notices.print(f"{len(prompt)} {what} in {drawn.seconds:.2f} s", highlight=False)
    if report is not None:
        notices.print(report)


def _weighted(text: str) -> tuple[Path, float]:
    """Folder and weight of `FOLDER` or `FOLDER:0.7`.

    Raises:
        UsageError: no such folder, or a weight that is none.
    """
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_dir():
        folder, weight = text, "1"
    if not Path(folder).is_dir():
        raise UsageError(f"--adapter {text}: no folder {folder}")
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise UsageError(f"--adapter {text}: {weight!r} is not a number") from None


def _put_on(pipe: Any, wanted: list[tuple[Path, float]]) -> None:
    """Load adapters and switch to all of them at once."""
    from ditkit.adapters import store

    weights = {}
    for place, (folder, weight) in enumerate(wanted):
        weights[store.load(pipe, folder, f"adapter-{place}")] = weight
    store.use(pipe, weights)


def check_prompts(pipe: Any, prompts: list[str]) -> None:
    """Refuse classes that the model does not have; one that draws from text takes any prompt.

    Raises:
        UsageError: with the nearest names.
    """
    from ditkit.analysis.sampling import draws_classes

    for text in prompts if draws_classes(pipe) else ():
        try:
            pipe.find(text)
        except ValueError as error:
            raise UsageError(str(error)) from None


def _guide(pipe: Any, folder: Path) -> None:
    """Guide a pipeline by the model in a folder.

    Raises:
        UsageError: there is none, or it does not fit.
    """
    from ditkit.models import load as load_model

    try:
        pipe.guide_by(load_model(folder).eval())
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--guide-model {folder}: {error}") from None


def load(model: str) -> Any:
    """The text-to-picture or text-to-video pipeline, without its own progress bar: the commands have theirs.

    Raises:
        FileNotFoundError: there is no such model.
        UsageError: it draws from something else than text.
    """
    import diffusers
    import transformers

    from ditkit.analysis.sampling import Sampling, call_arguments
    from ditkit.hub import load as from_hub

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    with notices.status(f"loading {model}"):
        pipe = from_hub(model)
    pipe.set_progress_bar_config(disable=True)
    try:
        call_arguments(pipe, Sampling(), 1)
    except TypeError as error:
        raise UsageError(f"--model {model}: {error}") from None
    return pipe


def applied(pipe: Any, methods: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """The methods applied to the pipeline while the body runs; yields None when there is none."""
    if not methods:
        return contextlib.nullcontext()
    from ditkit.seams.apply import apply

    return apply(pipe, *methods)


@contextlib.contextmanager
def step_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over denoising steps; yields what to call after each of them."""
    with bar("steps") as progress:
        task = progress.add_task("drawing", total=total)
        yield lambda _: progress.advance(task)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`"64"` or `"96x64"` (width x height) as (height, width).

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None or "0" in (match[1].lstrip("0") or "0", (match[2] or "1").lstrip("0") or "0"):
        raise UsageError(f"--size {text!r}: give pixels as 64, or as 96x64 (width x height)")
    width = int(match[1])
    return (int(match[2]) if match[2] else width, width)


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """`"0.1,0.9"` as two shares.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    try:
        first, last = (float(part) for part in text.split(","))
    except ValueError:
        first, last = -1.0, -1.0
    if not 0 <= first <= last <= 1:
        raise UsageError(f"--guide-range {text!r}: give two shares of noise from 0 to 1, such as 0.1,0.9")
    return first, last


def numbered(out: Path, count: int) -> list[Path]:
    """`apple.png` for one picture; `apple-1.png`, `apple-2.png`, ... with equal digits for several."""
    if count == 1:
        return [out]
    digits = len(str(count))
    return [out.with_stem(f"{out.stem}-{i:0{digits}d}") for i in range(1, count + 1)]
