"""`motionmerge evaluate pocket`: measure the shipped model under the paper's conditions.

`evaluate_vbench.py` has the verbs for videos of any model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motionmerge.cli.evaluate_fvd import fvd
from motionmerge.cli.evaluate_ucf101 import ucf101
from motionmerge.cli.evaluate_vbench import check, total, vbench
from motionmerge.cli.help import Verb, VerbGroup
from motionmerge.cli.merge import counting_bar, parse_inputs
from motionmerge.cli.options import (
    JsonOption,
    MissingOption,
    ResultsOption,
    expert_option,
    output_option,
)
from motionmerge.cli.printing import aligned, print_json
from motionmerge.errors import ConfigError

if TYPE_CHECKING:
    from motionmerge.evaluation.pocket.claims import Claim
    from motionmerge.evaluation.pocket.conditions import Condition
    from motionmerge.evaluation.pocket.runs import ConditionResults

EXAMPLE = "Example: motionmerge evaluate pocket --condition knob --num 24 -o results"

evaluate_app = typer.Typer(
    help="Measure by published definitions: VBench-I2V, FVD, UCF101, the pocket model's claims.",
    epilog=EXAMPLE,
    cls=VerbGroup,
    no_args_is_help=True,
)


for verb, example in (
    (vbench, "vbench videos --weights dino=dino-vitb16"),
    (check, "check videos --suite vbench2_i2v_full_info.json"),
    (total, "total results"),
    (ucf101, "ucf101 UCF -o ucf --stride 3 --prompt class-name"),
    (fvd, "fvd real generated --network i3d_400.pt"),
):
    epilog = f"Example: motionmerge evaluate {example}"
    evaluate_app.command(verb.__name__, cls=Verb, epilog=epilog)(verb)


@evaluate_app.command("pocket", cls=Verb, epilog=EXAMPLE)
def pocket(
    split: Annotated[
        Literal["test", "validation"],
        typer.Option(help="test: held-out photos; validation: photos for choosing settings."),
    ] = "test",
    num: Annotated[
        int, typer.Option(min=6, max=100_000, metavar="NUMBER", help="Prompts per condition.")
    ] = 200,
    condition: Annotated[
        list[str] | None,
        expert_option(
            metavar="NAME",
            help="A condition, or a set of conditions such as knob; repeatable.",
            show_default="all",
        ),
    ] = None,
    replaced: Annotated[
        list[str] | None,
        expert_option(
            "--input",
            metavar="NAME=FILE",
            help="Weights to use in place of shipped ones, e.g. tuned=my.safetensors; repeatable.",
        ),
    ] = None,
    missing: MissingOption = "error",
    seed: Annotated[int, typer.Option(metavar="NUMBER", help="Seed of prompts and noise.")] = 0,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, metavar="NUMBER", help="Denoising steps.")
    ] = 12,
    output: ResultsOption = Path("evaluation-pocket"),
    write_docs: Annotated[
        bool,
        output_option("--write-docs", help="Put numbers and pictures into ./docs and ./README.md."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure motion degree, obedience and fidelity on held-out prompts, and judge the claims."""
    from motionmerge.evaluation.pocket.claims import judge
    from motionmerge.evaluation.pocket.conditions import paper_conditions, pick_conditions
    from motionmerge.evaluation.pocket.report import PAGE_FILE, write_evaluation_page
    from motionmerge.evaluation.pocket.runs import Protocol, evaluate
    from motionmerge.evaluation.pocket.tables import check_docs
    from motionmerge.evaluation.pocket.tables import write_docs as write_tables
    from motionmerge.io.atomic import check_file, check_folder
    from motionmerge.sampling.pipelines.pocket import load_pocket

    inputs = _own_weights(replaced or ())
    if inputs and write_docs:
        raise ConfigError(
            "--write-docs is about the shipped weights, and --input gives others.",
            fix="Leave one of them out.",
        )
    check_folder(output)
    check_file(output / PAGE_FILE)
    if write_docs:
        check_docs(Path.cwd())
    pipeline = load_pocket("base")
    protocol = Protocol(split, num, seed, steps)

    def run(conditions: Sequence[Condition]) -> dict[str, ConditionResults]:
        with counting_bar(len(conditions) * num, shown=not as_json) as tell:
            return evaluate(
                pipeline,
                conditions,
                protocol=protocol,
                folder=output,
                inputs=inputs,
                progress=tell,
                missing=missing,
            )

    results = run(pick_conditions(condition) if condition else paper_conditions())
    claims = judge(results)
    page = write_evaluation_page(results, claims, protocol=protocol, path=output / PAGE_FILE)
    _print_results(results, claims, as_json=as_json)
    typer.echo(f"The page: {page.resolve()}", err=True)
    if write_docs:
        from motionmerge.evaluation.pocket.decided import decided

        written = write_tables(
            results, protocol=protocol, alternatives=decided(pipeline.vae), root=Path.cwd()
        )
        for path in written:
            typer.echo(f"wrote {path}", err=True)


def _own_weights(pairs: Iterable[str]) -> dict[str, Path]:
    """Read `name=file` pairs.

    Raises:
        ConfigError: No such name or no such file.
    """
    from motionmerge.models.pocket.components import VARIANTS

    found = {name: Path(file) for name, file in parse_inputs(pairs).items()}
    for name, file in found.items():
        if name not in VARIANTS or not file.is_file():
            raise ConfigError(
                f"--input {name}={file} gives none of the pocket model's weights a file.",
                fix=f"Use NAME=FILE with a file that exists; names: {', '.join(VARIANTS)}.",
            )
    return found


def _print_results(
    results: Mapping[str, ConditionResults], claims: Sequence[Claim], *, as_json: bool
) -> None:
    from motionmerge.evaluation.pocket.tables import HEADINGS, table_row

    rows = [table_row(one) for one in results.values()]
    if as_json:
        print_json(
            {"conditions": [asdict(row) for row in rows], "claims": [asdict(one) for one in claims]}
        )
        return
    print("\n".join(aligned([HEADINGS, *(row.cells() for row in rows)], numbers=True)))
    for claim in claims:
        print(f"\n({claim.number}) {claim.text}: {claim.verdict}")
        for line in claim.evidence:
            print(f"    {line}")
