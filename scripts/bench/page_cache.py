"""In: a folder. Out: its files out of the machine's page cache, and how much of them is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def evict(folder: Path) -> None:
    """Write every file of `folder` to disk and ask the kernel to forget its pages (it keeps those that are mapped)."""
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(folder: Path) -> float:
    """Return the share of the pages of all files of `folder` that are in the page cache, by mincore."""
    there = total = 0
    for file in _files(folder):
        pages = _pages(file)
        there += sum(page & 1 for page in pages)
        total += len(pages)
    return there / total if total else 0.0


def num_bytes(folder: Path) -> int:
    """Return the bytes of all files of `folder`."""
    return sum(file.stat().st_size for file in _files(folder))


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _pages(file: Path) -> bytes:
    """Return a byte a page of `file`, whose lowest bit says that the page is in memory."""
    size = file.stat().st_size
    if not size:
        return b""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap", str(file))
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    try:
        if _LIBC.mincore(address, size, pages):
            raise OSError(ctypes.get_errno(), "mincore", str(file))
    finally:
        _LIBC.munmap(address, size)
    return pages.raw
