"""The contract of every fidelity preset: what is read back equals what was stored within the declared bound."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from codec_cases import (
    BOTH,
    HEADS,
    IMGSZ,
    MAPS,
    STEPS,
    TAPS,
    THRESHOLDS,
    any_map,
    coded_presets,
    heads,
    make_sample,
    presets,
    rows_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_kd.codecs import FIDELITIES, ViewCodec
from cache_kd.codecs.features import ChannelFeatures
from cache_kd.codecs.logits import SparseLogits
from cache_kd.errors import AlarmError, DamagedCacheError, MismatchError, SettingError
from cache_kd.structures import HeadSpec, SampleTargets, Tap, TargetBatch


def stored_and_read(preset: str, kind: str) -> list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Return (map, map read back, step) of levels with as many values as real ones."""
    head = HeadSpec((Tap("P3", 128, 8), Tap("P4", 512, 16)), 1, ("a",))
    codec = ViewCodec.create(preset, head, 160, ("features",))
    maps = tuple(any_map(kind, shape, np.random.default_rng(5)) for shape in head.feature_shapes(160))
    row = codec.fidelity.features.encode(maps, codec.levels)
    columns = {name: torch.from_numpy(values[None]) for name, values in row.items()}
    batch = codec.decode(columns)
    assert batch.features is not None
    steps = codec.feature_step(columns)
    return [(truth, read[0], step[0]) for truth, read, step in zip(maps, batch.features, steps, strict=True)]


def shifted(boxes: np.ndarray, reg_max: int) -> np.ndarray:
    if reg_max == 1:
        return boxes
    sides = boxes.reshape(-1, 4, reg_max)
    return (sides - sides.max(axis=2, keepdims=True)).reshape(boxes.shape)


def expected_sent(sample: SampleTargets, threshold: float) -> np.ndarray:
    best = 1 / (1 + np.exp(-sample.scores.astype(np.float64)))
    return (best > threshold).any(axis=1) | sample.in_box


@presets
@heads
def test_rows_fit_their_columns(preset: str, head: HeadSpec) -> None:
    codec = ViewCodec.create(preset, head, IMGSZ, BOTH)
    row = codec.encode(make_sample(head, 0))
    assert list(row) == [column.name for column in codec.columns]
    for column in codec.columns:
        assert row[column.name].dtype == np.dtype(column.dtype)
        if column.ragged:
            assert row[column.name].ndim == 1 and row[column.name].size <= column.shape[0]
        else:
            assert row[column.name].shape == column.shape


@presets
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(MAPS), scale=st.sampled_from([1.0, 1e-3, 40.0]))
def test_no_feature_is_further_off_than_its_bound(preset: str, seed: int, kind: str, scale: float) -> None:
    head = HEADS["end2end-3"]
    sample = make_sample(head, seed, kind)
    scaled = {name: tuple(v * np.float32(scale) for v in getattr(sample, name)) for name in ("features", "layers")}
    sample = dataclasses.replace(sample, **scaled)
    codec = ViewCodec.create(preset, head, IMGSZ, ("features",))
    rows = rows_of(codec, [sample])
    decoded = codec.decode(rows)
    assert decoded.features is not None
    assert list(decoded.layers) == list(codec.layer_step(rows)) == ["C4", "6.cv1"]
    maps = [*decoded.features, *decoded.layers.values()]
    bounds = [*codec.feature_step(rows), *codec.layer_step(rows).values()]
    for truth, read, bound in zip((*sample.features, *sample.layers), maps, bounds, strict=True):
        error = np.abs(truth.astype(np.float64) - read[0].double().numpy())
        assert (error <= bound[0].double().numpy()).all()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(MAPS))
def test_exact_features_are_half_precision_bit_for_bit(seed: int, kind: str) -> None:
    head = HEADS["dfl-1"]
    sample = make_sample(head, seed, kind)
    codec = ViewCodec.create("exact", head, IMGSZ, BOTH)
    batch = codec.decode(rows_of(codec, [sample]))
    for truth, read in zip(sample.features, batch.features, strict=True):
        assert np.array_equal(truth.astype(np.float16).astype(np.float32), read[0].numpy())


@pytest.mark.parametrize("preset", STEPS)
@pytest.mark.parametrize("kind", ["silu", "outlier"])
def test_the_step_is_the_declared_share_of_a_deviation(preset: str, kind: str) -> None:
    for truth, _, step in stored_and_read(preset, kind):
        share, floor = STEPS[preset] * truth.std(dtype=np.float64), np.ptp(truth) / 255
        assert (floor > share) == (kind == "outlier")
        assert max(share, floor) * (1 - 1e-6) <= step.item() <= max(share, floor) * 1.0005


