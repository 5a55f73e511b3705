"""In: documents with marked blocks. Out: the same, each block holding what the program says or measured now.

`<!-- help:extract -->` on the line before a fence holds `cache-kd extract --help` (`<!-- help: -->` the program's own);
what stands between `<!-- table:NAME -->` and `<!-- end -->` is a table made from the registry of losses or from the
newest record of a benchmark. `python -m scripts.update_docs` rewrites the documents; tests/test_docs.py fails while one
is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from cache_kd.cache.layout import stored_columns as with_lengths
from cache_kd.cli import main
from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.losses.catalogue import catalogue, cost_in_words, needs_in_words, setting
from cache_kd.pipeline.contents import stored_columns
from cache_kd.structures import Column, HeadSpec, Tap
from cache_kd.views.packing import JpegPixels
from scripts.measured_tables import TABLES as MEASURED
from scripts.measured_tables import newest, rows
from scripts.results_tables import TABLES as RESULTS
from scripts.scale_tables import TABLES as SCALE

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
WIDTH = 100
HELP = re.compile(r"(?P<head><!-- help:(?P<name>[^\n]*?) -->\n+```\w*\n)(?P<body>.*?)(?P<foot>^```$)", re.M | re.S)
TABLE = re.compile(r"(?P<head><!-- table:(?P<name>[^\n]*?) -->\n)(?P<body>.*?)(?P<foot>^<!-- end -->$)", re.M | re.S)
STAGES = ("early", "middle", "late")
LENGTH = "bytes of the row before it that are meant"
MEANINGS = {
    "features": "coded maps of P3, P4, P5 in a row; see below",
    "feature_tables": "what the codes are read with; see below",
    "feature_peaks": "the codes that are in no window; see below",
    "feature_peaks_length": LENGTH,
    "score_map": "(A): largest class probability of each anchor: its logit in steps of 1/8; `exact`: itself",
    "logits": "sparse class and box logits; see below",
    "logits_length": LENGTH,
    "scores": "(A, C): class logits",
    "boxes": "(A, 4·R): box logits minus their largest a side, sides l, t, r, b; R = 1: distances in strides",
    "hold_stats": "mean, and sum of squared deviations, of each channel of the head's hold features",
    "pixels": "the view as a JPEG or PNG file of (H, W) RGB",
    "pixels_length": LENGTH,
    "labels": "boxes of the view, five float32 each: class, then x, y, w, h as shares of its side",
    "labels_length": LENGTH,
    "pixel_hash": "blake2b-64 of the view's C-order (3, H, W) RGB bytes",
}


def help_text(command: str) -> str:
    """Return the help of a command as printed on a terminal 100 columns wide; "" is the program itself.

    Raises:
        ValueError: There is no such command.
    """
    words = [*command.split(), "--help"]
    result = CliRunner().invoke(main, words, prog_name="cache-kd", terminal_width=WIDTH, max_content_width=WIDTH)
    if result.exit_code:
        raise ValueError(f"README marks the help of {command!r}, known: {', '.join(sorted(main.commands))}")
    return result.output.rstrip() + "\n"


def losses_table() -> str:
    """Return every loss: paper, what it transfers, needs, protocol, cost, default weight."""
    head = ["loss", "paper", "transfers", "needs", "protocol", "cost", "weight"]
    body = [
        [
            f"`{loss['name']}`", loss["paper"], loss["title"], needs_in_words(loss), loss["protocol"],
            cost_in_words(loss), f"{loss['default_weight']:g}",
        ]
        for loss in catalogue()
    ]  # fmt: skip
    return rows(head, body) + f"\n{setting()[0].upper()}{setting()[1:]}.\n"


def options_table() -> str:
    """Return every option of every loss with its default and what is allowed; `layers` is said apart."""
    body = [
        [f"`{loss['name']}`", f"`{name}`", f"`{rule['default']}`", rule["allowed"] or rule["type"]]
        for loss in catalogue()
        for name, rule in loss["options"].items()
        if name != "layers"
    ]
    return rows(["loss", "option", "default", "allowed"], body)


def weights_table() -> str:
    """Return the weights at which a term's gradient had the wanted ratio, by data set and stage."""
    records = [newest(f"loss-weights-{name}") for name in ("bccd-160", "coco128-320", "coco128-320-trained")]
    labels = ["bccd, 160 px", "coco128, 320 px", "coco128, trained student"]
    head = ["loss", "default", *(f"{label}: early / middle / late" for label in labels)]
    body = []
    for loss in catalogue():
        found = [record["figures"].get(loss["name"]) for record in records]
        cells = [" / ".join(f"{stages[stage]:.2g}" for stage in STAGES) if stages else "-" for stages in found]
        body.append([f"`{loss['name']}`", f"{loss['default_weight']:g}", *cells])
    return rows(head, body)


