"""Which columns a codec has, what must be read for what, and what is said when a cache lacks it."""

from __future__ import annotations

import pytest
from codec_cases import BOTH, HEADS, IMGSZ, make_sample, rows_of

from cache_kd.codecs import ViewCodec
from cache_kd.errors import MismatchError, SettingError


def test_columns_for_names_what_to_read() -> None:
    codec = ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, BOTH)
    assert codec.columns_for(["features"]) == ("features", "feature_peaks", "feature_tables")
    assert codec.columns_for({"logits", "score_map"}) == ("score_map", "logits")
    assert codec.columns_for(["hold_stats"]) == ("hold_stats",)
    assert ViewCodec.create("exact", HEADS["dfl-1"], IMGSZ, BOTH).columns_for(["logits"]) == ("scores", "boxes")


def test_each_layer_is_read_by_itself() -> None:
    codec = ViewCodec.create("default", HEADS["end2end-3"], IMGSZ, BOTH)
    assert codec.columns_for(["map:C4"]) == ("C4.features", "C4.feature_peaks", "C4.feature_tables")
    assert codec.columns_for(["map:P4", "map:6.cv1"])[::3] == ("features", "6.cv1.features")
    rows = rows_of(codec, [make_sample(HEADS["end2end-3"], 0)])
    read = codec.decode({name: rows[name] for name in codec.columns_for(["map:6.cv1"])})
    assert read.features is None and list(read.layers) == ["6.cv1"]
    assert read.layers["6.cv1"].shape == (1, 5, 8, 8)


def test_the_valuable_region_adds_no_columns() -> None:
    codec = ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, ("vlr", "logits"))
    assert codec.columns == ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, ("logits",)).columns
    assert codec.columns_for(["vlr"]) == ("logits",)
    assert ViewCodec.create("exact", HEADS["dfl-1"], IMGSZ, ("logits",)).columns_for(["vlr"]) == ("scores", "boxes")


def test_columns_for_says_what_the_cache_lacks() -> None:
    only = {store: ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, (store,)) for store in BOTH}
    both = r"a cache that has both old and new: cache-kd extract \.\.\. --store features,logits$"
    with pytest.raises(MismatchError, match=rf"reads them needs logits, and .* with --store features; {both}"):
        only["features"].columns_for(["features", "logits"])
    with pytest.raises(MismatchError, match=rf"needs features, and .* with --store logits; {both}"):
        only["logits"].columns_for(["score_map"])
    with pytest.raises(MismatchError, match=r"with --store logits; .*new: X --t best.pt --store features,logits,vlr$"):
        only["logits"].columns_for(["features", "vlr"], command="X --t best.pt")
    with pytest.raises(MismatchError, match=r"needs features and the layer C4, .*--store features,logits --taps C4$"):
        only["logits"].columns_for(["map:C4", "map:P3"])
    tapped = ViewCodec.create("default", HEADS["end2end-3"], IMGSZ, BOTH)
    with pytest.raises(MismatchError, match=r"needs the layer 9, and .* with --store features,logits --taps C4,6.cv1;"):
        tapped.columns_for(["map:C4", "map:9"])
    with pytest.raises(MismatchError, match=r"needs hold_stats and the teacher's head has no hold features"):
        ViewCodec.create("default", HEADS["end2end-3"], IMGSZ, BOTH).columns_for(["hold_stats"])
    with pytest.raises(MismatchError, match=r"no target is called 'logit'; known: .*did you mean 'logits'"):
        only["logits"].columns_for(["logit"])


@pytest.mark.parametrize(
    ("head", "store", "message"),
    [("dfl-1", ("features", "vlr"), r"--store logits,vlr"), ("end2end-3", ("logits",), r"--taps keeps maps; give it")],
)
def test_stores_that_cannot_stand_alone_are_refused(head: str, store: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ViewCodec.create("default", HEADS[head], IMGSZ, store)