def test_the_step_of_safe_is_a_255th_of_the_channels_range() -> None:
    sample = make_sample(HEADS["dfl-1"], 3)
    codec = ViewCodec.create("safe", HEADS["dfl-1"], IMGSZ, ("features",))
    for truth, step in zip(sample.features, codec.feature_step(rows_of(codec, [sample])), strict=True):
        wanted = np.ptp(truth, axis=(1, 2)) / 255
        assert (step[0, :, 0, 0].numpy() <= wanted * 1.0005).all()


@coded_presets
def test_rms_error_of_realistic_maps_is_that_of_an_even_spread(preset: str) -> None:
    for truth, read, step in stored_and_read(preset, "silu"):
        relative = (torch.from_numpy(truth) - read) / step
        assert relative.square().mean().sqrt().item() <= 12**-0.5 * 1.005
        if preset in STEPS:
            # read back at the centroids, the error has mean 0; at the middle of each cell it has not
            assert abs(relative.mean().item()) <= 0.5 / 254


@pytest.mark.parametrize("preset", STEPS)
def test_values_alone_in_their_cells_come_back_closer_than_rounding_leaves_them(preset: str) -> None:
    head = HeadSpec((Tap("P3", 16, 8),), 1, ("a",))
    codec = ViewCodec.create(preset, head, IMGSZ, ("features",))
    values = np.array([-0.278, 9.3, 18.4], np.float32)
    map = np.random.default_rng(0).choice(values, (16, 8, 8))
    row = codec.fidelity.features.encode((map,), codec.levels)
    columns = {name: torch.from_numpy(values[None]) for name, values in row.items()}
    error = (torch.from_numpy(map) - codec.fidelity.features.decode(columns, codec.levels)[0][0]).abs()
    # a pair's fraction reaches .34 of a step, a channel's shift .16
    assert error.max().item() <= 0.17 * codec.feature_step(columns)[0].item()


@coded_presets
def test_peaks_are_not_clipped(preset: str) -> None:
    for _, read, step in stored_and_read(preset, "outlier"):
        assert abs(read.max().item() - 500) <= step.max().item()


@presets
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("level", [0, 2])
def test_features_that_are_not_finite_are_counted_and_named(preset: str, bad: float, level: int) -> None:
    sample = make_sample(HEADS["dfl-1"], 0)
    sample.features[level].reshape(-1)[[3, 7]] = bad
    codec = ViewCodec.create(preset, HEADS["dfl-1"], IMGSZ, BOTH)
    values = sample.features[level].size
    with pytest.raises(AlarmError, match=rf"features of {TAPS[level].name}: 2 of {values} values are not finite"):
        codec.encode(sample)


def test_exact_refuses_features_beyond_half_precision() -> None:
    sample = make_sample(HEADS["dfl-1"], 0)
    sample.features[1].reshape(-1)[5] = -70000
    codec = ViewCodec.create("exact", HEADS["dfl-1"], IMGSZ, BOTH)
    with pytest.raises(AlarmError, match=r"features of P4: 1 of 256 values are beyond ±65504; .*--fidelity safe"):
        codec.encode(sample)
    safe = ViewCodec.create("safe", HEADS["dfl-1"], IMGSZ, BOTH)
    assert safe.decode(rows_of(safe, [sample])).features[1].min().item() == pytest.approx(-70000)


@coded_presets
@heads
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), boxes_in_image=st.booleans())
def test_sent_anchors_are_those_declared_and_within_half_a_step(
    preset: str, head: HeadSpec, seed: int, boxes_in_image: bool
) -> None:
    sample = make_sample(head, seed, boxes_in_image=boxes_in_image)
    codec = ViewCodec.create(preset, head, IMGSZ, BOTH)
    batch = codec.decode(rows_of(codec, [sample]))
    sent = batch.sent[0].numpy()
    assert np.array_equal(sent, expected_sent(sample, THRESHOLDS[preset]))
    assert codec.logit_step is not None
    half_step = codec.logit_step / 2
    assert np.abs(batch.scores[0].numpy() - sample.scores)[sent].max(initial=0) <= half_step
    truth = shifted(sample.boxes, head.reg_max)[sent]
    if head.reg_max == 1:
        assert np.array_equal(batch.boxes[0].numpy()[sent], truth.astype(np.float16).astype(np.float32))
    else:
        assert np.abs(batch.boxes[0].numpy()[sent] - truth).max(initial=0) <= half_step


