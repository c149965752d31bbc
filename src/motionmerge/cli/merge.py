"""`motionmerge merge`: carry out a recipe and write its experts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionmerge.cli.flag_groups import with_flags
from motionmerge.cli.options import (
    DryRunOption,
    InputOption,
    JsonOption,
    LayoutOption,
    MissingOption,
    MotionOption,
    NonfiniteOption,
    OutputOption,
    OverwriteOption,
    RecipeArgument,
    ScaledDtypeOption,
    SetOption,
    ShardOption,
    StochasticOption,
)
from motionmerge.cli.printing import harmless, harmless_lines
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.merging.merge import ReportProgress
    from motionmerge.merging.recipes.recipe import Recipe

EXAMPLE = "Example: motionmerge merge edg-official -o experts"


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """What `merge` and all exports are told of a recipe's inputs, numbers and files."""

    replaced: InputOption = None
    changed: SetOption = None
    motion: MotionOption = None
    missing: MissingOption = "error"
    dry_run: DryRunOption = False
    overwrite: OverwriteOption = False
    as_json: JsonOption = False

    def recipe(self, name: str) -> Recipe:
        """Load a recipe with the parameters that --set and --motion give.

        Raises:
            RecipeError: There is no such recipe or parameter.
            ConfigError: As `parse_parameters`.
        """
        from motionmerge.merging.recipes.recipe import Recipe

        return Recipe.load(name).with_parameters(**parse_parameters(self.changed, self.motion))

    def options(self) -> dict[str, Any]:
        """Return the flags as the arguments that merging and all exports take."""
        return {
            "inputs": parse_inputs(self.replaced or []),
            "missing": self.missing,
            "dry_run": self.dry_run,
            "overwrite": self.overwrite,
        }


@with_flags
def merge(
    recipe: RecipeArgument,
    output: OutputOption,
    dtype: ScaledDtypeOption = None,
    flags: RecipeFlags = RecipeFlags(),
    allow_nan: NonfiniteOption = False,
    max_shard_size: ShardOption = None,
    layout: LayoutOption = "weights",
    stochastic_rounding: StochasticOption = None,
) -> None:
    """Write the experts of a recipe, each to OUTPUT/EXPERT.safetensors."""
    carry_out(
        flags.recipe(recipe),
        output,
        as_json=flags.as_json,
        dtype=dtype,
        allow_nonfinite=allow_nan,
        max_shard_size=max_shard_size,
        layout=layout,
        stochastic_rounding=stochastic_rounding,
        **flags.options(),
    )


def carry_out(recipe: Recipe, output: Path, *, as_json: bool, **options: Any) -> None:
    """Merge with a progress bar on stderr and the report on stdout."""
    from motionmerge.io.atomic import check_folder
    from motionmerge.merging.merge import merge as run

    check_folder(output)
    with progress_bar("merge") as progress:
        report = run(recipe, output, progress=progress, **options)
    print(json.dumps(report.to_dict(), indent=2) if as_json else harmless_lines(str(report)))


def parse_parameters(changed: Sequence[str] | None, motion: float | None) -> dict[str, float]:
    """Read the `NAME=NUMBER` of --set, and --motion.

    Raises:
        ConfigError: One is no NAME=NUMBER, or a parameter is given twice.
    """
    parameters: dict[str, float] = {} if motion is None else {"motion": motion}
    for pair in changed or ():
        name, _, text = pair.partition("=")
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(
                f"--set {pair} is not NAME=NUMBER.", fix="Write e.g. `--set motion=0.5`."
            ) from error
        if name in parameters:
            raise ConfigError(f"The parameter `{name}` is given twice.", fix="Give it once.")
        parameters[name] = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else value
    return parameters


def parse_inputs(pairs: Iterable[str], *, flag: str = "--input") -> dict[str, str]:
    """Read the `NAME=PATH` of --input, or of another flag.

    Raises:
        ConfigError: One of them has no `=`.
    """
    parsed = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                f"{flag} {pair} is not NAME=PATH.", fix=f"Write e.g. `{flag} name=FILE`."
            )
        parsed[name] = path
    return parsed


@contextmanager
def counting_bar(total: int | None, *, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Show a bar on stderr; it is told the name of what is done, and how many more are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, done: bar.update(task, description=escape(harmless(name)), advance=done)


@contextmanager
def progress_bar(task_name: str) -> Iterator[ReportProgress | None]:
    """Show bytes, rate and time left; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(task_name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
