"""In: folders of finished runs. Out: their records under docs/results/, short and without folders of this machine.

`cache-kd report docs/results/loss_ablation` reads them as it reads the runs' own; docs/results.md is made of them.

PYTHONPATH=. python scripts/keep_results.py runs/loss_ablation runs/views_curve
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cache_kd.report.record import FILE, RunRecord

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
DIGITS = 5
"""Significant digits of what is measured every epoch; what the finished weights score is kept whole."""


def short(value: Any) -> Any:
    """Return JSON with every float cut to `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [short(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def told(epoch: dict[str, Any]) -> dict[str, Any]:
    """Return an epoch without learning rates, and without the zeros that stand for what was not validated."""
    metrics = {
        name: value
        for name, value in epoch["metrics"].items()
        if name.startswith("train/") or (value and not name.startswith("lr/"))
    }
    return {**epoch, "metrics": metrics}


def kept(record: RunRecord) -> str:
    """Return the record as text, an epoch a line."""
    content = record.to_json()
    if content["cache"]:
        content["cache"]["path"] = Path(content["cache"]["path"]).name
    epochs = [json.dumps(short(told(epoch))) for epoch in content.pop("epochs")]
    head = json.dumps(content, indent=1, ensure_ascii=False)
    return head.removesuffix("\n}") + ',\n "epochs": [\n' + ",\n".join(epochs) + "\n ]\n}\n"


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folders: tuple[Path, ...]) -> None:
    """Keep the records of the runs in FOLDERS."""
    for folder in folders:
        for path in sorted(folder.glob(f"*/{FILE}")):
            record = RunRecord.read(path)
            target = RESULTS / folder.name / path.parent.name / FILE
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(kept(record), encoding="utf-8")
            if RunRecord.read(target).judged != record.judged:
                raise ValueError(f"{target} does not say what {path} does")
            click.echo(f"{target.relative_to(RESULTS.parent.parent)}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
