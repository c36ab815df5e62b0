# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "pytest", "pytest-aiohttp", "playwright", "psutil",
#     "axe-playwright-python",
# ]
# ///
"""What a call promises: each test is one sentence of it.

The server is a process, the pages run in a real Chromium with its fake camera, which
shows a turning disc, and its fake microphone, which beeps. That something is seen or
heard is what WebRTC's statistics say of the receiving end.
"""

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import playwright.async_api
import pytest
import pytest_asyncio
from aiohttp import ClientSession
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, expect
from test_media import LIMIT, chromium, fixture, free_port, running, unable

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.page]
DENIED = "Permission denied."  # in Chromium's words
CALL = "/call/0123456789abcdef"
# A connection over the loopback alone, where there is no other network.
FLAGS = ["--use-fake-device-for-media-stream", "--allow-loopback-in-peer-connection"]

# Keeps the connections, so that their statistics can be asked for.
SPY = """
window.connections = [];
window.RTCPeerConnection = class extends RTCPeerConnection {
  constructor(configuration) {
    super({ ...configuration, ...window.forced });
    connections.push(this);
  }
};
window.received = async (name) => {
  const ids = document.querySelector(`video[aria-label="${name}"]`).srcObject?.getTracks().map((t) => t.id);
  const all = { frames: 0, energy: 0, seconds: 0 };
  for (const connection of connections) {
    for (const report of (await connection.getStats()).values()) {
      if (report.type !== "inbound-rtp" || !ids?.includes(report.trackIdentifier)) continue;
      all.frames += report.framesDecoded ?? 0;
      all.energy += report.totalAudioEnergy ?? 0;
      all.seconds += report.totalSamplesDuration ?? 0;
    }
  }
  return all;
};
window.pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
"""
GROWS = """async ([name, what, least]) => {
  const before = await received(name);
  while ((await received(name))[what] < before[what] + least) await pause(0.1);
}"""
IS_SILENT = """async (name) => { // for two seconds, in which there are four beeps
  for (let last = await received(name), now; ; last = now) {
    await pause(2);
    now = await received(name);
    if (now.seconds > last.seconds + 1 && now.energy - last.energy < 1e-6) return;
  }
}"""


async def see(page: Page, *names: str) -> None:
    """Wait until frames of these members arrive at `page`."""
    async with asyncio.timeout(LIMIT):
        for name in names:
            await expect(page.get_by_label(name, exact=True)).to_be_visible()
            await page.evaluate(GROWS, [name, "frames", 5])


async def hear(page: Page, *names: str) -> None:
    """Wait until the beeps of these members arrive at `page`."""
    async with asyncio.timeout(LIMIT):
        for name in names:
            await page.evaluate(GROWS, [name, "energy", 1e-5])


async def until(page: Page, condition: str) -> None:
    """Wait until an expression is true; Playwright's own wait needs eval in the page."""
    async with asyncio.timeout(LIMIT):
        await page.evaluate(
            f"async () => {{ while (!({condition})) await pause(0.05); }}"
        )


# What runs


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def allowing():
    """A Chromium that gives every page camera, microphone and screen."""
    mapped = "--host-resolver-rules=MAP chat.example 127.0.0.1"
    async with chromium(*FLAGS, "--use-fake-ui-for-media-stream", mapped) as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def asking():
    """A Chromium that gives a page only what is in the permissions of its context."""
    async with chromium(*FLAGS) as browser:
        yield browser


@fixture
async def browser(allowing):
    yield allowing
    for context in allowing.contexts:
        await context.close()


@fixture
async def url():
    """The address of a call on a server with no ICE servers."""
    port = free_port()
    async with running(port):
        yield f"http://localhost:{port}{CALL}"


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
    jack = await join(browser, url, "Jack", **options)
    jill = await join(browser, url, "Jill", **options)
    await see(jack, "Jill")
    await see(jill, "Jack")
    return jack, jill


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def tiles(page: Page) -> Locator:
    return page.get_by_role("list", name="People in this call").get_by_role("listitem")


def news(page: Page) -> Locator:
    return page.get_by_role("log", name="Who came and went").locator("p")


def status(page: Page) -> Locator:
    return page.get_by_role("status")


def alert(page: Page) -> Locator:
    return page.get_by_role("alert")


# Calls


async def test_three_see_and_hear_one_another(browser, url):
    names = ["Jack", "Jill", "John"]
    pages = [await join(browser, url, name) for name in names]
    for page, name in zip(pages, names, strict=True):
        others = [other for other in names if other != name]
        await see(page, *others)
        await hear(page, *others)
        await expect(tiles(page)).to_have_text([f"{name} (you)", *others])


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


async def test_mute_is_heard(browser, url):
    jack, jill = await join_both(browser, url)
    await hear(jack, "Jill")
    await button(jill, "Mute").click()
    await expect(button(jill, "Mute")).to_have_attribute("aria-pressed", "true")
    async with asyncio.timeout(LIMIT):
        await jack.evaluate(IS_SILENT, "Jill")
    await see(jack, "Jill")
    await button(jill, "Mute").click()
    await hear(jack, "Jill")


async def test_a_camera_that_is_off_shows_black(browser, url):
    jack, jill = await join_both(browser, url)
    await button(jill, "Camera off").click()
    await expect(button(jill, "Camera off")).to_have_attribute("aria-pressed", "true")
    await until(jack, f"{BRIGHTNESS} < 10")
    await hear(jack, "Jill")
    await button(jill, "Camera off").click()
    await until(jack, f"{BRIGHTNESS} > 50")


