"""`python -m launch.report` of two runs, read by a real browser: the slider moves, all loads, a phone can show it."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.report.runs import Shown, read_runs, restore_pictures
from tests.helpers.finished_runs import make_run
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
EVIL = '<img src="x" onerror="document.title=1">'
H_PX, W_PX = 120, 160


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Shown]]:
    """The page, and what it should show."""
    root = tmp_path_factory.mktemp("runs")
    write_pairs(make_pairs(root / "pairs", 2, h=H_PX, w=W_PX), root / "val")
    metrics = [
        {"step": n, "loss/total": -float(n), "val/rgb/psnr/student": 20.0 + n, "val/rgb/ssim/student": 0.5}
        for n in range(1, 9)
    ]
    run = make_run(root, "plain", val=root / "val", metrics=metrics, task="plain")
    runs = [run.rename(root / EVIL.replace("/", "")), make_run(root, "distill", val=root / "val", metrics=metrics)]
    out = root / "page" / "report.html"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.report", *map(str, runs), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, cwd=root, env=env, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 runs, 2 pictures" in done.stdout and [file.name for file in out.parent.iterdir()] == ["report.html"]
    return out, restore_pictures(read_runs(runs), num=1, device=torch.device("cpu"))


class Opened:
    """The page in a window of its own, offline, with all that it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def pixels(self, selector: str) -> np.ndarray:
        shot = self.page.locator(selector).first.screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def test_nothing_is_missing_nothing_complains_and_nothing_is_asked_of_the_network(
    browser: Any, report: tuple[Path, list[Shown]]
) -> None:
    file, _ = report
    with Opened(browser, file) as opened:
        widths = opened.page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert len(widths) == 2 * (2 + 8) and set(widths) == {W_PX}  # two sliders; eight versions of each picture
        assert opened.said == [] and [url for url in opened.asked if not url.startswith("data:")] == [file.as_uri()]
        assert EVIL.replace("/", "") in opened.page.title()  # told, not done
        for text in ("loss/total", "val/rgb/psnr", "rain200", "did_ddn", "gopro", "optim.lr", "teacher.spf"):
            assert text.split(".")[-1] in opened.page.content(), text


def test_the_slider_shows_one_picture_to_its_left_and_the_other_to_its_right(
    browser: Any, report: tuple[Path, list[Shown]]
) -> None:
    file, (shown,) = report
    versions = {(version.of != "distill", version.what): version.rgb_u8.astype(int) for version in shown.versions}
    degraded, student = versions[True, "degraded"], versions[True, "student"]
    with Opened(browser, file, viewport={"width": 1200, "height": 900}) as opened:
        page, slider = opened.page, ".slider"
        box = page.locator(slider).first.bounding_box()
        zoom = box["width"] / W_PX
        assert zoom == pytest.approx(box["height"] / H_PX, rel=0.01)

        def colour(fraction: float) -> np.ndarray:
            """Mean of a patch of the slider's picture, where neither line nor handle is."""
            x, y, reach = int(fraction * W_PX), H_PX // 4, 8
            window = opened.pixels(slider)[int((y - reach) * zoom) : int((y + reach) * zoom)]
            return window[:, int((x - reach) * zoom) : int((x + reach) * zoom)].mean((0, 1))

        def of(picture: np.ndarray, fraction: float) -> Any:
            x, y, reach = int(fraction * W_PX), H_PX // 4, 8
            return pytest.approx(picture[y - reach : y + reach, x - reach : x + reach].mean((0, 1)), abs=3)

        assert abs(np.mean([degraded[22:38, 32:48].mean((0, 1)) - student[22:38, 32:48].mean((0, 1))])) > 6
        assert colour(0.25) == of(degraded, 0.25) and colour(0.75) == of(student, 0.75)
        page.locator(f"{slider} input").first.focus()
        page.keyboard.press("End")
        assert colour(0.25) == of(degraded, 0.25) and colour(0.75) == of(degraded, 0.75)
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert colour(0.25) == of(student, 0.25)
        said = page.locator(f"{slider} input").first.get_attribute("aria-valuetext")
        assert said.startswith("1 % degraded") and said.endswith("student")
        box = page.locator(slider).first.bounding_box()  # it may have scrolled
        page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.8 * box["height"])  # the mouse moves it too
        assert colour(0.25) == of(degraded, 0.25) and colour(0.75) == of(student, 0.75)
        page.locator(".strip button", has_text="clean").first.click()  # choose by the small pictures
        assert colour(0.75) == of(versions[True, "clean"], 0.75)
        page.locator("select").first.select_option(label="distill teacher")
        assert colour(0.25) == of(versions[False, "teacher"], 0.25)
        assert opened.said == []


def test_curves_tell_their_values_and_the_page_goes_dark(browser: Any, report: tuple[Path, list[Shown]]) -> None:
    file, _ = report
    with Opened(browser, file, color_scheme="light") as opened:
        page = opened.page
        figure = page.locator("figure", has_text="loss/total").first
        figure.scroll_into_view_if_needed()
        box = figure.locator("svg").bounding_box()
        page.mouse.move(box["x"] + 0.99 * box["width"], box["y"] + box["height"] / 2)
        assert "step 8:" in figure.locator("output").inner_text() and "-8.000" in figure.locator("output").inner_text()
        cursor = figure.locator(".cursor")
        assert cursor.evaluate("line => getComputedStyle(line).display") != "none"
        page.mouse.move(1, 1)
        assert cursor.evaluate("line => getComputedStyle(line).display") == "none"
        assert "at the end" in figure.locator("output").inner_text()
        paper = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
        page.locator("#theme").click()
        assert page.evaluate(paper) == "rgb(22, 24, 28)"


def test_a_phone_shows_all_of_it(browser: Any, report: tuple[Path, list[Shown]]) -> None:
    file, _ = report
    with Opened(browser, file, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator(".slider").first.bounding_box()["width"] > 300
        assert page.locator(".chart").first.bounding_box()["width"] > 300
        sizes = page.evaluate(
            "[...document.querySelectorAll('td, th, button, p, label, summary')]"
            ".map(text => parseFloat(getComputedStyle(text).fontSize))"
        )
        assert min(sizes) >= 12