@coded_presets
@heads
def test_unsent_anchors_hold_the_mean_and_uniform_boxes(preset: str, head: HeadSpec) -> None:
    sample = make_sample(head, 11)
    codec = ViewCodec.create(preset, head, IMGSZ, BOTH)
    batch = codec.decode(rows_of(codec, [sample]))
    unsent = ~expected_sent(sample, THRESHOLDS[preset])
    assert unsent.any() and not unsent.all()
    mean = sample.scores[unsent].mean(axis=0, dtype=np.float64).astype(np.float16).astype(np.float32)
    assert np.array_equal(batch.scores[0].numpy()[unsent], np.broadcast_to(mean, (unsent.sum(), len(mean))))
    assert (batch.boxes[0].numpy()[unsent] == 0).all()


@heads
@pytest.mark.parametrize("everything", [True, False])
def test_all_or_no_anchor_may_be_sent(head: HeadSpec, everything: bool) -> None:
    sample = make_sample(head, 2)
    sample = dataclasses.replace(sample, scores=np.full_like(sample.scores, 3 if everything else -2000), in_box=None)
    codec = ViewCodec.create("default", head, IMGSZ, BOTH)
    rows = rows_of(codec, [sample])
    batch = codec.decode(rows)
    assert batch.sent.all().item() is everything and batch.sent.any().item() is everything
    assert np.array_equal(batch.scores[0].numpy(), sample.scores)
    tail = rows["logits"][0, 4 : 4 + 2 * head.num_classes].numpy().view("<f2")
    assert (tail == (0 if everything else sample.scores[0])).all()


def test_ties_and_far_logits_do_not_break_the_bound() -> None:
    codec, shape = SparseLogits(threshold=0.01), ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, BOTH).logit_shape
    scores = (np.arange(shape.anchors, dtype=np.float32) * 2 + 1)[:, None] / 16 + np.float32(1000)
    boxes = np.linspace(-2000, 2000, shape.anchors * shape.box_width, dtype=np.float32).reshape(shape.anchors, -1)
    boxes[1::2] = np.random.default_rng(0).choice(np.float32([-2047, 2047]), boxes[1::2].shape)
    row = codec.encode(scores, boxes, None, shape)
    batch = codec.decode({"logits": torch.from_numpy(row["logits"][None])}, shape)
    assert np.abs(batch.scores[0].numpy() - scores).max() <= 1 / 16
    assert np.abs(batch.boxes[0].numpy() - shifted(boxes, 16)).max() <= 1 / 16


def test_indices_beyond_65536_anchors_come_back() -> None:
    head = HeadSpec((Tap("P3", 1, 8),), 1, ("a", "b", "c"))
    codec = ViewCodec.create("default", head, 2056, ("logits",))
    anchors = head.num_anchors(2056)
    scores = np.full((anchors, 3), -9, np.float32)
    scores[[0, 65535, 65536, anchors - 1], 1] = 2
    sample = SampleTargets((), scores, np.ones((anchors, 4), np.float32), None, None, None, None)
    assert codec.decode(rows_of(codec, [sample])).sent[0].nonzero().ravel().tolist() == [0, 65535, 65536, anchors - 1]


@heads
def test_exact_logits_are_half_precision_for_every_anchor(head: HeadSpec) -> None:
    sample = make_sample(head, 4)
    codec = ViewCodec.create("exact", head, IMGSZ, BOTH)
    batch = codec.decode(rows_of(codec, [sample]))
    boxes = shifted(sample.boxes, head.reg_max)
    assert np.array_equal(batch.scores[0].numpy(), sample.scores.astype(np.float16).astype(np.float32))
    assert np.array_equal(batch.boxes[0].numpy(), boxes.astype(np.float16).astype(np.float32))
    assert batch.sent.all()
    assert codec.logit_step is None


