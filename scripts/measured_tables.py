"""In: the newest records of the benchmarks. Out: the Markdown tables of docs/fidelity.md, speed.md and cluster.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "bench" / "results"
JUDGES = ("mimic", "cwd", "sl2", "fgd")


def rows(head: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *body))


def newest(name: str) -> dict[str, Any]:
    """Return the newest record of a benchmark."""
    files = sorted(RESULTS.glob(f"????-??-??-{name}.json"))
    if not files:
        raise ValueError(f"no record of the benchmark {name} in {RESULTS.name}")
    content: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return content


def spread(values: dict[str, float], digits: int = 2) -> str:
    """Return "median [min, max]"."""
    return f"{values['median']:.{digits}f} [{values['min']:.{digits}f}, {values['max']:.{digits}f}]"


def made_by(record: dict[str, Any], command: str) -> str:
    """Return a line that says where a table comes from."""
    machine = record["machine"]
    device = machine["gpu"] or f"{machine['cores']} CPU cores"
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "ultralytics"))
    return f"\n{record['date']}, {device}, Python {machine['python']}, {versions}; `{command}`.\n"


def codec_study_table() -> str:
    """Return every way of coding that was tried: size, speed, and the worse student's cosines."""
    record = newest("codec-study")
    parts = []
    for case, schemes in record["figures"].items():
        head = ["coding", "bits a value", "under float32", "codes made / undone, M a second and core"]
        head += [f"{loss}: maps / adapters" for loss in JUDGES]
        body = []
        for name, found in schemes.items():
            rate = found["million_values_per_second_and_core"]
            cells = [name, f"{found['bits_per_value']:.2f}", f"{found['times_smaller_than_float32']:.1f}x"]
            cells.append(f"{rate['made']:.0f} / {rate['undone']:.0f}")
            body.append([*cells, *(_cosines(found["cosines"], loss) for loss in JUDGES)])
        parts.append(f"{case} px:\n\n{rows(head, body)}")
    return "\n".join(parts) + made_by(record, "python scripts/bench/codec_study.py")


def _cosines(cosines: dict[str, dict[str, float]], loss: str) -> str:
    both = [cosines[f"{student} {loss}"] for student in ("early", "late")]
    maps, adapters = (min(one[part] for one in both) for part in ("maps", "adapters"))
    return f"{maps:.4f} / " + (f"{adapters:.4f}" if adapters == adapters else "-")


KEPT = {
    "exact": ("half precision", "its rounding", "all anchors, half precision"),
    "safe": ("u8, a step an image and channel", "≤ one step", "p > .003 or in a labelled box, step 1/8"),
    "default": ("4-bit pairs and peaks, step .15 sd a level", "≤ one step", "p > .01 or in a box, step 1/8"),
    "small": ("the same, step .3 sd", "≤ one step", "as default"),
    "tiny": ("the same, step .8 sd", "≤ one step", "p > .05 or in a box, step 1/8"),
}


def fidelities_table() -> str:
    """Return what every fidelity keeps, and the bytes of a view on disk."""
    record = newest("bytes-per-view")
    sizes: dict[str, dict[str, str]] = {}
    for key, found in record["figures"].items():
        teacher, data, imgsz, fidelity = key.split()
        case = f"{Path(data).stem}, {Path(teacher).stem}, {imgsz} px"
        sizes.setdefault(case, {})[fidelity] = (
            f"{found['bytes'] / 1e3:.0f} kB, {found['times_smaller']:.1f}x ({found['features_times_smaller']:.1f}x)"
        )
    head = ["`--fidelity`", "features", "error of a feature", "logits", *sizes]
    body = [[f"`{name}`", *kept, *(case[name] for case in sizes.values())] for name, kept in KEPT.items()]
    return rows(head, body)


def students_table() -> str:
    """Return whether the fidelity of the cache mattered to students of paired seeds."""
    record = newest("fidelity-students")
    body = []
    for arm, found in record["figures"].items():
        scores = [f"{100 * run['mAP50-95']:.1f}" for run in found["runs"].values()]
        middle, over = found["mAP50-95"], found.get("over_exact")
        difference = (
            "-" if arm == "exact" or not over else _difference(found["runs"], record["figures"]["exact"]["runs"])
        )
        size = "-" if arm == "plain" else f"{found['bytes_per_view'] / 1e3:.0f} kB"
        body.append([arm, size, f"{100 * middle['mean']:.1f}", f"{100 * _deviation(found['runs']):.1f}",
                     ", ".join(scores), difference])  # fmt: skip
    head = ["cache", "a view", "mAP50-95, mean", "standard deviation", "of each seed", "minus exact, by seed"]
    return rows(head, body) + made_by(record, "python scripts/bench/fidelity_students.py")


def _deviation(runs: dict[str, dict[str, float]]) -> float:
    scores = [run["mAP50-95"] for run in runs.values()]
    mean = sum(scores) / len(scores)
    return float((sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)) ** 0.5)


