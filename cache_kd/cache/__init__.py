"""In: named columns of each view. Out: a cache on disk, and its rows again; the only package that knows of Zarr."""

from cache_kd.cache.manifest import Manifest, read_manifest
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.writer import CacheWriter

__all__ = ["CacheReader", "CacheWriter", "Manifest", "read_manifest"]
