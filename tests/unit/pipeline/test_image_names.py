"""An image is named by number, path, file name or name without ending; a wrong name is answered with the nearest."""

from __future__ import annotations

import pytest

from cache_kd.errors import SettingError
from cache_kd.fingerprint import SourceImage
from cache_kd.pipeline.pictures import image_index

PATHS = ("train/cat.jpg", "train/dog.jpg", "more/dog.png", "more/dog.jpg", "000000000003.jpg", "7.jpg")
IMAGES = [SourceImage(path, 1, "0", "0") for path in PATHS]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("3", 3),
        ("000000000003", 4),
        ("7.jpg", 5),
        ("cat", 0),
        ("cat.jpg", 0),
        ("dog.png", 2),
        ("more/dog.jpg", 3),
    ],
)
def test_names(text: str, expected: int) -> None:
    assert image_index(IMAGES, text) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("7", r"^--image 7: no such image; allowed: 0 to 5, or a name$"),
        ("-1", r"^--image -1: no such image; nearest: .*; or a number, 0 to 5$"),
        ("cta.jpg", r"^--image cta\.jpg: no such image; nearest: cat\.jpg"),
        (
            "dog.jpg",
            r"^--image dog\.jpg: 2 images are called so: 1 \(train/dog\.jpg\), 3 \(more/dog\.jpg\); give a num",
        ),
        ("dog", r"^--image dog: 3 images are called so: 1 .*, 2 .*, 3 .*; give a number$"),
    ],
)
def test_faults(text: str, line: str) -> None:
    with pytest.raises(SettingError, match=line):
        image_index(IMAGES, text)
