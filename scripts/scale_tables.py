"""In: the measured records of views and of large caches, prices, data sets. Out: the Markdown tables of docs/scale.md.

Everything that is not measured stands here as a constant and in the document as an assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cache_kd.cache.layout import shard_size
from cache_kd.cache.layout import stored_columns as with_lengths
from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.pipeline.contents import stored_columns
from cache_kd.pipeline.default_losses import arrays_read
from cache_kd.pipeline.sizes import megabytes
from cache_kd.structures import HeadSpec, Tap
from scripts.measured_tables import made_by, newest, rows

TEACHER = "yolov8s-bccd.pt bccd.yaml {}"
MANY_CLASSES = "yolov8n-int8deq.pt coco128.yaml 640"
SIDES = (320, 640)
VIEWS = (1, 9, 20)
STORAGE, PUT, GET = 0.023, 0.005 / 1000, 0.0004 / 1000
"""US dollars: a GB and month, a request; S3 Standard, Northern Virginia, as published in June 2026."""
ACCELERATOR, HOUR = 500, 2.00
"""Views a second that an accelerator is taken to make, and its dollars an hour: replace both by your own."""
LATENCY, RATE = 0.03, 90e6
"""Seconds until the first byte of a GET, and bytes a second of one connection."""
TAPS = (Tap("P3", 128, 8), Tap("P4", 256, 16), Tap("P5", 512, 32))


@dataclass(frozen=True)
class DataSet:
    """The training part of a data set: images and classes; bytes of the image files of all its parts."""

    name: str
    images: int
    classes: int
    bytes: float


DATA = (
    DataSet("COCO", 118_287, 80, 20.3e9),
    DataSet("Objects365", 1_742_289, 365, 367e9),
    DataSet("Open Images V7", 1_743_042, 601, 561e9),
)


def view_bytes(imgsz: int, fidelity: str, classes: int) -> dict[str, float]:
    """Return the bytes of a YOLOv8s view by array: as measured, but for the logits, which grow with the classes.

    Those of 80 classes are measured at 640 px, elsewhere there are as many fewer as anchors. An anchor that is sent
    takes a byte a class, 64 for its box and 2 for its place; further classes are taken to compress as these do.
    """
    found = newest("view-cost")["figures"]
    arrays: dict[str, float] = dict(found[TEACHER.format(imgsz)]["bytes"][fidelity])
    of_80 = found[MANY_CLASSES]["bytes"][fidelity]
    share = (imgsz / 640) ** 2
    for name, growth in {"logits": (classes + 66) / 146, "scores": classes / 80, "boxes": 1.0}.items():
        if name in of_80:
            arrays[name] = of_80[name] * share * growth
    return arrays


def shard_samples(imgsz: int, fidelity: str, classes: int) -> int:
    """Return the samples of a shard."""
    return shard_size(stored_columns(codec(imgsz, fidelity, classes), None))


def objects(views: int, images: int, samples: int, arrays: int) -> int:
    """Return the objects of so many views: shards and a record a unit, a description an array, two files a view."""
    return views * (-(-images // samples) * (arrays + 1) + arrays + 2)


def codec(imgsz: int, fidelity: str, classes: int) -> ViewCodec:
    """Return the codec of a YOLOv8s of so many classes."""
    hold = (128, 256, 512, *([64] * 2 + [128] * 2) * 3)
    head = HeadSpec(TAPS, 16, tuple(map(str, range(classes))), hold=hold)
    return ViewCodec.create(fidelity, head, imgsz, ("features", "logits"))


def seconds(imgsz: int, fidelity: str = "default") -> dict[str, float]:
    """Return the CPU seconds of a YOLOv8s view: `forward`, and `around` it, with all images read from files."""
    found = newest("view-cost")["figures"][TEACHER.format(imgsz)]["cpu_seconds"]
    around = found["views"] + found["images"] * found["decode"] + found["encode"][fidelity]
    return {"forward": found["forward"], "around": around + found["teacher"] - found["forward"]}


def data_table() -> str:
    """Return the data sets and what one mixed view of them is cut into."""
    body = []
    for data in DATA:
        for imgsz in SIDES:
            arrays, samples = view_bytes(imgsz, "default", data.classes), shard_samples(imgsz, "default", data.classes)
            units = -(-data.images // samples)
            body.append(
                [data.name, f"{data.images:,}", str(data.classes), megabytes(data.bytes), f"{imgsz}",
                 f"{sum(arrays.values()) / 1e3:.0f} kB", f"{units:,} of {samples}",
                 f"{objects(1, data.images, samples, len(arrays)):,}"]
            )  # fmt: skip
    head = ["training set", "images", "classes", "its files", "px", "a view", "units of a view", "objects of a view"]
    return rows(head, body)


def bytes_table() -> str:
    """Return the bytes of one view of every image, by fidelity."""
    body = []
    for data in DATA:
        for imgsz in SIDES:
            sizes = [data.images * sum(view_bytes(imgsz, name, data.classes).values()) for name in FIDELITIES]
            body.append([data.name, str(imgsz), *map(megabytes, sizes)])
    return rows(["training set", "px", *(f"`{name}`" for name in FIDELITIES)], body) + made_by(
        newest("view-cost"), "python scripts/bench/view_cost.py"
    )


def jobs_table() -> str:
    """Return bytes, objects, time and money of an extraction at fidelity `default`, by number of views."""
    body = []
    for data in DATA:
        for imgsz in SIDES:
            for views in VIEWS:
                body.append([data.name, str(imgsz), str(views), *_job(data, imgsz, views)])
    head = ["training set", "px", "views", "bytes", "objects", "writing them", "a month", "CPU only, core-hours",
            f"at {ACCELERATOR} views/s"]  # fmt: skip
    return rows(head, body)


def _job(data: DataSet, imgsz: int, views: int) -> list[str]:
    arrays, samples = view_bytes(imgsz, "default", data.classes), shard_samples(imgsz, "default", data.classes)
    size, units = views * data.images * sum(arrays.values()), views * -(-data.images // samples)
    count = objects(views, data.images, samples, len(arrays))
    each, items = seconds(imgsz), views * data.images
    hours = items / ACCELERATOR / 3600
    return [
        megabytes(size), f"{count:,}", f"${(count + units) * PUT:,.2f}", f"${size / 1e9 * STORAGE:,.0f}",
        f"{items * sum(each.values()) / 3600:,.0f}", f"{hours:,.1f} h, ${hours * HOUR:,.0f}",
    ]  # fmt: skip


def epoch_table() -> str:
    """Return what an epoch from a bucket asks for: whole shards of the arrays that the default losses read."""
    body = []
    for data in DATA:
        for imgsz in SIDES:
            arrays = view_bytes(imgsz, "default", data.classes)
            samples = shard_samples(imgsz, "default", data.classes)
            names = arrays_read(codec(imgsz, "default", data.classes), None)
            size, gets = sum(arrays[name] for name in names), -(-data.images // samples) * len(names)
            body.append([data.name, str(imgsz), megabytes(data.images * size), f"{gets:,}", f"${gets * GET:.2f}",
                         f"{megabytes(500 * size)}/s", f"{500 / samples * len(names):.0f}/s"])  # fmt: skip
    head = ["training set", "px", "bytes", "GETs", "their price", "at 500 images/s", "GETs then"]
    return rows(head, body)


def rates_table() -> str:
    """Return the CPU seconds of a view, and the cores that keep an accelerator busy."""
    body = []
    for imgsz in SIDES:
        found = newest("view-cost")["figures"][TEACHER.format(imgsz)]["cpu_seconds"]
        each = seconds(imgsz)
        cells = (found["views"], found["images"] * found["decode"], found["forward"],
                 found["teacher"] - found["forward"], found["encode"]["default"])  # fmt: skip
        body.append([str(imgsz), *(f"{1e3 * cell:.1f}" for cell in cells), f"{1e3 * sum(each.values()):.0f}",
                     f"{sum(each.values()) / each['forward']:.2f}", f"{each['around'] * ACCELERATOR:.0f}"])  # fmt: skip
    head = ["px", "view", "reading images", "forward", "around it", "coding", "in all", "over forward",
            f"cores beside {ACCELERATOR} views/s"]  # fmt: skip
    return rows(head, body) + made_by(newest("view-cost"), "python scripts/bench/view_cost.py")


def objects_table() -> str:
    """Return the objects of a unit with 80 classes at fidelity `default`: bytes and what a GET of each takes."""
    read = {imgsz: arrays_read(codec(imgsz, "default", 80), None) for imgsz in SIDES}
    found = {imgsz: view_bytes(imgsz, "default", 80) for imgsz in SIDES}
    body = []
    for name in (column.name for column in with_lengths(stored_columns(codec(640, "default", 80), None))):
        cells = []
        for imgsz in SIDES:
            size = found[imgsz][name] * shard_samples(imgsz, "default", 80)
            cells += [megabytes(size), f"{100 * LATENCY / (LATENCY + size / RATE):.0f} %"]
        body.append([f"`{name}`", *cells, "yes" if name in read[640] else ""])
    head = ["array", *(text for imgsz in SIDES for text in (f"{imgsz} px", "waiting")), "read by `cwd`"]
    return rows(head, body)


def million_table() -> str:
    """Return what a large cache asks of those who open it."""
    record = newest("scale")
    found, settings = record["figures"], record["settings"]
    steps = {
        "find": "find the newest cache", "open_reader": "open it", "read_images": "open it and read the list of images",
        "first_row": "open it and find the first row of a view",
        "train": "all of that, and compare the images with those found: `train`",
        "worker": f"a loader worker that goes through all {settings['views']} views",
        "inspect": "`cache-kd inspect`", "listing": "`cache-kd list`, with the files of one view",
        "begin": "`extract`, before its first unit",
        "finish": "`extract`, its end: for one view",
    }  # fmt: skip
    body = [
        [text, f"{found[name]['cpu_seconds']:.1f} s", f"{found[name]['peak_bytes'] / 1e6:.0f} MB",
         megabytes(found[name]["read_bytes"])]
        for name, text in steps.items()
    ]  # fmt: skip
    return rows(["step", "CPU time", "memory", "read"], body) + made_by(record, "python scripts/bench/scale.py")


def files_table() -> str:
    """Return the files of a large cache that are no shards."""
    record = newest("scale")
    sizes, counts, views = record["figures"]["sizes"], record["figures"]["counts"], record["settings"]["views"]
    units = counts["units_a_view"] * views
    many = {"views/mixed-0000/shards.json": views, "units/mixed-0000-00000.json": units}
    body = [[f"`{name}`", megabytes(size), f"{many.get(name, 1):,}", megabytes(size * many.get(name, 1))]
            for name, size in sizes.items()]  # fmt: skip
    body.append(["shards", "", f"{units * counts['arrays']:,}", ""])
    return rows(["file", "bytes", "how many", "together"], body)


def scan_table() -> str:
    """Return what looking at a million image files costs before a training on source images."""
    record = newest("scale")
    found, images = record["figures"]["scan"], record["settings"]["images"]
    body = [
        [text, f"{1e3 * found[f'{name}_cpu_seconds_per_image']:.2f} ms",
         f"{images * found[f'{name}_cpu_seconds_per_image'] / 60:.0f} min"]
        for name, text in (("check", "Ultralytics' check of image and label"), ("hash", "hashes of both"))
    ]  # fmt: skip
    head = ["step", f"an image of {found['bytes_per_image'] / 1e3:.0f} kB", f"{images:,} of them, extrapolated"]
    return rows(head, body)


def opening_table() -> str:
    """Return what a sample costs whose shards are not open."""
    record = newest("shard-opening")
    found = record["figures"]["cpu_seconds"]
    body = []
    for arm, text in (("open", "shards open, small arrays decoded"), ("not open", "neither")):
        middle, least, most = (1e3 * found[arm][key] for key in ("median", "min", "max"))
        body.append([text, f"{middle:.2f} ms [{least:.2f}, {most:.2f}]"])
    head = [f"a sample of {record['figures']['arrays']} arrays at {record['settings']['imgsz']} px", "CPU time"]
    return rows(head, body) + made_by(record, "python scripts/bench/shard_opening.py")


TABLES: dict[str, Callable[[], str]] = {
    "scale-data": data_table,
    "scale-bytes": bytes_table,
    "scale-rates": rates_table,
    "scale-jobs": jobs_table,
    "scale-epoch": epoch_table,
    "scale-objects": objects_table,
    "scale-files": files_table,
    "scale-million": million_table,
    "scale-scan": scan_table,
    "scale-opening": opening_table,
}