@presets
@pytest.mark.parametrize("name", ["scores", "boxes"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_unusable_logits_are_counted(preset: str, name: str, bad: float) -> None:
    sample = make_sample(HEADS["dfl-1"], 0)
    getattr(sample, name)[5, 0] = bad
    what = "beyond" if bad == 1e6 else "not finite"
    with pytest.raises(AlarmError, match=rf"(class|box) logits: 1 of \d+ values are {what}"):
        ViewCodec.create(preset, HEADS["dfl-1"], IMGSZ, BOTH).encode(sample)


@presets
def test_score_map_is_within_half_a_step_of_the_logit(preset: str) -> None:
    logits = np.linspace(-15.875, 15.875, 84)
    sample = dataclasses.replace(
        make_sample(HEADS["dfl-1"], 0), score_map=(1 / (1 + np.exp(-logits))).astype(np.float32)
    )
    codec = ViewCodec.create(preset, HEADS["dfl-1"], IMGSZ, ("features",))
    read = codec.decode(rows_of(codec, [sample])).score_map[0].double().numpy()
    if preset == "exact":
        assert np.array_equal(read, sample.score_map.astype(np.float16).astype(np.float64))
    else:
        low, high = (1 / (1 + np.exp(-(logits + side / 16))) for side in (-1, 1))
        assert ((low - 1e-7 <= read) & (read <= high + 1e-7)).all()
        small = logits < 8
        assert (low * (1 - 1e-6) <= read)[small].all() and (read <= high * (1 + 1e-6))[small].all()


@presets
def test_certain_scores_are_clipped_and_others_refused(preset: str) -> None:
    codec = ViewCodec.create(preset, HEADS["dfl-1"], IMGSZ, ("features",))
    sample = make_sample(HEADS["dfl-1"], 0)
    sample.score_map[:2] = 0, 1
    read = codec.decode(rows_of(codec, [sample])).score_map[0]
    assert read[0].item() == pytest.approx(0, abs=1e-6) and read[1].item() == pytest.approx(1, abs=1e-6)
    for bad in (np.nan, 1.5, -0.1):
        sample.score_map[7] = bad
        with pytest.raises(AlarmError, match=r"score map: 1 of 84 values are no probability"):
            codec.encode(sample)


@presets
def test_hold_statistics_keep_their_declared_bits(preset: str) -> None:
    head = HEADS["dfl-80"]
    sample = make_sample(head, 6)
    codec = ViewCodec.create(preset, head, IMGSZ, BOTH)
    rows = rows_of(codec, [sample])
    batch = codec.decode(rows)
    for truth, read in ((sample.hold_mean, batch.hold_mean), (sample.hold_m2, batch.hold_m2)):
        if preset == "exact":
            assert np.array_equal(truth, read[0].numpy())
        else:
            assert (np.abs(truth - read[0].numpy()) <= np.abs(truth) * 2.0**-11).all()
    if preset != "exact":
        assert not (rows["hold_stats"].numpy().view(np.uint32) & 0x1FFF).any()
    sample.hold_m2[3] = np.inf
    with pytest.raises(AlarmError, match=r"hold statistics: 1 of 48 values are not finite"):
        codec.encode(sample)


@presets
@heads
def test_a_batch_decodes_as_its_samples_one_by_one(preset: str, head: HeadSpec) -> None:
    codec = ViewCodec.create(preset, head, IMGSZ, BOTH)
    samples = [make_sample(head, seed, kind) for seed, kind in enumerate(("silu", "constant", "outlier", "offset"))]
    together = codec.decode(rows_of(codec, samples))
    for number, sample in enumerate(samples):
        alone = codec.decode_one(codec.encode(sample))
        for field in dataclasses.fields(TargetBatch):
            batch, one = getattr(together, field.name), getattr(alone, field.name)
            if isinstance(batch, torch.Tensor):
                assert torch.equal(batch[number : number + 1], one), field.name
            elif field.name == "layers":
                assert list(batch) == list(one) == [tap.name for tap in head.layers]
                assert all(torch.equal(batch[name][number : number + 1], one[name]) for name in batch)
            elif batch is not None:
                assert all(
                    torch.equal(many[number : number + 1], level) for many, level in zip(batch, one, strict=True)
                )
            else:
                assert one is None and (field.name == "labels" or head.hold_channels == 0)


@presets
@heads
def test_encoding_is_a_pure_function_of_the_sample(preset: str, head: HeadSpec) -> None:
    first, again = make_sample(head, 9), make_sample(head, 9)
    strided = tuple(np.asfortranarray(values) for values in again.features)
    codec = ViewCodec.create(preset, head, IMGSZ, BOTH)
    once, twice = codec.encode(first), codec.encode(dataclasses.replace(again, features=strided))
    assert {name: row.tobytes() for name, row in once.items()} == {name: row.tobytes() for name, row in twice.items()}
    for before, after in zip(make_sample(head, 9).features, first.features, strict=True):
        assert np.array_equal(before, after)
    assert np.array_equal(make_sample(head, 9).boxes, first.boxes)


@presets
@pytest.mark.parametrize("store", [("features",), ("logits",), BOTH])
def test_a_description_gives_the_same_codec(preset: str, store: tuple[str, ...]) -> None:
    codec = ViewCodec.create(preset, HEADS["dfl-80"], IMGSZ, store)
    description = json.loads(json.dumps(codec.describe()))
    assert description["fidelity"] == preset
    assert ViewCodec.from_description(description, HEADS["dfl-80"], IMGSZ) == codec


def test_an_unknown_codec_in_a_manifest_is_refused() -> None:
    description = ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, BOTH).describe()
    description["features"] = {"kind": "piar", "step": 1}
    with pytest.raises(MismatchError, match=r"codec 'piar'; known: channel, half, pair; did you mean 'pair'"):
        ViewCodec.from_description(description, HEADS["dfl-1"], IMGSZ)


def test_presets_hold_the_declared_parameters() -> None:
    assert list(FIDELITIES) == ["exact", "safe", "default", "small", "tiny"]
    assert {name: FIDELITIES[name].features.describe()["step"] for name in STEPS} == STEPS
    assert {name: FIDELITIES[name].logits.describe()["threshold"] for name in THRESHOLDS} == THRESHOLDS
    assert isinstance(FIDELITIES["safe"].features, ChannelFeatures)
    assert all(FIDELITIES[name].logits.step == 0.125 for name in THRESHOLDS)


def test_unknown_presets_and_stores_name_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"--fidelity 'defualt' is unknown; known: .*did you mean 'default'"):
        ViewCodec.create("defualt", HEADS["dfl-1"], IMGSZ, BOTH)
    with pytest.raises(SettingError, match=r"--store 'feature' is unknown; known: features, logits, vlr; did you mean"):
        ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, ("feature",))
    with pytest.raises(SettingError, match=r"--store is empty; known: features, logits, vlr"):
        ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, ())


