"""The desktop program, in real windows, against real chat.py processes.

Needs Tk and a display; without a display, Xvfb is started. What is missing is said in the
reason for skipping, or for failing where the environment variable CI is set.
"""

import asyncio
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from aiohttp import ClientSession, ClientTimeout, ClientWebSocketResponse, web

HERE = Path(__file__).parent
LONGEST = 2**14  # bytes in a message
PATIENCE = 30  # seconds after which something will not happen any more
ALIVE = 2  # seconds; a window that is busy for longer is frozen

T = TypeVar("T")


def give_up(reason: str) -> None:
    """Skip all tests for `reason`, or fail in CI, where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


try:
    import tkinter as tk
except ImportError:
    give_up("this Python has no Tk: install python3-tk")

import desktop


@pytest.fixture(scope="session", autouse=True)
def display() -> Iterator[None]:
    """Have a display, that of this machine or a virtual one."""
    if "DISPLAY" in os.environ or sys.platform in ("win32", "darwin"):
        yield
        return
    if not shutil.which("Xvfb"):
        give_up("there is no display: install xvfb")
    command = ["Xvfb", "-displayfd", "1", "-screen", "0", "1280x800x24", "-noreset"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as xvfb:
        assert xvfb.stdout
        os.environ["DISPLAY"] = f":{xvfb.stdout.readline().strip()}"
        yield
        del os.environ["DISPLAY"]
        xvfb.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A chat.py process."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "chat.py", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout
        assert "Running on" in self.process.stdout.readline()

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.communicate(timeout=PATIENCE)

    def get(self, query: str) -> str:
        url = f"http://127.0.0.1:{self.port}/?{query}"
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)


class Elsewhere:
    """An event loop in a thread, for everything that is not the window's."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.runners: list[web.AppRunner] = []
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.http = self.do(self.open())

    async def open(self) -> ClientSession:
        return ClientSession()

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what `coroutine` returns, run in the other thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(PATIENCE)

    def end(self) -> None:
        self.do(self.http.close())
        for runner in self.runners:
            self.do(runner.cleanup())
        end_loop(self.loop)
        self.thread.join()
        self.loop.close()


