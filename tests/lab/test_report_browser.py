"""The report in a real browser: it draws, answers to its controls, and asks nobody for anything."""

import shutil
from pathlib import Path

import pytest
from synthetic import write_run

from calledshot.lab import write_report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    evil = "<script>document.title = 'taken over'</script>"
    runs = [
        write_run(folder / "demo", sources=("python", "prose"), sample=evil),
        write_run(folder / "wide", layers=8, restart=None, seed=1),
        write_run(folder / "broken", steps=30, restart=None, state="running"),
    ]
    (runs[2] / "metrics.jsonl").write_text("")
    write_report(runs, folder / "report.html", price=2.5)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1200, "light"), (390, "dark")], ids=["desktop", "phone"])
def page(request, browser, report):
    """The open report; fails when anything went wrong in it or it asked for anything but itself."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, faults, requests = context.new_page(), [], []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert faults == []
    assert requests == [report.as_uri()]
    context.close()


def lines(page, chart: str) -> list[str]:
    return page.locator(f'[data-chart="{chart}"] path.line').evaluate_all(
        "all => all.map(one => one.getAttribute('d'))"
    )


def test_every_chart_is_drawn_inside_its_frame(page):
    # Three runs, one of them without metrics; training and held-out loss of one source and of two.
    assert len([d for d in lines(page, "loss") if d]) >= 3 + 2
    for chart in ("bits_per_byte", "lr", "grad_norm", "update_norm", "tokens_per_second", "mfu"):
        assert any(lines(page, chart)), chart
    for chart in page.locator("[data-chart] svg").all():
        frame = chart.evaluate("""svg => {
            const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
            return [...svg.querySelectorAll("path.line, circle, line")].every((one) => {
              const box = one.getBBox();
              return box.x >= 0 && box.y >= 0 && box.x + box.width <= width && box.y + box.height <= height;
            });
        }""")
        assert frame
    assert page.title() != "taken over"


def test_the_page_does_not_scroll_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_controls_change_the_curves(page):
    seen = {"".join(lines(page, "loss"))}
    for control in ("FLOPs", "hours", "steps", "smooth", "log x", "log y", "last ¾"):
        page.locator(".controls label", has_text=control).click()
        now = "".join(lines(page, "loss"))
        assert "NaN" not in now
        assert now not in seen or control == "steps", control  # equal batches: steps look like tokens
        seen.add(now)


def test_hovering_names_the_values_and_the_incident(page):
    page.locator(".legend button", has_text="wide").click()
    flag = page.locator('[data-chart="loss"] path.flag').last
    chart = page.locator('[data-chart="loss"] svg')
    chart.scroll_into_view_if_needed()
    box, frame = flag.bounding_box(), chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, frame["y"] + frame["height"] / 2)
    tip = page.locator('[data-chart="loss"] .tip')
    text = tip.inner_text()
    assert "demo training" in text
    assert "demo held-out prose" in text
    assert "wide" not in text
    assert "restart: incarnation 2" in text
    inside = tip.bounding_box()
    assert inside["x"] >= 0
    assert inside["x"] + inside["width"] <= page.viewport_size["width"]


def test_it_prints_on_white_paper_with_everything_open(page):
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("[...document.querySelectorAll('details')].every((one) => one.open)")
    assert page.locator(".controls").is_hidden()
