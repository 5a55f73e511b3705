"""The page in headless Chromium: no network, no error, tables and plots to be seen, wide and narrow, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from cache_kd.report.files import write
from cache_kd.report.findings import find
from cache_kd.report.reading import Run, Runs
from tests.unit.report.run_cases import arm, run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
WAYS = [(width, scheme) for width in (375, 1280) for scheme in ("light", "dark")]
IDS = [f"{width}-{scheme}" for width, scheme in WAYS]
OFF_PAGE = """() => [...document.querySelectorAll("body *")]
    .filter(one => !one.closest(".scroll, svg, details:not([open])"))
    .filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.tagName)"""
BOXES = "all => all.map(one => one.getBoundingClientRect()).map(box => [box.width, box.height])"
LETTERS = """all => all.map(one => [parseFloat(getComputedStyle(one).fontSize), one.getScreenCTM()])
    .map(([size, drawn]) => size * Math.hypot(drawn.a, drawn.b))"""
# Luminance contrast after WCAG 2 of an element's colour with what lies behind the page.
CONTRAST = """([select, name]) => {
    const light = text => {
        const part = text.match(/[\\d.]+/g).slice(0, 3).map(value => value / 255)
            .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return [...document.querySelectorAll(select)].map(one => getComputedStyle(one)[name])
        .filter(colour => colour.startsWith("rgb")).map(light)
        .map(ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05));
}"""


pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine; Debian has it: apt-get install chromium")
    with sync_playwright() as playwright:
        # A container's root has no sandbox; nothing but our own page is opened.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = [
        *arm("plain", [0.361, 0.358, 0.364], "plain"),
        *arm("an arm with a long name, cwd:weight=2.7,layers=P3+P4+P5, ld:weight=4.2,vlr=0.25", [0.381, 0.377, 0.384]),
        *arm("<script>document.title='taken'</script>", [0.371, 0.378, 0.369], "online"),
        *(record for at in range(6) for record in arm(f"arm {at}", [0.36 + at / 500, 0.37, 0.365])),
        run("one", 0, 0.39),
    ]
    found = find(Runs(tuple(Run(Path(f"runs/{at}/record.json"), record) for at, record in enumerate(records)), ()))
    return write(found, tmp_path_factory.mktemp("report"))[0].as_uri()


@pytest.fixture(params=WAYS, ids=IDS)
def opened(request: pytest.FixtureRequest, browser: Browser) -> Iterator[BrowserContext]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    yield context
    context.close()


def test_page_loads_by_itself_without_an_error(opened: BrowserContext, report: str) -> None:
    page = opened.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report)
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [report]
    assert said == []
    assert page.title() == "smoke · cache-kd report"
    assert page.evaluate("document.compatMode") == "CSS1Compat"


def test_everything_is_seen_and_nothing_sticks_out(opened: BrowserContext, report: str) -> None:
    page = opened.new_page()
    page.goto(report)
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    width = page.viewport_size["width"] if page.viewport_size else 0
    tables = page.locator("table").evaluate_all(BOXES)
    assert len(tables) >= 10
    assert all(box[0] > 100 and box[1] > 40 for box in tables)
    plots = page.locator("[role=img] svg").evaluate_all(BOXES)
    assert len(plots) >= 5
    assert all(250 < box[0] <= width and box[1] > 100 for box in plots)
    lines = page.locator("[role=img] svg g[id*=line2d] path").evaluate_all(BOXES)
    assert sum(box[0] > 50 for box in lines) > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OFF_PAGE) == []
    sizes = page.locator("[role=img] svg text").evaluate_all(LETTERS)
    assert min(sizes) >= 8, "text in plots is too small to read"


def test_colours_stand_out(opened: BrowserContext, report: str) -> None:
    page = opened.new_page()
    page.goto(report)
    texts = page.evaluate(CONTRAST, ["h1, p, li, th, td, figcaption, summary, a", "color"])
    assert len(texts) > 100
    assert min(texts) >= 4.5
    # currentColor is text; the arms' own are drawn as strokes of lines and need 3 as graphics do.
    strokes = page.evaluate(CONTRAST, ["[role=img] svg g[id*=line2d] path[style*='var(--arm']", "stroke"])
    assert len(strokes) > 10
    assert min(strokes) >= 3
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in ("rgb(255, 255, 255)", "rgb(22, 24, 28)")


def test_page_prints(browser: Browser, report: str, tmp_path: Path) -> None:
    context = browser.new_context(color_scheme="dark", offline=True)
    page = context.new_page()
    page.goto(report)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    folded = page.locator("details:not([open]) table").first
    box = folded.bounding_box()
    assert box and box["height"] > 20, "what is folded on the screen is printed"
    wide = page.evaluate("[...document.querySelectorAll('.scroll')].map(one => getComputedStyle(one).overflowX)")
    assert set(wide) == {"visible"}
    printed = page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 2
    context.close()
