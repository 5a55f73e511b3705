"""Wires the stages: extraction, training, opening and checking caches."""