def end_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Let what runs in `loop`, in another thread, finish, and then stop it."""

    async def finish() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)

    asyncio.run_coroutine_threadsafe(finish(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    elsewhere = Elsewhere()
    yield elsewhere
    elsewhere.end()


class Visitor:
    """Another user, who has nothing but a WebSocket."""

    def __init__(self, elsewhere: Elsewhere, port: int, name: str) -> None:
        self.elsewhere = elsewhere
        url = f"http://127.0.0.1:{port}/ws"
        self.socket: ClientWebSocketResponse = elsewhere.do(
            elsewhere.http.ws_connect(url, params={"user": name}, max_msg_size=0)
        )

    def say(self, *texts: str) -> None:
        async def say() -> None:
            for text in texts:
                await self.socket.send_str(text)

        self.elsewhere.do(say())

    def hear(self) -> str:
        """Return the next message that is not a notice."""

        async def hear() -> str:
            while (text := await self.socket.receive_str()) == "{{RefreshUsers}}":
                pass
            return text

        return self.elsewhere.do(hear())

    def leave(self) -> None:
        self.elsewhere.do(self.socket.close())


@pytest.fixture
def visitor(server: Server, elsewhere: Elsewhere) -> Visitor:
    return Visitor(elsewhere, server.port, "Mary")


Handler = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


class FakeServer:
    """A server that does at /ws and / what a test says, to see what the window does."""

    def __init__(
        self, elsewhere: Elsewhere, ws: Handler, page: Handler | None = None, **how: Any
    ) -> None:
        async def start() -> web.AppRunner:
            app = web.Application()
            app.router.add_get("/ws", ws)
            app.router.add_get("/", page or self.nobody)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            elsewhere.runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0, **how).start()
            return runner

        self.runner = elsewhere.do(start())
        self.port: int = self.runner.addresses[0][1]

    @staticmethod
    async def nobody(_: web.Request) -> web.Response:
        return web.Response()


async def accept(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    return socket


class Desk:
    """A window, and somebody who uses it."""

    def __init__(self, port: int, user: str = "Jack") -> None:
        self.window = desktop.Window(f"127.0.0.1:{port}", user, False)
        self.window.update()

    def until(self, condition: Callable[[], object]) -> None:
        """Run the window's loop until `condition` is true."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            # It returns at the next event, and the window has one every TICK.
            self.window.tk.dooneevent(0)
            assert time.monotonic() < deadline, f"{self.state!r}\n{self.text}"

    def for_seconds(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)

    def until_shown(self, state: str) -> None:
        self.until(lambda: state in self.state)

    def until_said(self, message: str) -> None:
        self.until(lambda: message in self.text)

    def log_in(self) -> None:
        self.press("Login")
        self.until_shown("Online")
        assert self.window.stay
        self.stay = self.window.stay

    def stay_is_over(self) -> bool:
        """Tell whether the network has finished with the latest login that succeeded."""
        return self.stay.running.done()

    def widgets(self, kind: str, parent: tk.Misc | None = None) -> list[tk.Misc]:
        """Return the widgets of Tk's class `kind`, in the order they were made."""
        found: list[tk.Misc] = []
        for child in (parent or self.window).winfo_children():
            found += [child] if child.winfo_class() == kind else []
            found += self.widgets(kind, child)
        return found

    def buttons(self) -> dict[str, tk.Misc]:
        return {str(button["text"]): button for button in self.widgets("TButton")}

    def press(self, button: str) -> None:
        self.window.tk.call(self.buttons()[button], "invoke")

    def enabled(self) -> set[str]:
        """Return the texts of the buttons that can be pressed."""
        pairs = self.buttons().items()
        return {text for text, b in pairs if str(b["state"]) != "disabled"}

    def key(self, name: str, widget: tk.Misc | None = None) -> None:
        """Press the key called `name`, in the draft or another `widget`."""
        widget = widget or self.window.draft
        widget.focus_force()
        self.window.update()
        widget.event_generate(f"<{name}>")
        self.window.update()

    def say(self, text: str) -> None:
        self.draft = text
        self.press("Send")

    @property
    def draft(self) -> str:
        return self.window.draft.get("1.0", "end-1c")

    @draft.setter
    def draft(self, text: str) -> None:
        self.window.draft.delete("1.0", "end")
        self.window.draft.insert("1.0", text)

    @property
    def state(self) -> str:
        return str(self.window.light["text"])

    @property
    def text(self) -> str:
        return self.window.messages.get("1.0", "end-1c")

    @property
    def said(self) -> list[str]:
        """Return the lines of the messages, without the time where there is one."""
        return [line.partition("  ")[2] for line in self.text.split("\n")]

    @property
    def users(self) -> list[str]:
        names = self.window.getvar(str(self.window.users))
        return list(self.window.tk.splitlist(names))

    @property
    def at_end(self) -> bool:
        self.window.update_idletasks()
        return self.window.messages.yview()[1] == 1.0

    def has_size(self, width: int, height: int) -> bool:
        self.window.update()
        now = self.window.winfo_width(), self.window.winfo_height()
        return now == (width, height)

    def longest_pause(self, until: Callable[[], object]) -> float:
        """Return the most seconds for which the window was busy, `until` something."""
        beats = [time.monotonic()]

        def beat() -> None:
            beats.append(time.monotonic())
            self.window.after(10, beat)

        beat()
        self.until(until)
        return max(b - a for a, b in pairwise(beats))

    def end(self) -> None:
        self.window.log_off()
        for script in self.window.tk.splitlist(self.window.tk.call("after", "info")):
            self.window.after_cancel(script)
        self.window.destroy()
        end_loop(self.window.loop)


@pytest.fixture(scope="session")
def used() -> list[Desk]:
    """Keep every window: were one collected in another thread, Tk would break there."""
    return []


@pytest.fixture
def desks(used: list[Desk]) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(*args: Any) -> Desk:
        made.append(Desk(*args))
        return made[-1]

    yield make
    used += made
    for desk in made:
        desk.end()


@pytest.fixture
def desk(server: Server, desks: Callable[..., Desk]) -> Desk:
    return desks(server.port)


@pytest.fixture
def jack(desk: Desk) -> Desk:
    """Return a desk at which Jack is logged in."""
    desk.log_in()
    return desk


# Login and Log off


def test_at_first_one_can_only_log_in(desk: Desk) -> None:
    assert "Offline" in desk.state
    assert desk.enabled() == {"Login"}