@presets
def test_any_subset_of_columns_decodes(preset: str) -> None:
    codec = ViewCodec.create(preset, HEADS["dfl-1"], IMGSZ, BOTH)
    rows = rows_of(codec, [make_sample(HEADS["dfl-1"], 0)])
    fields = {"features": "features", "score_map": "score_map", "logits": "scores", "hold_stats": "hold_mean"}
    for need, field in fields.items():
        batch = codec.decode({name: rows[name] for name in codec.columns_for([need])})
        present = {name for name in fields.values() if getattr(batch, name) is not None}
        assert present == {field}


@coded_presets
def test_features_without_their_tables_are_refused(preset: str) -> None:
    codec = ViewCodec.create(preset, HEADS["dfl-1"], IMGSZ, BOTH)
    rows = rows_of(codec, [make_sample(HEADS["dfl-1"], 0)])
    with pytest.raises(MismatchError, match=r"column 'feature_(peaks|tables)' was not read"):
        codec.decode({"features": rows["features"]})


@presets
@pytest.mark.parametrize("name", ["score_map", "scores", "boxes", "hold_mean", "hold_m2"])
def test_a_missing_target_is_refused(preset: str, name: str) -> None:
    codec = ViewCodec.create(preset, HEADS["dfl-1"], IMGSZ, BOTH)
    with pytest.raises(MismatchError, match=rf"{name} must have shape .*, got nothing"):
        codec.encode(dataclasses.replace(make_sample(HEADS["dfl-1"], 0), **{name: None}))


@presets
def test_features_of_another_size_are_refused(preset: str) -> None:
    codec = ViewCodec.create(preset, HEADS["dfl-1"], 2 * IMGSZ, ("features",))
    with pytest.raises(MismatchError, match=r"features P3, P4, P5 have shapes .*the cache holds \[\(8, 16, 16\)"):
        codec.encode(make_sample(HEADS["dfl-1"], 0))


def test_logits_that_do_not_fit_their_header_are_damage() -> None:
    codec = ViewCodec.create("default", HEADS["dfl-1"], IMGSZ, ("logits",))
    rows = rows_of(codec, [make_sample(HEADS["dfl-1"], seed) for seed in range(2)])
    with pytest.raises(DamagedCacheError, match=r"logits of sample 1 .*cache-kd verify"):
        codec.decode({**rows, "logits_length": rows["logits_length"] - torch.tensor([0, 1])})
    rows["logits"][0, 3] = 255
    with pytest.raises(DamagedCacheError, match=r"logits of sample 0 .* of 84 anchors"):
        codec.decode({"logits": rows["logits"]})
