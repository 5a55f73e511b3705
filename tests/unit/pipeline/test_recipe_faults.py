"""A recipe is refused with all its faults at once, each with its line; a good one is read as it is written."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cache_kd.errors import MissingFileError, RecipeError
from cache_kd.losses import LOSSES, parse_losses
from cache_kd.pipeline.recipes import schema
from cache_kd.pipeline.recipes.reading import read_recipe
from cache_kd.pipeline.recipes.recipe import MODES

ROOT = Path(__file__).parents[3]

GOOD = """\
name: mine
question: Which one
  is better?
teacher: best.pt
data: bccd.yaml
student: yolov8n.yaml
imgsz: 64
epochs: 3
batch: 4
seeds: [0, 1]
split: val
judge: last
settings:
  lr0: 1e-3
  plots: false
caches:
  fine:
    views: 4
    plain_views: 1
    fidelity: default
  coarse:
    recode: fine
    fidelity: tiny
  logits:
    recode: fine
    store: [logits]
arms:
  plain:
    mode: plain
  cached:
    mode: cached
    cache: coarse
    losses: [cwd, "ld:weight=2"]
    views: 2
    settings:
      epochs: 5
  online:
    mode: online
  both learn:
    mode: cotrained
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with the files that the recipe names."""
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "images" / split / "0.png").touch()
    (tmp_path / "bccd.yaml").write_text("train: images/train\nval: images/val\nnames: [RBC, WBC]\n")
    (tmp_path / "best.pt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def faults(text: str, *changes: str) -> list[str]:
    """Return what is said of a recipe."""
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml|--set") as raised:
        read_recipe(Path("r.yaml"), changes)
    return list(raised.value.faults)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_a_good_recipe_is_read_as_it_is_written() -> None:
    Path("r.yaml").write_text(GOOD)
    recipe = read_recipe(Path("r.yaml"), ["settings.momentum=0.9", "seeds=[4]", "arms.cached.views=3"])
    assert (recipe.name, recipe.question, recipe.seeds) == ("mine", "Which one is better?", (4,))
    assert recipe.counts("coarse") == (4, 1)
    plain, cached, online, both = recipe.arms
    assert plain.settings == {"epochs": 3, "batch": 4, "lr0": 0.001, "plots": False, "momentum": 0.9}
    assert cached.losses == tuple(map(str, parse_losses(["cwd", "ld:weight=2"])))
    assert (cached.views, cached.settings["epochs"], cached.cache) == (3, 5, "coarse")
    assert online.losses == both.losses == ("sl2:weight=6.0",)
    assert (both.name, both.folder) == ("both learn", "both-learn")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("epochs: 3", "epoch: 3", "epoch: no such key; known: "),
        ("epochs: 3", "epoch: 3", "did you mean 'epochs'?"),
        ("batch: 4", "batch: four", "batch: 'four'; allowed: a whole number, 1 or more"),
        ("batch: 4", "batch: true", "batch: True; allowed: a whole number, 1 or more"),
        ("imgsz: 64", "imgsz: 65", "imgsz: 65; allowed: a multiple of 32"),
        ("seeds: [0, 1]", "seeds: 0", "seeds: 0; allowed: a list of whole numbers, each once"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds: [0, 0]; allowed: a list of whole numbers, each once"),
        ("judge: last", "judge: worst", "judge: 'worst'; allowed: last, best"),
        ("name: mine", "name: my/recipe", "name: 'my/recipe'; allowed: letters, digits, _ and -"),
        ("split: val", "split: test", "split: test, and bccd.yaml has no such entry"),
        ("teacher: best.pt", "teacher: none.pt", "teacher: no checkpoint none.pt"),
        ("data: bccd.yaml", "data: none.yaml", "data: no such file: none.yaml"),
        ("student: yolov8n.yaml", "student: yolov8q.yaml", "student: yolov8q.yaml: no such file"),
        ("student: yolov8n.yaml", "student: none.pt", "student: none.pt: no such file"),
        ("lr0: 1e-3", "lr00: 1e-3", "settings.lr00: "),
        ("lr0: 1e-3", "lr0: much", "settings.lr0: "),
        ("lr0: 1e-3", "epochs: 9", "settings.epochs: has a key of its own, set epochs"),
        ("lr0: 1e-3", "seed: 9", "settings.seed: is set by the recipe; use seeds"),
        ("lr0: 1e-3", "mosaic: 0.5", "settings.mosaic: changes the pixels, which stored targets belong to"),
        ("      epochs: 5", "      scale: 0.1", "arms.cached.settings.scale: changes the pixels"),
        ("      epochs: 5", "      imgsz: 96", "change it for all of them: imgsz"),
        ("      epochs: 5", "      multi_scale: 0.5", "0.5 changes the pixels by the batch"),
        ("      epochs: 5", "      resume: true", "arms.cached.settings.resume: is set by the recipe; leave it out"),
        ("    views: 4", "    view: 4", "caches.fine.view: no such key; known: "),
        ("    recode: fine\n    fidelity: tiny", "    recode: find\n    fidelity: tiny", "did you mean 'fine'?"),
        ("    fidelity: tiny", "    fidelity: tine", "caches.coarse.fidelity: 'tine'; allowed: exact, safe"),
        ("    fidelity: tiny", "    fidelity: safe", "safe is finer than default of its source fine"),
        ("    fidelity: tiny", "    fidelity: default", "caches.coarse: is what fine is"),
        ("    fidelity: tiny", "    views: 3", "caches.coarse.views: a recoded cache has its source's; set it there"),
        ("    store: [logits]", "    store: [vlr]", "caches.logits.store: its source fine has no vlr"),
        ("    plain_views: 1", "    pack: gif\n    plain_views: 1", "gif"),
        ("    mode: online", "    mode: offline", "arms.online.mode: 'offline'; allowed: plain, online"),
        ("    mode: online", "    mode: online\n    cache: fine", "mode online has its teacher beside it"),
        ("    mode: online", "    mode: online\n    losses: [cwd]", "which has its own loss only; allowed: [sl2]"),
        ("    mode: online", "    mode: online\n    balance: 0.3", "only mode cached holds shares"),
        ("    mode: online", "    mode: online\n    views: 2", "are those of a cache, and the arm names none"),
        ("    mode: plain", "    mode: plain\n    losses: [cwd]", "mode plain has none"),
        ("    mode: cotrained", "    mode: cotrained\n    losses: [cwd]", "mode cotrained distils with sl2"),
        ("    cache: coarse\n", "", "arms.cached.cache is missing"),
        ("    cache: coarse", "    cache: corse", "no cache 'corse'; known: coarse, fine, logits; did you mean"),
        ("    cache: coarse", "    cache: logits", "cwd needs store features, which cache logits does not store"),
        ("cwd, \"ld:weight=2\"", "cwe", "no loss 'cwe' in 'cwe'"),
        ("cwd, \"ld:weight=2\"", "cwd, \"cwd:weight=2\"", "cwd is there 2 times; give each loss once"),
        ("cwd, \"ld:weight=2\"", "\"cwd:wait=2\"", "no option 'wait'"),
        ("cwd, \"ld:weight=2\"", "\"mimic:layers=C3\"", "mimic needs taps C3, which cache coarse does not store"),
        ("    views: 2", "    views: 5", "arms.cached.views: 5; cache coarse has 4"),
        ("  both learn:", "  plain:", "arms.plain is there twice, first in r.yaml:28"),
        ("  both learn:\n    mode: cotrained", "  again:\n    mode: online", "arms.again: repeats 'online'"),
        ("  both learn:", "  both/learn:", "arms: 'both/learn' is no name"),
        ("judge: last", "judge: last\njudge: best", "judge is there twice, first in r.yaml:12"),
    ],
)  # fmt: skip
def test_each_fault_is_said_with_its_line(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    (fault, *more) = [said for said in faults(text) if expected in said]
    assert more == []
    place, number, _ = fault.split(":", 2)
    shown = text.splitlines()[int(number) - 1]
    assert place == "r.yaml"
    # A missing key is said of what it is missing in, anything else of its own line.
    assert shown.strip().split(":")[0] in fault


def test_all_faults_are_said_at_once_in_the_order_of_their_lines() -> None:
    text = GOOD.replace("epochs: 3", "epochs: 0").replace("    mode: online", "    mode: online\n    cache: fine")
    text = text.replace("lr0: 1e-3", "lr0: much\n  mosaic: 0").replace(
        "    recode: fine\n    fidelity: tiny", "    recode: x"
    )
    text = text.replace("name: mine", "nam: mine").replace("teacher: best.pt", "teacher: none.pt") + "surplus: 1\n"
    said = faults(text)
    numbers = [int(fault.split(":")[1]) for fault in said if fault.startswith("r.yaml:")]
    assert numbers == sorted(numbers)
    expected = {"nam": 1, "none.pt": 4, "epochs: 0": 8, "lr0": 14, "mosaic": 15, "recode": 23, "cache: mode": 39}
    for part, line in {**expected, "surplus": line_of(text, "surplus")}.items():
        assert any(part in fault and fault.startswith(f"r.yaml:{line}:") for fault in said), (part, said)
    assert any(fault.startswith("r.yaml:1: name is missing") for fault in said)


@pytest.mark.parametrize("chain", [("a", "b"), ("a", "b", "c")])
def test_a_circle_of_recodings_is_refused(chain: tuple[str, ...]) -> None:
    entries = "".join(
        f"  {name}:\n    recode: {source}\n    fidelity: tiny\n"
        for name, source in zip(chain, (*chain[1:], chain[0]), strict=True)
    )
    said = faults(GOOD.replace("caches:\n", f"caches:\n{entries}"))
    assert f"is recoded from itself: {' from '.join((*chain, chain[0]))}" in "".join(said)
    assert len([fault for fault in said if "from itself" in fault]) == len(chain)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("epochs=many", "--set epochs=many: epochs: 'many'; allowed: a whole number, 1 or more"),
        ("arms.cached.cache=find", "--set arms.cached.cache=find: arms.cached.cache: no cache 'find'"),
        ("settings.mosaic=0", "--set settings.mosaic=0: settings.mosaic: changes the pixels"),
        ("settings.device='0,1'", "time are recorded, takes one device; allowed: one, as device=0"),
        ("epoch=3", "--set epoch=3: epoch: no such key"),
        ("epochs", "--set epochs: is not of the form KEY.KEY=VALUE"),
        ("epochs.x=3", "--set epochs.x=3: epochs holds no keys"),
        ("arms.cachd.views=1", "no arm 'cachd'; known: both learn, cached, online, plain; did you mean 'cached'?"),
        ("seeds=[0", "--set seeds=[0: the value is not YAML"),
    ],
)
def test_changes_are_checked_as_the_file_is(change: str, expected: str) -> None:
    assert any(expected in fault for fault in faults(GOOD, change))


def test_arms_can_be_picked() -> None:
    Path("r.yaml").write_text(GOOD)
    assert [arm.name for arm in read_recipe(Path("r.yaml"), arms=["online", "cached"]).arms] == ["cached", "online"]
    with pytest.raises(RecipeError, match=r"--arm onlin: no arm 'onlin'; .*did you mean 'online'\?"):
        read_recipe(Path("r.yaml"), arms=["plain", "onlin"])


def test_a_change_may_mend_what_the_file_says() -> None:
    Path("r.yaml").write_text(GOOD.replace("epochs: 3", "epochs: 0"))
    assert read_recipe(Path("r.yaml"), ["epochs=7"]).arms[0].settings["epochs"] == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [a\nepochs: 3\n", "r.yaml:2: not YAML: "),
        ("- a\n", "r.yaml:1: must hold `key: value` lines"),
        ("", "r.yaml:1: must hold `key: value` lines"),
        ("settings: &a\n  lr0: *a\n", "r.yaml:2: settings.lr0 contains itself"),
        ("name: !!python/object:os.system x\n", "r.yaml:1: name: could not determine a constructor"),
    ],
)
def test_what_is_no_mapping_is_one_line(text: str, expected: str) -> None:
    assert any(fault.startswith(expected) for fault in faults(text)), faults(text)


def test_a_missing_recipe_is_one_line() -> None:
    with pytest.raises(MissingFileError, match=r"no such file: none.yaml"):
        read_recipe(Path("none.yaml"))


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda f: f.stem)
def test_recipes_of_the_project_have_no_fault(file: Path, work: Path) -> None:
    content = (work / "bccd.yaml").read_text()
    (work / "bccd.yaml").write_text(content + "test: images/val\n")
    changes = ["student=yolov8n.yaml", "teacher=best.pt", "data=bccd.yaml"]
    recipe = read_recipe(file, changes)
    assert recipe.name == file.stem
    head = file.read_text().split("\n\n")[0]
    assert all(f"# {word}" in head for word in ("Command  cache-kd run pipelines/", "Disk", "Time", "Result"))
    if file.stem == "loss_ablation":
        assert {arm.name for arm in recipe.arms} == {"plain", *LOSSES}


def test_the_document_names_every_key_and_its_code_is_python() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    known = {*schema.RECIPE, *schema.EXTRACTION, *schema.RECODING, *schema.ARM, *MODES}
    assert [name for name in sorted(known) if f"`{name}" not in text] == []
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_the_sweep_of_the_document_is_a_change_that_is_taken() -> None:
    Path("r.yaml").write_text(GOOD)
    changes = ["name=sweep-3", "arms.cached.losses=['cwd:weight=0.5']", "settings.lr0=0.00012"]
    recipe = read_recipe(Path("r.yaml"), changes)
    assert (recipe.name, recipe.arms[1].losses, recipe.arms[0].settings["lr0"]) == (
        "sweep-3",
        ("cwd:weight=0.5",),
        1.2e-4,
    )
