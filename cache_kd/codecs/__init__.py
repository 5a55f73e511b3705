"""Targets ↔ bytes: quantised feature maps, sparse logits, each preset with a declared error bound."""

from cache_kd.codecs.fidelity import FIDELITIES, Fidelity
from cache_kd.codecs.targets import ViewCodec

__all__ = ["FIDELITIES", "Fidelity", "ViewCodec"]
