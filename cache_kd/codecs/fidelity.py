"""In: the name of a fidelity preset, or its description in a manifest. Out: the codecs of every target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache_kd.codecs.features import ChannelFeatures, FeatureCodec, HalfFeatures
from cache_kd.codecs.logits import LOGIT_CODECS, DenseLogits, LogitCodec, SparseLogits
from cache_kd.codecs.pair_features import PairFeatures
from cache_kd.codecs.summaries import HoldStats, ScoreMap
from cache_kd.errors import MismatchError, SettingError, choices

FEATURE_CODECS: dict[str, type[HalfFeatures | ChannelFeatures | PairFeatures]] = {
    "half": HalfFeatures,
    "channel": ChannelFeatures,
    "pair": PairFeatures,
}


@dataclass(frozen=True)
class Fidelity:
    """How exactly each target is stored."""

    name: str
    features: FeatureCodec
    logits: LogitCodec
    score_map: ScoreMap
    hold_stats: HoldStats

    def describe(self) -> dict[str, Any]:
        """Return every parameter, for the manifest."""
        return {
            "fidelity": self.name,
            "features": self.features.describe(),
            "logits": self.logits.describe(),
            "score_map": self.score_map.describe(),
            "hold_stats": self.hold_stats.describe(),
        }

    @classmethod
    def from_description(cls, data: Mapping[str, Any]) -> Fidelity:
        """Return the codecs that a manifest describes; raises `MismatchError` for a kind that is not known."""
        return cls(
            name=str(data["fidelity"]),
            features=_from_kind(data["features"], FEATURE_CODECS),
            logits=_from_kind(data["logits"], LOGIT_CODECS),
            score_map=ScoreMap(**data["score_map"]),
            hold_stats=HoldStats(**data["hold_stats"]),
        )


def _from_kind(data: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    parameters = dict(data)
    kind = str(parameters.pop("kind"))
    if kind not in known:
        raise MismatchError(
            f"the manifest names the codec {kind!r}; {choices(kind, known)}; update cache-kd to read it"
        )
    return known[kind](**parameters)


_CODED_SCORES = ScoreMap(step=0.125)
_SHORT_STATS = HoldStats(mantissa_bits=10)

FIDELITIES: dict[str, Fidelity] = {
    "exact": Fidelity("exact", HalfFeatures(), DenseLogits(), ScoreMap(step=None), HoldStats(mantissa_bits=23)),
    "safe": Fidelity("safe", ChannelFeatures(), SparseLogits(threshold=0.003), _CODED_SCORES, _SHORT_STATS),
    "default": Fidelity("default", PairFeatures(0.15), SparseLogits(threshold=0.01), _CODED_SCORES, _SHORT_STATS),
    "small": Fidelity("small", PairFeatures(0.3), SparseLogits(threshold=0.01), _CODED_SCORES, _SHORT_STATS),
    "tiny": Fidelity("tiny", PairFeatures(0.8), SparseLogits(threshold=0.05), _CODED_SCORES, _SHORT_STATS),
}


def fidelity(name: str) -> Fidelity:
    """Return the preset of this name; raises `SettingError` when there is none."""
    if name not in FIDELITIES:
        raise SettingError(f"--fidelity {name!r} is unknown; {choices(name, FIDELITIES)}")
    return FIDELITIES[name]
