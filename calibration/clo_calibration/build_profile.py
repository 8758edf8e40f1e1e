"""Puts a profile together: GPU kernels fitted from measured tables, everything else from `costs/` with its source.

`python -m clo_calibration.build_profile` writes the shipped profiles anew. Knows nothing about schedules.
"""

from __future__ import annotations

import tomllib
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from clo.errors import CloError
from clo.files import write_json
from clo.profile import Profile
from clo_calibration.tables.block_indexer import block_indexer_costs
from clo_calibration.tables.fit import fit_tables
from clo_calibration.tables.indexer import indexer_costs
from clo_calibration.tables.linear import linear_costs
from clo_calibration.tables.measurements import GPUS
from clo_calibration.tables.prefill import prefill_costs

CARRIED_OVER = {"gh200": "h200"}
"""GPUs that nobody measured, with costs of their own, by the one whose kernel times they borrow."""

NOTE = (
    "GEMM, experts, decode attention and all-reduce: fitted from measurements of vLLM kernels, latent attention of "
    "SGLang's (A100 and fp8 vectors: TensorRT-LLM's), indexers of both, linear attention of vLLM (A100: SGLang), "
    "published in aiconfigurator-core. "
    "Transfers, launches, synchronisation and selection kernels: literature or assumed, never measured by this project."
)


def build_profile(gpu: str, data_root: Path | None = None) -> Profile:
    """A profile of `gpu` from fitted tables and the cost files."""
    fitted = fit_tables(CARRIED_OVER.get(gpu, gpu), data_root)
    return Profile(
        name=gpu,
        machine=gpu,
        date=date.today().isoformat(),
        note=NOTE,
        **fitted.tables,
        **prefill_costs(CARRIED_OVER.get(gpu, gpu), data_root),
        **indexer_costs(CARRIED_OVER.get(gpu, gpu), data_root),
        **block_indexer_costs(CARRIED_OVER.get(gpu, gpu), fitted.tables, data_root),
        **linear_costs(CARRIED_OVER.get(gpu, gpu), data_root),
        **_costs(gpu),
    )


def _costs(gpu: str) -> dict[str, Any]:
    """Common costs, overridden field by field by the GPU's own file where there is one."""
    costs = _read("common")
    for name, changes in _read(gpu).items():
        costs[name] = costs[name] | changes
    return costs


def _read(name: str) -> dict[str, Any]:
    path = Path(str(files("clo_calibration"))) / "costs" / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("calibration/profiles"), show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Folder of aiconfigurator_core, if not installed.")
@click.argument("gpus", nargs=-1)
def main(out: Path, data: Path | None, gpus: tuple[str, ...]) -> None:
    """Fit and write profiles (of all GPUs by default)."""
    for gpu in gpus or (*GPUS, *CARRIED_OVER):
        profile = build_profile(gpu, data)
        path = out / f"{gpu}.json"
        write_json(path, profile.model_dump(mode="json"))
        click.echo(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    try:
        main()
    except CloError as error:
        raise SystemExit(f"error: {error}") from None