BRIGHTNESS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.drawImage(document.querySelector("video[aria-label=Jill]"), 0, 0, 1, 1);
  return Math.max(...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3));
})()"""


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
        await see(jack, "Jill")
        await end()
        await expect(share).to_have_attribute("aria-pressed", "false")
        await until(jack, f"{width} <= 640")
        await see(jack, "Jill")


# What fails, and goes on


async def test_a_call_goes_on_while_the_server_is_away_and_after(browser):
    port = free_port()
    url = f"http://localhost:{port}{CALL}"
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
        jack, jill = await join_both(browser, f"http://localhost:{port}{CALL}")
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


async def test_who_crashes_and_comes_back_as_the_same_member_is_seen_again(
    browser, url
):
    script = "crypto.getRandomValues = (array) => array.fill({}n);"  # the key
    jill = await join(browser, url, "Jill", script=script.format(2))
    jack = await join(browser, url, "Jack", script=script.format(1))
    await see(jill, "Jack")
    with suppress(playwright.async_api.Error):
        await jack.goto("chrome://crash")
    jack = await join(browser, url, "Jack", script=script.format(1))
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
)
async def test_who_does_not_allow_a_device_joins_without_it(asking, url, allowed, said):
    both = ["camera", "microphone"]
    jack = await join(asking, url, "Jack", permissions=both)
    jill = await join(asking, url, "Jill", permissions=allowed)
    await expect(alert(jill)).to_have_text(said)
    await see(jill, "Jack")
    await hear(jill, "Jack")
    await expect(button(jill, "Mute")).to_be_enabled(enabled="microphone" in allowed)
    await expect(button(jill, "Camera off")).to_be_enabled(enabled="camera" in allowed)
    if "camera" in allowed:
        await see(jack, "Jill")
    if "microphone" in allowed:
        await hear(jack, "Jill")
    for page in jack, jill:
        await page.context.close()


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
        video = "document.querySelector('video[aria-label=Jill]')"
        await until(jack, f"!{video}.srcObject.getVideoTracks().some((t) => !t.muted)")


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
    for name in "Mute", "Camera off", "Share screen":
        await expect(button(jack, name)).to_be_disabled()
    await expect(tiles(jill)).to_have_count(2)


# Relays


@asynccontextmanager
async def relaying(secret: str) -> AsyncIterator[int]:
    """Run coturn on the loopback alone until the end of the block; yield its port."""
    path = shutil.which("turnserver") or unable("a relay: apt install coturn")
    port = free_port()
    options = (
        f"-n --use-auth-secret --static-auth-secret={secret} --realm=chat.example"
        f" --listening-ip=127.0.0.1 --relay-ip=127.0.0.1 --listening-port={port}"
        " --allow-loopback-peers --cli-password=unused --no-cli --no-tls --no-dtls"
        " --log-file=stdout --pidfile="
    )
    process = await asyncio.create_subprocess_exec(
        path, *options.split(), os.devnull, stdout=DEVNULL, stderr=DEVNULL
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


async def test_a_call_goes_through_coturn_with_relays_only(browser):
    port = free_port()
    pair = """async () => {
      const reports = [...(await connections[0].getStats()).values()];
      const { selectedCandidatePairId } = reports.find((r) => r.type === "transport");
      const pair = reports.find((r) => r.id === selectedCandidatePairId);
      return ["localCandidateId", "remoteCandidateId"].map((end) =>
        reports.find((r) => r.id === pair[end]).candidateType);
    }"""
    async with relaying("north") as relay:
        ice = f"turn:127.0.0.1:{relay}?secret=north"
        async with running(port, "--ice", ice):
            script = "window.forced = { iceTransportPolicy: 'relay' };"
            url = f"http://localhost:{port}{CALL}"
            for page in await join_both(browser, url, script=script):
                assert await page.evaluate(pair) == ["relay", "relay"]


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
    await expect(button(page, "Leave")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(status(page)).to_have_text("Not in the call")
    await expect(page.get_by_role("textbox", name="User name")).to_be_focused()
    await page.reload()
    await expect(page.get_by_role("textbox", name="User name")).to_have_value("Jack")
    await expect(button(page, "Join")).to_be_focused()


async def test_it_fits_every_screen_and_axe_finds_no_violation(browser, url):
    shots = os.environ.get("SHOTS")  # a folder for pictures of what is tested here

    async def check(page: Page, what: str) -> None:
        for scheme, width, height in (
            *(("light", 320, 568), ("dark", 390, 844)),
            *(("dark", 667, 375), ("light", 1280, 720)),
        ):
            await page.emulate_media(color_scheme=scheme)
            await page.set_viewport_size({"width": width, "height": height})
            violations = (await Axe().run(page)).response["violations"]
            assert [violation["help"] for violation in violations] == []
            over = "e => [e.scrollWidth - innerWidth, e.scrollHeight - innerHeight]"
            assert await page.locator("html").evaluate(over) == [0, 0]
            for seen in await page.locator("button:visible, li").all():
                await expect(seen).to_be_in_viewport(ratio=0.99)
            for seen in await tiles(page).all():
                box = await seen.bounding_box()
                assert min(box["width"], box["height"]) > 60
            if shots:
                await page.screenshot(path=f"{shots}/{what}_{width}.png")

    jack = await visit(browser, url)
    await check(jack, "lobby")
    await enter(jack, "Jack")
    jill = await join(browser, url, "Jill with a name as long as can")
    await button(jill, "Camera off").click()
    async with ClientSession() as session, AsyncExitStack() as stack:
        for number in range(3, 7):
            ws = session.ws_connect(f"{url}/ws?user={'W' * 32}&key={number}")
            await stack.enter_async_context(ws)
            await expect(tiles(jack)).to_have_count(number)
            if number in (3, 6):
                await check(jack, f"call of {number}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