def every_loss_table() -> str:
    """Return the short training with every single loss: the term's column and its share of the gradient."""
    figures = newest("every-loss")["figures"]
    body = []
    for arm, found in figures.items():
        for term, fell in found["terms"].items():
            share = fell["share"]
            body.append(
                [f"`{arm}`", f"`{term}`", f"{fell['first']:.4g}", f"{fell['last']:.4g}",
                 f"{share['median']:.3f} [{share['min']:.3f}, {share['max']:.3f}]", str(len(found["warnings"]))]
            )  # fmt: skip
    return rows(["run", "term", "epoch 1", "last epoch", "share: median [range]", "warnings"], body)


def format_columns_table() -> str:
    """Return the arrays of a view, of each codec's kind: dtype and row for a YOLOv8s with 3 classes at 640 pixels."""
    taps = (Tap("P3", 128, 8), Tap("P4", 256, 16), Tap("P5", 512, 32))
    hold = (128, 256, 512, *([64] * 2 + [128] * 2) * 3)
    head = HeadSpec(taps, 16, ("a", "b", "c"), hold=hold)
    found: dict[Column, list[str]] = {}
    for name in FIDELITIES:
        columns = stored_columns(ViewCodec.create(name, head, 640, ("features", "logits")), JpegPixels())
        for column in with_lengths(columns):
            found.setdefault(column, []).append(name)
    body = []
    for column, names in sorted(found.items(), key=lambda item: list(MEANINGS).index(item[0].name)):
        how = [word for word, said in (("ragged", column.ragged), ("whole", column.whole)) if said]
        row = ", ".join(str(size) for size in column.shape)
        which = "every cache" if len(names) == len(FIDELITIES) else ", ".join(names)
        which = "packed caches" if column.name.startswith(("pixels", "labels")) else which
        cells = [f"`{column.name}`", f"{column.dtype} ({row})", ", ".join([*how, column.compressor]), which]
        body.append([*cells, MEANINGS[column.name]])
    return rows(["array", "dtype, row", "kept", "in", "what it is"], body)


TABLES: dict[str, Callable[[], str]] = {
    "losses": losses_table,
    "options": options_table,
    "weights": weights_table,
    "every-loss": every_loss_table,
    "format-columns": format_columns_table,
    **MEASURED,
    **RESULTS,
    **SCALE,
}


def marked(text: str) -> list[tuple[str, str]]:
    """Return (command, body) of every marked help block of a document."""
    return [(match["name"].strip(), match["body"]) for match in HELP.finditer(text)]


def marked_tables(text: str) -> list[tuple[str, str]]:
    """Return (table, body) of every marked table of a document."""
    return [(match["name"].strip(), match["body"]) for match in TABLE.finditer(text)]


def updated(text: str) -> str:
    """Return the document with every marked block rewritten."""
    text = HELP.sub(lambda match: match["head"] + help_text(match["name"].strip()) + match["foot"], text)
    return TABLE.sub(lambda match: match["head"] + TABLES[match["name"].strip()]() + match["foot"], text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(updated(document.read_text(encoding="utf-8")), encoding="utf-8")
