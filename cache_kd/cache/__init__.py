"""In: named columns of each view. Out: a cache on disk, and its rows again; the only package that knows of Zarr."""

from cache_kd.cache.find import FoundCache, find_caches
from cache_kd.cache.manifest import Manifest, read_manifest
from cache_kd.cache.reader import CacheReader
from cache_kd.cache.shard_faults import Fault
from cache_kd.cache.verify import VerifyReport, verify_cache
from cache_kd.cache.writer import CacheWriter

__all__ = [
    "CacheReader",
    "CacheWriter",
    "Fault",
    "FoundCache",
    "Manifest",
    "VerifyReport",
    "find_caches",
    "read_manifest",
    "verify_cache",
]
