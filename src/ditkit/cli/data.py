"""`ditkit data`: the data sets that ship with the package, and latents made of any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit.cli.common import UsageError, console, guarded, listed, writable_file, writable_folder


def add_to(app: typer.Typer) -> None:
    data = typer.Typer(
        help="Look at the data sets that ship with ditkit; encode pictures once.", no_args_is_help=True
    )
    data.command(epilog="Example: ditkit data emoji --preview sheet.png")(guarded(emoji))
    data.command(epilog="Example: ditkit data motion --preview clips.gif")(guarded(motion))
    data.command(
        epilog="Example: ditkit data cache-latents --autoencoder vae --data kind=folder --data path=photos "
        "--data size=256 --out latents"
    )(guarded(cache_latents))

    @data.callback(epilog="Example: ditkit data emoji")
    def _group() -> None:
        pass

    app.add_typer(data, name="data")


def emoji(
    preview: Annotated[
        Path | None, typer.Option("--preview", help="Write a sheet of pictures to this .png or .webp file.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=0, help="Pictures on the sheet; 0 for all.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which pictures.")] = 0,
) -> None:
    """Emoji with their names: how many there are, and a preview."""
    if preview is not None:
        writable_file(preview, (".png", ".webp"), "--preview")
    from rich.table import Table

    from ditkit.data import emoji as library

    rows = library.EmojiDataset().rows
    table = Table("group", "pictures", "held out", "for example", header_style="bold", pad_edge=False)
    for group in library.GROUPS:
        members = [row.caption for row in rows if row.group == group]
        held_out = sum(map(library.is_held_out, members))
        table.add_row(group, str(len(members)), str(held_out), members[len(members) // 2] if members else "")
    console.print(table)
    if preview is not None:
        preview.parent.mkdir(parents=True, exist_ok=True)
        library.preview(preview, count, seed)
        listed([preview])


def motion(
    preview: Annotated[
        Path | None,
        typer.Option("--preview", help="Write the clips, side by side, to this .gif or .mp4 file."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Clips, and captions listed.")] = 12,
    objects: Annotated[int, typer.Option("--objects", min=1, max=5, help="At most so many in a clip.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which clips.")] = 0,
) -> None:
    """Clips of moving emoji with captions, the training data of micro-wan: captions, and a preview."""
    from ditkit.cli.generate import CLIPS

    if preview is not None:
        writable_file(preview, CLIPS, "--preview")
    from ditkit.analysis.videos import save_clip, wall
    from ditkit.data.config import MotionConfig
    from ditkit.data.emoji_motion import EmojiMotion, videos

    source = EmojiMotion(MotionConfig(count=(1, objects), background="soft"), seed=seed)
    for index in range(count):
        console.print(f"{index:4d}  {source.scene(index)[2]}", highlight=False, soft_wrap=True)
    if preview is not None:
        frames = videos([source.clip(index) for index in range(count)]).permute(0, 2, 3, 4, 1).numpy()
        listed([save_clip(wall(frames / 2 + 0.5, columns=6), preview)])


def cache_latents(
    autoencoder: Annotated[
        Path,
        typer.Option("--autoencoder", help="Folder of an AutoencoderKL, or of a representation autoencoder."),
    ],
    data: Annotated[
        list[str],
        typer.Option("--data", help="key=value of a training file's data section: kind, path, size, ..."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the latents.")],
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Pictures of a shard.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures encoded at a time.")] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Encode pictures once; train on them with data: {kind: latents, path: FOLDER}. Stopped work goes on."""
    writable_folder(out)
    if not (autoencoder / "config.json").is_file():
        raise UsageError(f"--autoencoder {autoencoder}: no folder of an autoencoder, it has no config.json")
    section = _data_section(data)
    from ditkit.data.latent_cache import CacheOptions, cache_latents
    from ditkit.data.latents import read_manifest

    try:
        options = CacheOptions(shard_size, batch, dtype)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    folder = cache_latents(section, autoencoder, out, options)
    facts = read_manifest(folder)
    console.print(f"{facts['count']} latents in {len(facts['shards'])} shards", highlight=False)
    listed([folder])


def _data_section(items: list[str]) -> Any:
    """The data section that `key=value` texts describe.

    Raises:
        UsageError: not of that form, or a key or value that the section does not take.
    """
    import yaml
    from pydantic import ValidationError

    from ditkit.data.config import DataConfig

    values: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--data {item!r} is not of the form key=value, such as kind=folder")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key.strip()] = value
    try:
        return DataConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"--data {where}: {first['msg']}") from None
