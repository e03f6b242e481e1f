"""`ditkit methods`, `ditkit models`, `ditkit objectives` and `ditkit adapters`: what there is."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.table import Table

from ditkit.cli.common import UsageError, bar, console, guarded


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: ditkit methods taylorseer")(guarded(methods))
    app.command(epilog="Example: ditkit models")(guarded(models))
    app.command(epilog="Example: ditkit objectives distillation")(guarded(objectives))
    app.command(epilog="Example: ditkit adapters diffscaler")(guarded(adapters))


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's options.")] = None,
) -> None:
    """List the methods with their papers, the seams they act on and what they need."""
    _show("method", name)


def models(
    name: Annotated[
        str | None, typer.Argument(help="Count this architecture's configurations, or one: dico, dico-xl.")
    ] = None,
    classes: Annotated[
        bool,
        typer.Option("--classes", help="List what methods can do on each transformer class of diffusers."),
    ] = False,
) -> None:
    """List the bundled pipelines and the architectures; with a name, its sizes beside the published ones."""
    if classes:
        _show_classes()
        return
    if name is None:
        from ditkit.hub import BUNDLED

        table = Table("pipeline", "what it is", header_style="bold", pad_edge=False)
        for bundled, summary in BUNDLED.items():
            table.add_row(bundled, summary)
        console.print(table)
        _show("model", None)
        return
    from ditkit.models import split

    architecture, variant = split(name)
    _show("model", architecture)
    _sizes(architecture, variant)


def objectives(
    name: Annotated[str | None, typer.Argument(help="Show this objective's options.")] = None,
) -> None:
    """List what a training file's `objective:` can name: changes to the loss, with their papers."""
    _show("objective", name)


def adapters(
    name: Annotated[str | None, typer.Argument(help="Show this adapter's options.")] = None,
) -> None:
    """List what `ditkit adapt --method` can name: parameters beside a frozen model, with their papers."""
    _show("adapter", name)


def _sizes(architecture: str, variant: str | None) -> None:
    """Parameters and multiply-adds of the configurations, counted here, beside the published ones."""
    from ditkit.models.sizes import PUBLISHED, Size, measure, named

    names = [f"{architecture}-{variant}"] if variant else named(architecture)
    if unknown := set(names) - set(named(architecture)):
        raise UsageError(f"no configuration {unknown.pop()!r}; there are {', '.join(named(architecture))}")

    def millions(count: float | None) -> str:
        return "" if count is None else f"{count / 1e6:,.1f} M"

    def billions(count: float | None) -> str:
        return "" if count is None else f"{count:,.2f} G"

    columns = ("configuration", "parameters", "published", "multiply-adds", "published")
    table = Table(*columns, header_style="bold", pad_edge=False)
    with bar("configurations") as progress:
        sizes = {name: measure(name) for name in progress.track(names, description="counting")}
    for name, size in sizes.items():
        published = PUBLISHED.get(name, Size(None))
        table.add_row(
            name,
            millions(size.parameters),
            millions(published.parameters),
            billions(size.multiply_adds),
            billions(published.multiply_adds),
        )
    console.print(table)


def _show_classes() -> None:
    from ditkit.seams.anatomy import Seam
    from ditkit.seams.coverage import rows
    from ditkit.seams.facts import UNSUPPORTED

    seams: tuple[Seam, ...] = ("stack", "units", "tokens", "attention")
    table = Table("class", "text", *seams, header_style="bold", pad_edge=False, box=None)
    table.columns[0].no_wrap = True
    for row in rows():
        table.add_row(row.name, row.text, *("yes" if row.allows(seam) else "no" for seam in seams))
    console.print(table)
    console.print("stack: skip the blocks; units: replace parts of a block; tokens: leave tokens out")
    table = Table("not supported", "reason", header_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    for name, reason in sorted(UNSUPPORTED.items()):
        table.add_row(name, reason)
    console.print(table)


def _show(kind: str, name: str | None) -> None:
    from ditkit import registry

    if name is not None:
        detail(registry.get(kind, name))  # pyright: ignore[reportArgumentType]
        return
    entries = registry.entries(kind).values()  # pyright: ignore[reportArgumentType]
    told = {
        "seam": [", ".join(entry.seam) for entry in entries],
        "needs": [", ".join(entry.needs) for entry in entries],
    }
    # What is the same of all tells nothing, and takes the room of what does.
    told = {name: cells for name, cells in told.items() if len(set(cells)) > 1}
    narrow = console.width < 100  # no room for five columns
    table = Table(header_style="bold", pad_edge=False)
    table.add_column(kind, no_wrap=True)
    table.add_column("what it does", overflow="fold")
    table.add_column("arXiv", no_wrap=True)
    for name in () if narrow else told:
        table.add_column(name)
    for entry, *cells in zip(entries, *told.values(), strict=True):
        paper = f"[link={entry.paper.url}]{entry.paper.arxiv}[/link]"
        if narrow and cells:
            below = "; ".join(f"{name}: {cell}" for name, cell in zip(told, cells, strict=True))
            table.add_row(entry.name, f"{entry.summary}\n[dim]{below}[/]", paper)
        else:
            table.add_row(entry.name, entry.summary, paper, *cells)
    console.print(table)


def _keys(section) -> None:
    """The keys of a section of a training file."""
    from rich.markup import escape

    table = Table("key", "type", "default", header_style="bold", pad_edge=False)
    for name, field in section.model_fields.items():
        default = "needed" if field.is_required() else str(field.default)
        kind = getattr(field.annotation, "__name__", str(field.annotation))
        table.add_row(name, escape(kind), escape(default))
    console.print(table)
    if section.__doc__:
        console.print(escape(" ".join(section.__doc__.split())), highlight=False)


def detail(entry) -> None:
    from rich.markup import escape

    from ditkit import registry

    console.print(f"[bold]{entry.name}[/]  {escape(entry.summary)}")
    console.print(f"{escape(entry.paper.title)}, {entry.paper.year}, {entry.paper.url}", highlight=False)
    if entry.aliases:
        console.print(f"also called {', '.join(entry.aliases)}", highlight=False)
    console.print(f"seam: {', '.join(entry.seam)}; needs: {', '.join(entry.needs)}", highlight=False)
    if entry.kind == "objective":
        _keys(entry.target.Options)
    if not dataclasses.is_dataclass(entry.target):
        return
    table = Table("option", "type", "default", "tune tries", header_style="bold", pad_edge=False)
    search = getattr(entry.target, "search", {})
    for field in registry.options(entry).values():
        default = "" if field.default is dataclasses.MISSING else str(field.default)
        tried = escape(str(search.get(field.name, "")))
        table.add_row(field.name, escape(str(field.type)), escape(default), tried)
    console.print(table)
    neutral = ",".join(f"{key}={value}" for key, value in entry.neutral.items())
    if neutral:
        console.print(f"changes nothing with {entry.name}:{neutral}", highlight=False)