def test_online_one_can_do_everything_but_log_in(jack: Desk) -> None:
    assert jack.enabled() == {"Log off", "Refresh", "Send"}


def test_the_light_has_another_color_online(desk: Desk) -> None:
    red = str(desk.window.light["foreground"])
    desk.log_in()
    assert str(desk.window.light["foreground"]) != red


@pytest.mark.parametrize("entry", [0, 1])
def test_enter_in_the_server_or_the_user_name_logs_in(desk: Desk, entry: int) -> None:
    desk.key("Return", desk.widgets("TEntry")[entry])
    desk.until_shown("Online")


def test_online_one_can_type_at_once(jack: Desk) -> None:
    assert jack.window.focus_get() is jack.window.draft


def test_while_logged_in_enter_does_not_log_in_again(jack: Desk) -> None:
    jack.key("Return", jack.widgets("TEntry")[1])
    assert jack.window.stay is jack.stay


def test_logging_off_is_seen_at_once_and_by_the_others(
    jack: Desk, visitor: Visitor, server: Server
) -> None:
    jack.until(lambda: jack.users == ["Jack", "Mary"])
    jack.press("Log off")
    assert "Offline" in jack.state
    assert jack.enabled() == {"Login"}
    assert jack.users == []
    jack.until(lambda: server.get("getUsers2=1") == "Mary")


def test_a_log_off_is_a_whole_closing_handshake(jack: Desk) -> None:
    jack.press("Log off")
    jack.until(jack.stay_is_over)
    assert jack.stay.socket and jack.stay.socket.close_code == 1000


def test_one_can_log_in_again(jack: Desk) -> None:
    jack.press("Log off")
    jack.until(jack.stay_is_over)
    jack.log_in()


def test_a_server_that_stands_still_does_not_hold_up_a_log_off(
    jack: Desk, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desktop, "CLOSE", ALIVE + 1)
    server.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    jack.press("Log off")
    assert jack.enabled() == {"Login"}
    assert time.monotonic() - start < ALIVE
    jack.until(jack.stay_is_over)
    assert time.monotonic() - start < desktop.CLOSE + ALIVE


# A login that fails


def test_a_name_that_is_taken_is_refused_in_the_servers_words(
    server: Server, elsewhere: Elsewhere, desk: Desk
) -> None:
    jack = Visitor(elsewhere, server.port, "Jack")
    desk.press("Login")
    desk.until_shown("Offline  User Jack already logged in")
    assert desk.enabled() == {"Login"}
    jack.leave()
    desk.log_in()


def test_a_bad_name_is_refused_in_the_servers_words(desk: Desk) -> None:
    desk.window.user.set("Jack: Mary")
    desk.press("Login")
    desk.until_shown("1 to 32 printable characters, no colon")


def test_a_server_that_does_not_exist_is_said(desk: Desk) -> None:
    desk.window.server.set("nowhere.invalid")
    desk.press("Login")
    desk.until_shown("There is no such server")


def test_a_server_that_does_not_answer_is_said(desk: Desk) -> None:
    desk.window.server.set(f"127.0.0.1:{free_port()}")
    desk.press("Login")
    desk.until_shown("No server answers there")


