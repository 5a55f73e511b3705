"""In: words on the command line. Out: calls of the pipeline, and lines for people or one JSON document for programs."""

from cache_kd.cli import caches, extraction, recipes, reporting, training
from cache_kd.cli.group import main

__all__ = ["caches", "extraction", "main", "recipes", "reporting", "training"]