def _difference(runs: dict[str, dict[str, float]], exact: dict[str, dict[str, float]]) -> str:
    gaps = [100 * (run["mAP50-95"] - exact[seed]["mAP50-95"]) for seed, run in runs.items()]
    return f"{sum(gaps) / len(gaps):+.1f} ({', '.join(f'{gap:+.1f}' for gap in gaps)})"


def train_step_table() -> str:
    """Return the seconds of a training step of every arm over those of a plain one."""
    record = newest("train-step")
    body = [
        [arm, f"{found['seconds']['median']:.3f} s", spread(found["over_plain"])]
        for arm, found in record["figures"].items()
    ]
    return rows(["arm", "a step, median", "over plain, median [range]"], body) + made_by(
        record, "python scripts/bench/train_step.py"
    )


def extraction_table() -> str:
    """Return the seconds of an extraction over those of the bare teacher with the same loading of views."""
    record = newest("extraction")
    found = record["figures"]
    body = [
        [arm, f"{found['seconds'][arm]['median']:.1f} s", f"{found['peak_memory_bytes'][arm] / 1e9:.2f} GB", ratio]
        for arm, ratio in (("bare", "1"), ("extract", spread(found["ratio"])))
    ]
    head = ["arm", "a shard, median", "peak memory of the process", "over bare, median [range]"]
    return rows(head, body) + made_by(record, "python scripts/bench/extraction.py")


def engines_table() -> str:
    """Return seconds and memory of one extraction by each engine."""
    record = newest("engines")
    body = []
    for arm, found in record["figures"]["arms"].items():
        ray = found["ray_memory"]["median"]
        memory = f"{found['memory']['median'] / 1e9:.2f} GB" + (f" + {ray / 1e9:.2f} GB of Ray" if ray else "")
        times = [f"{found[key]['median']:.1f} s" for key in ("seconds", "first_unit", "extracting")]
        body.append([arm, *times, spread(found["over_one_process"]), memory])
    head = ["who", "the command", "until its first unit", "extracting", "over one process [range]", "memory at most"]
    settings, figures = record["settings"], record["figures"]
    load = settings["load"]
    same = "one digest" if len(figures["digests"]) == 1 else "DIFFERENT digests"
    about = f"\n{figures['items']} items of {settings['imgsz']} px, {same}; load of the machine {load:.1f}.\n"
    return rows(head, body) + about + made_by(record, "python scripts/bench/engines.py")


def reader_table() -> str:
    """Return the samples a second of our reader and of others, the same rows in every store."""
    record = newest("reader")
    parts = []
    for payload, found in record["figures"].items():
        stores = found["stores"]
        ways = [way for way in stores["ours"] if isinstance(stores["ours"][way], dict)]
        body = []
        for name, store in stores.items():
            cells = [name, store["compression"], f"{store['bytes_per_sample'] / 1e3:.1f} kB", store["checksum"]]
            for way in ways:
                taken = store[way]
                cells.append(f"{taken['microseconds']['median']:.0f} µs, {spread(taken['time_over_ours'])}")
            body.append(cells)
        decoded = found["payload"]["bytes_decoded"] / 1e3
        head = ["store", "compression", "a sample", "checksum", *(f"{way}: a sample, over ours" for way in ways)]
        parts.append(f"{payload}, {decoded:.1f} kB decoded:\n\n{rows(head, body)}")
    return "\n".join(parts) + made_by(record, "python scripts/bench/reader.py")


def whole_job_table() -> str:
    """Return one extraction and several students from it against as many students beside a live teacher."""
    record = newest("whole-job")
    settings, found = record["settings"], record["figures"]
    seconds = {arm: taken["median"] * taken["n"] for arm, taken in found["training_seconds"].items()}
    even = found["break_even_epochs"]
    body = [
        [
            "extraction",
            f"{found['extraction_seconds']:.0f} s (predicted {found['predicted_extraction_seconds']:.0f} s)",
        ],
        *([f"{settings['students']} students, {arm}", f"about {taken:.0f} s"] for arm, taken in seconds.items()),
        ["extraction and cached students over online students", f"{found['ratio']:.3f}"],
        ["break-even, epochs of all students", f"{even['measured']:.1f} (predicted {even['predicted']:.1f})"],
    ]
    return rows(["what", "time"], body) + made_by(record, "python scripts/bench/whole_job.py")


def estimate_table() -> str:
    """Return what `cache-kd estimate` said over what an extraction took."""
    record = newest("estimate-bccd-160")
    body = [
        [arm, spread(found["bytes ratio"], 3), spread(found["seconds ratio"])]
        for arm, found in record["figures"].items()
    ]
    head = ["cache", "bytes: estimate over truth", "seconds: estimate over the units' truth"]
    return rows(head, body) + made_by(record, "python scripts/bench/estimate.py")


TABLES: dict[str, Callable[[], str]] = {
    "codec-study": codec_study_table,
    "fidelities": fidelities_table,
    "fidelity-students": students_table,
    "train-step": train_step_table,
    "extraction": extraction_table,
    "reader": reader_table,
    "whole-job": whole_job_table,
    "estimate": estimate_table,
    "engines": engines_table,
}