def test_a_server_that_takes_too_long_is_said(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desktop, "ANSWER", ClientTimeout(0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        desk.window.server.set(f"127.0.0.1:{silent.getsockname()[1]}")
        desk.press("Login")
        desk.until_shown("The server does not answer")


@pytest.mark.parametrize("server_name", ["", "[::1", "localhost:99999", "a" * 70])
def test_what_is_no_servers_name_is_said(desk: Desk, server_name: str) -> None:
    desk.window.server.set(server_name)
    desk.press("Login")
    desk.until(lambda: "Login" in desk.enabled())
    assert desk.state != "● Offline  "


def test_a_server_that_is_no_chat_is_said(
    desks: Callable[..., Desk], elsewhere: Elsewhere
) -> None:
    async def ws(_: web.Request) -> web.Response:
        return web.Response(status=404, text="<p>?", content_type="text/html")

    desk = desks(FakeServer(elsewhere, ws).port)
    desk.press("Login")
    desk.until_shown("Offline  Not Found")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return the file of a certificate for 127.0.0.1, with its key, signed by nobody."""
    if not shutil.which("openssl"):
        give_up("there is nothing to make a certificate with: install openssl")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost"
    command += " -addext subjectAltName=IP:127.0.0.1 -keyout pem -out certificate"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    with open(tmp_path / "pem", "a") as pem:
        pem.write((tmp_path / "certificate").read_text())
    return tmp_path / "pem"


def tls_server(elsewhere: Elsewhere, certificate: Path) -> FakeServer:
    async def ws(request: web.Request) -> web.WebSocketResponse:
        socket = await accept(request)
        await socket.receive()
        return socket

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return FakeServer(elsewhere, ws, ssl_context=context)


def test_a_certificate_that_is_not_trusted_is_said(
    desks: Callable[..., Desk], elsewhere: Elsewhere, certificate: Path
) -> None:
    desk = desks(tls_server(elsewhere, certificate).port)
    desk.window.tls.set(True)
    desk.press("Login")
    desk.until_shown("The server's certificate is not trusted")


# Messages


def test_everyone_hears_what_is_said_at_the_desk(jack: Desk, visitor: Visitor) -> None:
    jack.say("hello")
    assert visitor.hear() == "Jack: hello"
    jack.until_said("Jack: hello")
    assert jack.draft == ""


def test_what_others_say_is_shown_in_order(jack: Desk, visitor: Visitor) -> None:
    visitor.say(*map(str, range(300)))
    jack.until_said("Mary: 299")
    assert jack.said == [f"Mary: {i}" for i in range(300)]


def test_enter_sends(jack: Desk, visitor: Visitor) -> None:
    jack.draft = "hello"
    jack.key("Return")
    assert visitor.hear() == "Jack: hello"
    assert jack.draft == ""


def test_shift_enter_breaks_the_line(jack: Desk, visitor: Visitor) -> None:
    jack.draft = "one"
    jack.key("Shift-Return")
    assert jack.draft == "one\n"
    jack.window.draft.insert("end", "two")
    jack.key("Return")
    assert visitor.hear() == "Jack: one\ntwo"


@pytest.mark.parametrize("key", ["Return", "Shift-Return"])
def test_enter_offline_leaves_all_as_it_is(desk: Desk, key: str) -> None:
    desk.draft = "hello"
    desk.key(key)
    assert desk.draft.strip() == "hello"
    assert desk.enabled() == {"Login"}


@pytest.mark.parametrize("nothing", ["", " \n "])
def test_an_empty_message_is_not_sent(
    jack: Desk, visitor: Visitor, nothing: str
) -> None:
    jack.say(nothing)
    jack.say("something")
    assert visitor.hear() == "Jack: something"


def test_a_message_has_its_time(jack: Desk, visitor: Visitor) -> None:
    visitor.say("hello")
    jack.until_said("Mary: hello")
    assert time.strptime(jack.text.partition("  ")[0], "%H:%M")


@pytest.mark.parametrize(
    "text",
    [
        "{{RefreshUsers}}",
        "[exit] $env(HOME) {",
        "<b>bold</b> &amp;",
        "\\n %s {0}",
        "🙂",
    ],
)
def test_what_is_said_is_never_interpreted(
    jack: Desk, visitor: Visitor, text: str
) -> None:
    visitor.say(text)
    jack.until_said(f"Mary: {text}")
    jack.say(text)
    assert visitor.hear() == f"Mary: {text}"
    assert visitor.hear() == f"Jack: {text}"


def test_a_character_that_ends_strings_in_c_ends_no_message(
    jack: Desk, visitor: Visitor
) -> None:
    visitor.say("one\0two")
    jack.until_said("Mary: one\ufffdtwo")


def test_a_second_line_does_not_look_like_a_message(
    jack: Desk, visitor: Visitor
) -> None:
    visitor.say("hello\n12:00  Jack: I owe Mary 100 euros")
    jack.until_said("euros")
    messages = jack.window.messages
    assert messages.tag_names("2.0") == messages.tag_names("2.7") == ("text",)
    of_author, of_second_line = messages.bbox("1.7"), messages.bbox("2.0")
    assert of_author and of_second_line and of_author[0] < of_second_line[0]


def test_authors_look_different(
    jack: Desk, server: Server, elsewhere: Elsewhere
) -> None:
    for name in "Mary", "Nora":
        Visitor(elsewhere, server.port, name).say("hello")
        jack.until_said(f"{name}: hello")
    messages = jack.window.messages
    colors = {
        messages.tag_cget(messages.tag_names(f"{n}.7")[0], "foreground") for n in (1, 2)
    }
    assert len(colors) == 2


def test_a_message_of_16_kib_is_sent(jack: Desk, visitor: Visitor) -> None:
    text = "é" * (LONGEST // 2)
    jack.say(text)
    assert visitor.hear() == f"Jack: {text}"


def test_a_longer_message_is_refused_and_stays_in_the_draft(
    jack: Desk, visitor: Visitor
) -> None:
    text = "é" * (LONGEST // 2) + "!"
    jack.say(text)
    assert "16,385 bytes" in jack.state and "Online" in jack.state
    assert jack.draft == text
    jack.say("short")
    assert visitor.hear() == "Jack: short"


ENDLESS = "word " * 200_000


def test_an_endless_line_does_not_freeze_the_window(
    jack: Desk, visitor: Visitor
) -> None:
    visitor.say(ENDLESS[:LONGEST], "done")
    assert jack.longest_pause(lambda: "Mary: done" in jack.text) < ALIVE


def test_an_endless_line_that_is_pasted_does_not_freeze_the_window(desk: Desk) -> None:
    desk.window.clipboard_clear()
    desk.window.clipboard_append(ENDLESS)

    def paste() -> None:
        desk.window.draft.event_generate("<<Paste>>")
        desk.window.after_idle(desk.window.draft.see, "end")
        desk.window.after_idle(pasted.append, True)

    pasted: list[bool] = []
    desk.window.after(1, paste)
    assert desk.longest_pause(lambda: pasted) < ALIVE
    assert desk.draft == ENDLESS


# The room that messages take


def test_the_messages_follow_the_end(jack: Desk, visitor: Visitor) -> None:
    visitor.say(*map(str, range(100)))
    jack.until_said("Mary: 99")
    assert jack.at_end


def test_the_messages_stay_where_one_reads_back(jack: Desk, visitor: Visitor) -> None:
    visitor.say(*map(str, range(100)))
    jack.until_said("Mary: 99")
    jack.window.messages.yview_moveto(0.3)
    jack.window.update()
    top = jack.window.messages.index("@0,0")
    visitor.say("later")
    jack.until_said("Mary: later")
    jack.window.update()
    assert jack.window.messages.index("@0,0") == top
    jack.window.messages.yview_moveto(1)
    jack.window.update()
    visitor.say("last")
    jack.until_said("Mary: last")
    assert jack.at_end


def test_the_room_goes_to_the_messages_and_the_end_stays(
    jack: Desk, visitor: Visitor
) -> None:
    visitor.say(*map(str, range(100)))
    jack.until_said("Mary: 99")
    window = jack.window
    for size in (760, 400), (1200, 700), (740, 320):
        others = window.winfo_height() - window.messages.winfo_height()
        window.geometry("{}x{}".format(*size))
        jack.until(partial(jack.has_size, *size))
        assert window.winfo_height() - window.messages.winfo_height() == others
        assert jack.at_end


def test_the_last_thousand_messages_are_kept_whole(
    jack: Desk, visitor: Visitor
) -> None:
    visitor.say(*(f"{i}\nsecond line" for i in range(1100)))
    jack.until_said("Mary: 1099")
    lines = jack.text.split("\n")
    assert len(lines) == 2000
    assert lines[0].endswith("Mary: 100") and lines[1] == "second line"


def test_who_reads_back_can_read_on_while_old_messages_go(
    jack: Desk, visitor: Visitor
) -> None:
    visitor.say(*map(str, range(1000)))
    jack.until_said("Mary: 999")
    messages = jack.window.messages
    messages.yview("500.0")
    jack.window.update()
    visitor.say(*map(str, range(1000, 1300)))
    jack.until_said("Mary: 1299")
    jack.window.update()
    assert messages.get("@0,0 linestart", "@0,0 lineend").endswith("Mary: 499")


def test_a_storm_leaves_the_window_alive(jack: Desk, visitor: Visitor) -> None:
    storm = threading.Thread(target=visitor.say, args=map(str, range(10_000)))
    storm.start()
    assert jack.longest_pause(lambda: "Mary: 9999" in jack.text) < ALIVE
    storm.join()
    assert jack.said == [f"Mary: {i}" for i in range(9_000, 10_000)]
    assert jack.at_end


def test_a_storm_is_drawn_in_portions(desk: Desk) -> None:
    desk.window.heard.extend([("12:00", "Mary: " + "word " * 200)] * 1000)
    desk.window.draw()
    assert desk.text and desk.window.heard


# The users


def test_the_users_are_listed_in_order_of_login(
    jack: Desk, server: Server, elsewhere: Elsewhere
) -> None:
    jack.until(lambda: jack.users == ["Jack"])
    visitors = [Visitor(elsewhere, server.port, n) for n in ("{Zoë} $x", "Mary Ann")]
    jack.until(lambda: jack.users == ["Jack", "{Zoë} $x", "Mary Ann"])
    assert jack.window.side["text"] == "Users (3)"
    visitors[0].leave()
    jack.until(lambda: jack.users == ["Jack", "Mary Ann"])


def test_a_burst_of_notices_costs_two_requests_one_after_the_other(
    desks: Callable[..., Desk], elsewhere: Elsewhere
) -> None:
    requests: list[asyncio.Event] = []  # each is set to let its answer go

    async def ws(request: web.Request) -> web.WebSocketResponse:
        socket = await accept(request)
        for _ in range(50):
            await socket.send_str("{{RefreshUsers}}")
        await socket.send_str("Mary: that was all")
        await socket.receive()
        return socket

    async def page(_: web.Request) -> web.Response:
        requests.append(asyncio.Event())
        number = len(requests)
        await requests[-1].wait()
        return web.Response(text=f"answer {number}")

    def answer() -> None:
        elsewhere.loop.call_soon_threadsafe(requests[-1].set)

    desk = desks(FakeServer(elsewhere, ws, page).port)
    desk.log_in()
    desk.until_said("that was all")
    desk.until(lambda: requests)
    desk.for_seconds(0.5)
    assert len(requests) == 1
    answer()
    desk.until(lambda: len(requests) == 2)
    answer()
    desk.until(lambda: desk.users == ["answer 2"])
    desk.for_seconds(0.5)
    assert len(requests) == 2
    desk.press("Refresh")
    desk.until(lambda: len(requests) == 3)
    answer()
    desk.until(lambda: desk.users == ["answer 3"])


def test_a_list_that_could_not_be_got_is_asked_for_again(
    desks: Callable[..., Desk],
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(desktop, "FIRST_PAUSE", 0.05)
    answers = [web.Response(status=500), web.Response(text="Jack")]

    async def ws(request: web.Request) -> web.WebSocketResponse:
        socket = await accept(request)
        await socket.send_str("{{RefreshUsers}}")
        await socket.receive()
        return socket

    async def page(_: web.Request) -> web.Response:
        return answers.pop(0)

    desk = desks(FakeServer(elsewhere, ws, page).port)
    desk.log_in()
    desk.until(lambda: desk.users == ["Jack"])


# A connection that is lost


def test_a_server_that_is_killed_and_comes_back_is_joined_again(
    jack: Desk, server: Server
) -> None:
    jack.draft = "draft"
    jack.until(lambda: jack.users == ["Jack"])
    server.end(signal.SIGKILL)
    jack.until_shown("The connection was lost; trying again in")
    assert jack.state.startswith("● Offline")
    assert jack.enabled() == {"Log off"}
    assert jack.users == []
    server.start()
    jack.until_shown("Online")
    jack.until(lambda: jack.users == ["Jack"])
    assert jack.draft == "draft"


def test_a_server_that_stops_is_joined_again(jack: Desk, server: Server) -> None:
    server.end(signal.SIGTERM)
    jack.until_shown("trying again in")
    server.start()
    jack.until_shown("Online")


def test_a_reset_is_said_and_not_retried(jack: Desk, server: Server) -> None:
    server.get("resetUsers=1")
    jack.until_shown("Offline  Closed by the server: the users were reset")
    assert jack.enabled() == {"Login"}
    jack.until(jack.stay_is_over)


@pytest.mark.parametrize("code", [1000, 1002, 1007, 1009])
def test_a_server_that_lets_one_go_for_good_is_left_alone(
    desks: Callable[..., Desk], elsewhere: Elsewhere, code: int
) -> None:
    desk = desks(closing_server(elsewhere, code).port)
    desk.press("Login")
    desk.until_shown(f"Closed by the server: {code}")
    assert desk.enabled() == {"Login"}


@pytest.mark.parametrize("code", [1001, 1011, 1012])
def test_a_server_that_has_to_go_is_joined_again(
    desks: Callable[..., Desk], elsewhere: Elsewhere, code: int
) -> None:
    desk = desks(closing_server(elsewhere, code).port)
    desk.press("Login")
    desk.until_shown(f"Closed by the server: {code}; trying again")
    desk.until_shown("Online")


def closing_server(elsewhere: Elsewhere, code: int | None) -> FakeServer:
    """Return a server that closes the first WebSocket with `code`, if any, no other."""
    logins: list[str] = []

    async def ws(request: web.Request) -> web.WebSocketResponse:
        socket = await accept(request)
        logins.append(request.query["user"])
        if len(logins) == 1 and code:
            await socket.close(code=code)
        else:
            await socket.receive()
        return socket

    return FakeServer(elsewhere, ws)


def test_coming_back_a_name_that_is_still_taken_is_tried_again(
    desks: Callable[..., Desk],
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(desktop, "FIRST_PAUSE", 0.5)
    attempts: list[str | None] = []

    async def ws(request: web.Request) -> web.StreamResponse:
        if "Upgrade" in request.headers:
            attempts.append("")
        if 2 <= len(attempts) <= 3:
            raise web.HTTPConflict(text="User Jack already logged in")
        socket = await accept(request)
        if len(attempts) == 1 and request.transport:
            request.transport.abort()
        await socket.receive()
        return socket

    desk = desks(FakeServer(elsewhere, ws).port)
    desk.press("Login")
    desk.until_shown("Offline  User Jack already logged in; trying again in")
    desk.until_shown("Online")
    assert len(attempts) == 4


def test_a_log_off_ends_the_attempts(jack: Desk, server: Server) -> None:
    server.end(signal.SIGKILL)
    jack.until_shown("trying again in")
    jack.press("Log off")
    jack.until(jack.stay_is_over)
    assert jack.state == "● Offline  "
    assert jack.enabled() == {"Login"}


def test_the_pauses_grow_up_to_the_longest(
    jack: Desk, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ranges.append((low, high))
        return 0.001 * high

    pauses = record_pauses(monkeypatch)
    monkeypatch.setattr(random, "uniform", uniform)
    server.end(signal.SIGKILL)
    jack.until(lambda: len(pauses) >= 7)
    assert pauses[:7] == [0.001, 0.002, 0.004, 0.008, 0.01, 0.01, 0.01]
    assert ranges[0] == (0.5, 1)


def record_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        pauses.append(round(seconds, 6))
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", recorded)
    return pauses


def test_a_log_off_does_not_end_the_next_login(
    jack: Desk, server: Server, elsewhere: Elsewhere
) -> None:
    server.process.send_signal(signal.SIGSTOP)
    first = jack.stay
    jack.press("Log off")
    jack.window.server.set(f"127.0.0.1:{closing_server(elsewhere, None).port}")
    jack.log_in()
    jack.until(first.running.done)
    jack.for_seconds(0.1)
    assert not jack.stay_is_over()
    assert "Online" in jack.state


def test_a_server_that_falls_silent_is_noticed(
    server: Server, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desktop, "HEARTBEAT", 0.4)
    desk.log_in()
    server.process.send_signal(signal.SIGSTOP)
    desk.until_shown("The connection was lost")


def test_a_connection_may_be_older_than_an_answer_may_take(
    desk: Desk, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desktop, "ANSWER", ClientTimeout(0.5))
    desk.log_in()
    desk.for_seconds(0.7)
    visitor.say("hello")
    desk.until_said("Mary: hello")


def test_what_was_said_into_a_lost_connection_is_a_draft_again(
    jack: Desk, server: Server
) -> None:
    assert jack.stay.socket
    server.end(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while not jack.stay.socket.closed:  # and the window, whose loop stands, is Online
        assert time.monotonic() < deadline
    assert "Online" in jack.state
    jack.say("hello")
    assert jack.draft == ""
    jack.until(lambda: jack.draft == "hello")


# The end of the program

PROGRAM = """
import queue, socket, sys, threading, time
import desktop

class Window(desktop.Window):
    shown = ""

    def __init__(self, **options):
        super().__init__(**options)
        self.after(0, self.log_in)
        self.after(0, self.look)

    def look(self):
        if self.light["text"] != self.shown:
            self.shown = self.light["text"]
            print(self.shown, flush=True)
        if closed.empty():
            self.after(10, self.look)
        else:
            self.destroy()

closed = queue.SimpleQueue()
threading.Thread(target=lambda: closed.put(sys.stdin.read()), daemon=True).start()
desktop.Window = Window
"""


class Program:
    """A process of the program, in which a user pressed Login."""

    def __init__(self, server: str, *options: str, before: str = "pass") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{PROGRAM}\n{before}\ndesktop.main()"]
            + ["--user", "Jack", "--server", server, *options],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.limit = threading.Timer(PATIENCE, self.process.kill)
        self.limit.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.limit.cancel()
        self.process.kill()
        self.process.communicate()

    def until_shown(self, state: str) -> None:
        assert self.process.stdout
        assert any(state in line for line in self.process.stdout)

    def close_window(self) -> None:
        """Close the window, as Tk itself does when the window manager tells it to."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.stdin = None

    def assert_ends_well(self, seconds: float) -> None:
        start = time.monotonic()
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert time.monotonic() - start < seconds
        assert errors == ""
        assert self.process.returncode == 0


def test_with_tls_it_logs_in_where_the_certificate_is_trusted(
    elsewhere: Elsewhere, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server = tls_server(elsewhere, certificate)
    with Program(f"127.0.0.1:{server.port}", "--tls") as program:
        program.until_shown("Online")


def test_closed_while_connecting_it_ends_at_once() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Program(f"127.0.0.1:{silent.getsockname()[1]}") as program,
    ):
        program.until_shown("Connecting")
        program.close_window()
        program.assert_ends_well(ALIVE)


def test_closed_while_a_name_is_looked_up_it_ends_at_once() -> None:
    slow = f"socket.getaddrinfo = lambda *a, **k: time.sleep({2 * PATIENCE})"
    with Program("slow.invalid", before=slow) as program:
        program.until_shown("Connecting")
        program.close_window()
        program.assert_ends_well(ALIVE)


def test_closed_while_online_it_logs_off_and_ends_at_once(elsewhere: Elsewhere) -> None:
    codes: list[int | None] = []

    async def ws(request: web.Request) -> web.WebSocketResponse:
        socket = await accept(request)
        await socket.receive()
        codes.append(socket.close_code)
        return socket

    fake = FakeServer(elsewhere, ws)
    with Program(f"127.0.0.1:{fake.port}") as program:
        program.until_shown("Online")
        program.close_window()
        program.assert_ends_well(ALIVE)
    assert codes == [1000]


def test_closed_while_retrying_it_ends_at_once(server: Server) -> None:
    with Program(f"127.0.0.1:{server.port}") as program:
        program.until_shown("Online")
        server.end(signal.SIGKILL)
        program.until_shown("trying again")
        program.close_window()
        program.assert_ends_well(ALIVE)


def test_closed_while_the_server_stands_still_it_ends_soon(server: Server) -> None:
    with Program(f"127.0.0.1:{server.port}") as program:
        program.until_shown("Online")
        server.process.send_signal(signal.SIGSTOP)
        program.close_window()
        program.assert_ends_well(desktop.CLOSE + ALIVE)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_ctrl_c_ends_it_quietly(server: Server) -> None:
    with Program(f"127.0.0.1:{server.port}") as program:
        program.until_shown("Online")
        program.process.send_signal(signal.SIGINT)
        program.assert_ends_well(ALIVE)
    assert server.get("getUsers2=1") == ""


def run_without(what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{what}; import desktop; desktop.main()"],
        check=False,
        cwd=HERE,
        env={k: v for k, v in os.environ.items() if k != "DISPLAY"} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="always has a display")
def test_without_a_display_it_says_what_to_install() -> None:
    ended = run_without("pass")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "install" in ended.stderr and "xvfb" in ended.stderr


def test_without_tk_it_says_what_to_install() -> None:
    ended = run_without("import sys; sys.modules['tkinter'] = None")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "install python3-tk" in ended.stderr
