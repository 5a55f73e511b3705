"""A skipped test is a failure where skips are forbidden and the data is there; our own warnings are errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.gpu
def test_needs_gpu(): pytest.skip("no GPU")

def test_skips(): pytest.skip("a reason")

@pytest.mark.skip(reason="another reason")
def test_marked(): pass

@pytest.mark.xfail(reason="known")
def test_expected(): assert False

def test_data_is_there(bccd): pass
"""


def _run(folder: Path, module: str, *, strict: bool, data: bool) -> subprocess.CompletedProcess[str]:
    """Run pytest on `module` under the project's conftest.py and return what it printed."""
    for path in (folder / "project/tests", folder / "given"):
        path.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("conftest.py"), folder / "project/tests/conftest.py")
    (folder / "project/tests/test_sample.py").write_text(module)
    (folder / "project/pytest.ini").write_text("[pytest]\naddopts = -rs -p no:cacheprovider\nmarkers = gpu\n")
    if data:
        (folder / "given/data/bccd").mkdir(parents=True)
        (folder / "given/data/bccd/bccd.yaml").touch()
    environment = {**os.environ, "CACHE_KD_TEST_DATA": str(folder / "given")}
    environment.pop("PYTEST_ADDOPTS", None)
    environment["CACHE_KD_FORBID_SKIPS"] = "1" if strict else ""
    return subprocess.run(
        [sys.executable, "-m", "pytest"], cwd=folder / "project", env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("strict", "data", "code", "closing"),
    [
        pytest.param(True, True, 1, "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error", id="forbidden"),
        pytest.param(True, False, 0, "4 skipped, 1 xfailed", id="no data"),
        pytest.param(False, True, 0, "1 passed, 3 skipped, 1 xfailed", id="allowed"),
    ],
)
def test_skips_fail_where_forbidden(tmp_path: Path, strict: bool, data: bool, code: int, closing: str) -> None:
    run = _run(tmp_path, TESTS, strict=strict, data=data)
    assert closing in run.stdout.splitlines()[-1], run.stdout
    assert run.returncode == code
    for reason in ("no GPU", "a reason", "another reason"):
        assert reason in run.stdout
    assert ("CACHE_KD_TEST_DATA names the folder" in run.stdout) == (not data)


def test_module_skip_fails_where_forbidden(tmp_path: Path) -> None:
    run = _run(tmp_path, "import pytest\npytest.importorskip('no_such_module')\n", strict=True, data=True)
    assert run.returncode == pytest.ExitCode.INTERRUPTED, run.stdout
    assert "1 error" in run.stdout.splitlines()[-1]
    assert "no_such_module" in run.stdout


def test_own_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "plan.py", 1, module="cache_kd.views.plan")
    with pytest.warns(UserWarning, match="theirs"):
        warnings.warn_explicit("theirs", UserWarning, "plan.py", 1, module="another.library")
