"""The commands of `python -m export`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from export.errors import ExportError
from export.export import ExportResult, export_preset
from export.fingerprint import ROOT
from export.parity import ParityError, Report
from export.repository import list_versions, remove_version, serve_version
from gigapath_contract.command_line import call, run
from gigapath_contract.reference import ParityRow
from gigapath_contract.schema import Contract
from training.errors import TrainingError

app = typer.Typer(
    help="Export PyTorch models to ONNX and TensorRT, and manage the versions in a Triton model repository.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)
Repository = Annotated[Path, typer.Option(help="Model repository.", envvar="MODEL_REPOSITORY")]
Number = Annotated[int, typer.Argument(help="Version number, as `versions` lists it.", metavar="VERSION")]
MaxTiles = Annotated[int, typer.Option(min=1, help="Tiles of the largest slide that the engines accept.")]
MaxMasks = Annotated[int, typer.Option(min=1, help="Masks of the largest occlusion request.")]
DEFAULT_REPOSITORY = ROOT / "model_repository"


@app.callback()
def export_command(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
) -> None:
    """Export PyTorch models to ONNX and TensorRT, and manage the versions in a Triton model repository."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)


@app.command("run")
def run_command(
    preset: Annotated[
        str | None, typer.Option(help="demo, gigapath-flash or gigapath.", show_default="demo")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or fp16-mixed; attribution stays fp32.")
    ] = "fp32",
    weights: Annotated[
        str | None,
        typer.Option(help="Folder with pytorch_model.bin and slide_encoder.pth, or hf-hub:OWNER/REPOSITORY."),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run of `finetune` or `tiles`; repeat it for both.")
    ] = None,
    slide: Annotated[
        Path | None, typer.Option(help="Slide for the parity report.", show_default="the quick start's")
    ] = None,
    occlusion_precision: Annotated[str, typer.Option(help="Precision of slide_occlusion.")] = "fp32",
    gpu_memory: Annotated[
        int | None, typer.Option(min=1, help="GiB of the GPU that is to serve.", show_default="a CPU serves")
    ] = None,
    patch_tokens: Annotated[
        bool, typer.Option("--patch-tokens", help="Serve every patch's token of a tile too: PATCH_TOKENS.")
    ] = False,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Export a preset: trace, compare with PyTorch, install as the next version and serve it.

    Example: python -m export run --preset gigapath --weights hf-hub:prov-gigapath/prov-gigapath
    """
    with stderr.status("exporting") as status:
        result = export_preset(
            preset,
            repository=repository,
            slide=slide,
            precision=precision,
            weights=weights,
            checkpoints=checkpoint or (),
            occlusion_precision=occlusion_precision,
            gpu_memory=gpu_memory,
            patch_tokens=patch_tokens,
            progress=lambda step: status.update(f"exporting: {step}"),
        )
    show(result)


def show(result: ExportResult) -> None:
    """Print the parity table and what was installed."""
    contract = Contract.parse(result.contract)
    if result.report is not None:
        console.print(parity_table(result.report))
        if tensor := result.report.tightest():
            console.print(
                f"largest of {len(result.report.half)} float16 tensors: {tensor.name} of {tensor.model} with "
                f"{tensor.largest:.3g}; 65,504 is {tensor.margin:.3g} times that",
                soft_wrap=True,
            )
    made = "exported" if result.report is not None else "unchanged"
    console.print(
        f"[bold]{made}[/]: {contract.preset} {contract.precision}, export {contract.export_id}, "
        f"is version {result.version} "
        f"({result.seconds:.1f} s, {result.peak_memory_bytes / 2**30:.1f} GiB at most)"
    )
    console.print(f"contract, parity report and reference: {result.folder}", soft_wrap=True)
    if not contract.trained:
        console.print("[yellow]These weights are untrained: their outputs carry no meaning.")
    repository = result.folder.parent.parent
    command = (
        "make serve" if repository == DEFAULT_REPOSITORY else f"python -m server --repository {repository}"
    )
    console.print(f"next: {command} (where a server runs already, end it first)", soft_wrap=True)


def parity_table(report: Report) -> Table:
    """The parity report for a terminal: of every output the worst comparison, and all that failed."""
    worst: dict[tuple[str, str], ParityRow] = {}
    for row in sorted(report.rows, key=lambda row: row.max_relative):
        worst[row.model, row.output] = row
    title = f"Parity with PyTorch float32 ({report.precision}): the worst of {len(report.rows)} comparisons"
    table = Table(title=title)
    numbers = ("max-abs", "relative", "min cosine")
    for title in ("model", "input", "output", *numbers, ""):
        table.add_column(title, justify="right" if title in numbers else "left")
    for row in report.rows:
        if row.passed and worst[row.model, row.output] is not row:
            continue
        verdict = "[green]ok[/]" if row.passed else "[red]FAILED[/]"
        measures = f"{row.max_abs:.1e}", f"{row.max_relative:.1e}", f"{row.min_cosine:.7f}"
        table.add_row(row.model, row.case, row.output, *measures, verdict)
    return table


@app.command("versions")
def versions_command(repository: Repository = DEFAULT_REPOSITORY) -> None:
    """List the installed versions; the one served is marked."""
    table = Table("", "version", "export", "preset", "precision", "trained", "GiB")
    for version in list_versions(repository):
        contract = version.contract
        table.add_row(
            *("[green]served" if version.served else "", str(version.number)),
            *(contract.export_id, contract.preset, contract.precision, "yes" if contract.trained else "no"),
            f"{version.size_bytes / 2**30:.2f}",
        )
    console.print(table)


@app.command("serve")
def serve_command(version: Number, repository: Repository = DEFAULT_REPOSITORY) -> None:
    """Serve an installed version, such as an earlier one, from Triton's next start on.

    Example: python -m export serve 1
    """
    contract = serve_version(repository, version)
    console.print(
        f"version {version} is served: {contract.preset} {contract.precision}, export {contract.export_id}; "
        "restart Triton to load it",
        soft_wrap=True,
    )


@app.command("remove")
def remove_command(version: Number, repository: Repository = DEFAULT_REPOSITORY) -> None:
    """Remove an installed version that is not the one served."""
    remove_version(repository, version)
    console.print(f"removed version {version}")


@app.command("engines")
def engines_command(
    repository: Repository = DEFAULT_REPOSITORY,
    max_tiles: MaxTiles = 50_000,
    tensorrt: Annotated[
        str | None,
        typer.Option(help="TensorRT version of the server (default: accept the installed one)."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Build nothing; fail if an engine is missing or stale.")
    ] = False,
) -> None:
    """Build TensorRT engines of the served version on this machine's GPU, and the configs that serve them.

    Example: make engines && MODEL_CONFIG=tensorrt docker compose up triton
    """
    from export import engines

    if check:
        gpu = engines.find_gpu()
        version = tensorrt or engines.import_tensorrt().__version__
        engines.check_metadata(repository, gpu=gpu, tensorrt=version)
        console.print("the engines are up to date")
        return
    with stderr.status("building engines") as status:
        plans = engines.build_engines(
            repository,
            max_tiles=max_tiles,
            tensorrt=tensorrt,
            progress=status.update,
        )
    for plan in plans.values():
        console.print(str(plan), soft_wrap=True)


@app.command("check-engines")
def check_engines_command(
    repository: Repository = DEFAULT_REPOSITORY, max_tiles: MaxTiles = 20_000, max_masks: MaxMasks = 16
) -> None:
    """Test without a GPU that TensorRT accepts the graphs: TensorRT-RTX builds them for SM80 and SM89."""
    from export.check_engines import check_engines

    table = Table(
        "model", "for", "layers", "MiB", "seconds", title="Engines built without a GPU (TensorRT-RTX)"
    )
    with stderr.status("building engines"):
        for check in check_engines(repository, max_tiles=max_tiles, max_masks=max_masks):
            size = f"{check.size_bytes / 2**20:.1f}"
            table.add_row(check.model, check.capability, str(check.layers), size, f"{check.seconds:.1f}")
    console.print(table)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1."""
    run(_app_with_parity, ExportError, TrainingError)


def _app_with_parity() -> None:
    try:
        call(app)
    except ParityError as error:
        console.print(parity_table(error.report))
        raise
