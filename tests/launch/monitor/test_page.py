"""The page in a real browser: live, finished, by keyboard, and talking to nobody but its hub."""

import time
from collections.abc import Callable, Iterator

import pytest

from launch.monitor.hub import POLL_S

sync_api = pytest.importorskip("playwright.sync_api")
Page = sync_api.Page

PATIENCE_MS = 300_000  # with a machine that is busy with other work
REPLAY_MS = 700  # page.js: between two steps of a replay
sync_api.expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def browser(program: Callable[[str], str]) -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program("chromium"), args=["--no-sandbox"], timeout=PATIENCE_MS
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """A page whose console must stay silent and whose requests must all go to one origin."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    said: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.add("/".join(request.url.split("/")[:3])))
    yield page
    context.close()
    assert said == []
    assert len(asked) == 1


def opened(page: Page, origin: str) -> Page:
    page.goto(origin)
    page.wait_for_selector("body[data-seen]")
    return page


def text(page: Page, selector: str) -> str:
    return str(page.inner_text(selector))


def wait_for(page: Page, selector: str, wanted: str) -> None:
    sync_api.expect(page.locator(selector)).to_have_text(wanted)


def test_new_line_reaches_the_page_with_the_hubs_next_look(written, serving, page) -> None:
    """Which is within a second: the hub looks four times in one, and the page waits for nothing of its own."""
    assert POLL_S <= 0.25
    page.add_init_script("window.setTimeout = window.setInterval = window.requestAnimationFrame = () => 0")
    written.step(1)
    opened(page, serving(written.path))
    wait_for(page, "#progress", "1 of 8")
    for step in (2, 3, 4):
        written.step(step)
        wait_for(page, "#progress", f"{step} of 8")
        wait_for(page, "#step", f"step {step}")
    sync_api.expect(page.locator("#reward")).to_have_attribute("aria-label", "Reward by step. At step 4: rollouts0.400")


def test_step_under_way_is_drawn_while_it_runs(written, serving, page) -> None:
    written.step(1)
    opened(page, serving(written.path))
    written.point(2, time.time(), running=8, finished=0)
    written.point(2, time.time() + 0.5, running=6, finished=2)
    wait_for(page, "#rollout-title", "Rollouts of step 2")
    wait_for(page, "#rollout-note", "2 of 8 finished · 20 tokens · 0.5 s · under way")
    assert text(page, "#samples-title") == "Samples of step 1"


def test_step_that_a_dead_run_left_is_not_said_to_go_on(written, serving, page) -> None:
    written.step(1)
    written.point(2, time.time(), running=8, finished=0)
    written.run.close()
    opened(page, serving(written.path))
    wait_for(page, "#rollout-note", "0 of 8 finished · 0 tokens · 0.0 s · never finished")


def test_page_goes_on_after_a_question_that_was_not_answered(written, serving, browser) -> None:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page, broken = context.new_page(), []
    page.on("pageerror", lambda error: broken.append(str(error)))
    written.step(1)
    opened(page, serving(written.path))
    page.route("**/api/steps**", lambda route: route.abort())
    with page.expect_event("requestfailed"):
        written.step(2)
    page.unroute("**/api/steps**")
    written.step(3)
    sync_api.expect(page.locator("#reward")).to_have_attribute("aria-label", "Reward by step. At step 3: rollouts0.300")
    page.route("**/api/**", lambda route: route.abort())
    page.keyboard.press("Home")
    page.select_option("#order", "best")
    wait_for(page, "#step", "step 1")
    context.close()
    assert broken == []


def test_finished_run_is_replayed(written, serving, page) -> None:
    for step in range(1, 6):
        written.step(step)
    written.end()
    page.clock.install(time=0)
    opened(page, serving(written.path))
    wait_for(page, "#state", "done")
    wait_for(page, "#step", "step 5")
    page.clock.pause_at(10**10)  # from here on the page's time passes when it is told to
    page.click("#play")
    wait_for(page, "#step", "step 1")
    page.clock.run_for(REPLAY_MS)
    wait_for(page, "#step", "step 2")
    wait_for(page, "#rollout-title", "Rollouts of step 2")
    page.click("#play")
    assert page.get_attribute("#play", "aria-pressed") == "false"
    page.fill("#slider", "4")
    wait_for(page, "#rollout-title", "Rollouts of step 4")
    wait_for(page, "#samples-title", "Samples of step 4")
    sync_api.expect(page.locator("#figures")).to_contain_text("0.400")  # its own question: it may come last
    assert page.get_attribute("#lanes", "aria-label").startswith("What 2 workers do: decode")
    curve = "Sequences running: at most 8, over {} seconds; 1 switches of strategy"
    assert page.get_attribute("#curve", "aria-label") == curve.format("8.0")
    page.click("#zoom")
    assert page.get_attribute("#curve", "aria-label") == curve.format("4.0")
    page.hover("#lanes canvas", position={"x": 400, "y": 10})
    wait_for(page, "#tip", "decode 3.00 s")
    assert page.get_attribute("#length-hist svg", "aria-label") == "8 rollouts between 0 and 24"


def test_everything_is_reached_by_keyboard(written, serving, page) -> None:
    for step in (1, 2, 3):
        written.step(step)
    opened(page, serving(written.path))
    wait_for(page, "#step", "step 3")
    wait_for(page, "#samples-title", "Samples of step 3")
    page.wait_for_selector("#sample pre")
    order = []
    for _ in range(14):
        page.keyboard.press("Tab")
        focused = page.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]")
        order.append(focused[0] or "skip")
        assert focused[1] == "solid", f"{focused[0]} does not show that it has the focus"
        if focused[0] == "sample":
            break
    assert order[0] == "skip"
    wanted = ["theme", "previous", "slider", "play", "follow", "events", "order", "row-0", "sample"]
    assert [name for name in order if name in wanted] == wanted
    page.keyboard.press("ArrowLeft")
    wait_for(page, "#step", "step 2")
    page.keyboard.press("Home")
    wait_for(page, "#step", "step 1")
    wait_for(page, "#samples-title", "Samples of step 1")
    page.keyboard.press("End")
    wait_for(page, "#step", "step 3")
    wait_for(page, "#samples-title", "Samples of step 3")
    wait_for(page, "#sample mark", " 0")
    page.focus("#row-0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    wait_for(page, "#sample mark", " 2")
    assert page.evaluate("document.activeElement.id") == "row-2"


def test_accepted_drafts_are_coloured_and_markup_stays_text(written, serving, page) -> None:
    written.step(1)
    rows = [
        written.row(1, 0)
        | {"text": "<img src=x onerror=alert(1)>", "question": "<b>?</b>", "token_ids": [], "drafted": []}
    ]
    written.run.write_samples(1, rows + [written.row(1, 1)])
    opened(page, serving(written.path))
    page.wait_for_selector("#sample pre")
    assert page.locator("main img").count() == 0 and page.locator("#samples b b").count() == 0
    assert "<b>?</b>" in text(page, "#sample")
    page.click("#row-1")
    wait_for(page, "#sample mark", " 1")
    colours = page.evaluate(
        "['mark', 'pre'].map(name => getComputedStyle(document.querySelector(`#sample ${name}`)).backgroundColor)"
    )
    assert colours[0] != colours[1]


def test_cut_run_is_shown_as_it_stands(written, serving, page) -> None:
    for step in (1, 2, 3):
        written.step(step)
    opened(page, serving(written.path))
    wait_for(page, "#progress", "3 of 8")
    written.run.truncate_after(1)
    written.step(2, reward_mean=0.75)
    wait_for(page, "#progress", "2 of 8")
    sync_api.expect(page.locator("#reward")).to_have_attribute("aria-label", "Reward by step. At step 2: rollouts0.750")


def test_narrow_and_dark_page_fits_its_window(written, serving, page) -> None:
    for step in (1, 2):
        written.step(step, drafter_version=1, drafter_loss=0.4, drafter_served_accept_length=1.5)
    page.set_viewport_size({"width": 380, "height": 800})
    page.emulate_media(color_scheme="dark")
    opened(page, serving(written.path))
    wait_for(page, "#step", "step 2")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 22)"
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(247, 247, 245)"
    assert page.is_visible("#head")


def test_alarm_stands_at_the_top(written, serving, page) -> None:
    written.step(1, prob_diff_mean=0.02)
    opened(page, serving(written.path))
    sync_api.expect(page.locator("#alarms .alarm")).to_contain_text("mean probability difference 0.0200 in step 1")
    sync_api.expect(page.locator("#figures .alarm")).to_contain_text("0.0200")
