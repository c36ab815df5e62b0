"""The desktop program, in real windows under Xvfb, against real chats.

The windows run in the test's thread; the chats, and all other users, in another.
"""

import asyncio
import random
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import chat
from test_chat import CI, CLOSE, LIMIT, Peer, program

try:
    import desktop
except SystemExit as without_tk:
    give_up = pytest.fail if CI else partial(pytest.skip, allow_module_level=True)
    give_up(str(without_tk))

LONGEST = 2**14  # bytes in a message
ALIVE = 2  # seconds; a window that is busy for longer is frozen


@pytest.fixture(scope="session", autouse=True)
def display():
    """A screen that nobody sees."""
    if sys.platform in ("win32", "darwin"):
        yield
        return
    command = [program("Xvfb", "xvfb"), "-displayfd", "1", "-noreset"]
    with subprocess.Popen(
        [*command, "-screen", "0", "1280x800x24", "-nolisten", "tcp"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as xvfb:
        try:
            assert select.select([xvfb.stdout], [], [], LIMIT)[0], "Xvfb is silent"
            number = xvfb.stdout.readline().decode().strip()
            assert number, "Xvfb does not start"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DISPLAY", f":{number}")
                yield
        finally:
            xvfb.terminate()


class Elsewhere:
    """An event loop in a thread, for everything that is not the window's."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.runners = []
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def begin(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def do(self, coroutine):
        """Return what `coroutine` returns, run in the other thread."""
        return self.begin(coroutine).result(LIMIT)

    def call(self, function, *args):
        """Return what `function` returns, called in the other thread."""

        async def call():
            return function(*args)

        return self.do(call())

    def serve(self, app, port=0, **how):
        """Serve `app`; return the port."""

        async def start():
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            self.runners.append(runner)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port, **how).start()
            return runner.addresses[0][1]

        return self.do(start())

    def end(self):
        self.call(Peer.abort_all)
        for runner in self.runners:
            self.do(runner.cleanup())
        end_loop(self.loop)
        self.thread.join()
        self.loop.close()


def end_loop(loop):
    """Let what runs in `loop`, in another thread, finish, and then stop it."""

    async def finish():
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        _, running = await asyncio.wait(tasks, timeout=LIMIT) if tasks else (0, 0)
        assert not running, "\n".join(str(task.get_stack()) for task in running)

    asyncio.run_coroutine_threadsafe(finish(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


@pytest.fixture
def elsewhere():
    elsewhere = Elsewhere()
    yield elsewhere
    elsewhere.end()


class Chat:
    """A chat in the other thread, behind something that may answer in its place."""

    def __init__(self, elsewhere, port=0, **how):
        self.elsewhere, self.logins, self.instead = elsewhere, [], None

        @web.middleware
        async def pass_on(request, handler):
            if "Upgrade" in request.headers:
                self.logins.append(dict(request.query))
            answer = self.instead and await self.instead(request)
            return answer or await handler(request)

        app = chat.make_app()
        app.middlewares.append(pass_on)
        self.room = app[chat.ROOM]
        self.port = elsewhere.serve(app, port, **how)

    def refuse(self, status, words, kind="text/plain"):
        """Answer each login so."""

        async def refuse(request):
            if request.path == "/ws":
                return web.Response(status=status, text=words, content_type=kind)

        self.instead = refuse

    def close(self, user, code):
        """Close the connection of `user`, and take no note of an answer."""
        self.elsewhere.begin(self.room.users[user].close(code=code))

    def users(self):
        return self.elsewhere.call(self.room.names)


@pytest.fixture
def room(elsewhere):
    return Chat(elsewhere)


class Line:
    """A TCP proxy before `port`; its connections can go dark: they pass nothing on."""

    def __init__(self, elsewhere, port):
        self.elsewhere, self.there, self.carried = elsewhere, port, []
        start = asyncio.start_server(self.carry, "127.0.0.1", 0)
        self.server = elsewhere.do(start)
        self.port = self.server.sockets[0].getsockname()[1]

    async def carry(self, reader, writer):
        up, down = asyncio.Event(), asyncio.Event()
        self.carried.append((up, down, writer.transport, asyncio.current_task()))
        up.set()
        down.set()
        with suppress(OSError):
            there = await asyncio.open_connection("127.0.0.1", self.there)
            ways = (reader, there[1], up), (there[0], writer, down)
            await asyncio.gather(*(self.pass_on(*way) for way in ways))
        writer.transport.abort()

    @staticmethod
    async def pass_on(reader, writer, light):
        while piece := await reader.read(2**16):
            await light.wait()
            writer.write(piece)
        writer.close()

    def darken(self, *lights):
        """Let the connections there are pass nothing on, neither up (0) nor down (1)."""
        for carried in self.carried:
            for light in lights or (0, 1):
                self.elsewhere.call(carried[light].clear)

    def lighten(self):
        """Let what they hold go on."""
        for up, down, *_ in self.carried:
            up.set()
            down.set()

    def cut(self, there):
        """End the connections, and lead the next ones to another port."""
        self.there = there
        for *_, transport, _ in self.carried:
            self.elsewhere.call(transport.abort)

    def end(self):
        self.server.close()
        for *_, task in self.carried:
            task.cancel()


@pytest.fixture
def line(elsewhere, room):
    line = Line(elsewhere, room.port)
    yield line
    elsewhere.call(line.end)


class Visitor:
    """Another user."""

    def __init__(self, elsewhere, port, name="Mary"):
        self.elsewhere = elsewhere
        self.peer = elsewhere.do(Peer.login(port, name))

    def say(self, *texts):
        self.elsewhere.call(self.peer.say, *texts)

    def hear(self, count=1):
        return self.elsewhere.do(self.peer.hear(count))

    def leave(self):
        self.elsewhere.call(self.peer.send, CLOSE)


@pytest.fixture
def mary(elsewhere, room):
    return Visitor(elsewhere, room.port)


class Desk:
    """A window, and somebody who uses it."""

    def __init__(self, port, user="Jack"):
        self.window = desktop.Window(f"127.0.0.1:{port}", user, False)
        self.window.update()

    def until(self, condition):
        """Run the window's loop until `condition` is true."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            # It returns at the next event, and the window has one every TICK.
            self.window.tk.dooneevent(0)
            assert time.monotonic() < deadline, f"{self.state!r}\n{self.text[-1000:]}"

    def for_seconds(self, seconds):
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)

    def until_shown(self, state):
        self.until(lambda: state in self.state)

    def until_said(self, message):
        self.until(lambda: message in self.text)

    def log_in(self):
        self.press("Login")
        self.until_shown("Online")
        self.stay = self.window.stay

    def stay_is_over(self):
        """Tell whether the network has finished with the latest login that succeeded."""
        return self.stay.running.done()

    def widgets(self, kind, parent=None):
        """Return the widgets of Tk's class `kind`, in the order they were made."""
        found = []
        for child in (parent or self.window).winfo_children():
            found += [child] if child.winfo_class() == kind else []
            found += self.widgets(kind, child)
        return found

    def buttons(self):
        return {str(button["text"]): button for button in self.widgets("TButton")}

    def press(self, button):
        self.window.tk.call(self.buttons()[button], "invoke")

    def enabled(self):
        """Return the texts of the buttons that can be pressed."""
        pairs = self.buttons().items()
        return {text for text, b in pairs if str(b["state"]) != "disabled"}

    def key(self, name, widget=None):
        """Press the key called `name`, in the draft or another `widget`."""
        widget = widget or self.window.draft
        widget.focus_force()
        self.window.update()
        widget.event_generate(f"<{name}>")
        self.window.update()

    def say(self, *texts):
        for text in texts:
            self.draft = text
            self.press("Send")

    @property
    def draft(self):
        return self.window.draft.get("1.0", "end-1c")

    @draft.setter
    def draft(self, text):
        self.window.draft.delete("1.0", "end")
        self.window.draft.insert("1.0", text)

    @property
    def state(self):
        return str(self.window.light["text"])

    @property
    def text(self):
        return self.window.messages.get("1.0", "end-1c")

    @property
    def said(self):
        """Return the lines of the messages, without the time where there is one."""
        return [line.partition("\t")[2] for line in self.text.split("\n")]

    @property
    def users(self):
        names = self.window.getvar(str(self.window.users))
        return list(self.window.tk.splitlist(names))

    @property
    def at_end(self):
        self.window.update_idletasks()
        return self.window.messages.yview()[1] == 1.0

    def longest_pause(self, until):
        """Return the most seconds for which the window was busy, `until` something."""
        beats = [time.monotonic()]

        def beat():
            beats.append(time.monotonic())
            self.window.after(10, beat)

        beat()
        self.until(until)
        return max(b - a for a, b in pairwise(beats))

    def end(self):
        self.window.log_off()
        for script in self.window.tk.splitlist(self.window.tk.call("after", "info")):
            self.window.after_cancel(script)
        self.window.destroy()
        end_loop(self.window.loop)


@pytest.fixture(scope="session")
def used():
    """Keep every window: were one collected in another thread, Tk would break there."""
    return []


@pytest.fixture
def desks(used):
    made = []

    def make(*args):
        made.append(Desk(*args))
        return made[-1]

    yield make
    used += made
    for desk in made:
        desk.end()


@pytest.fixture
def desk(room, desks):
    return desks(room.port)


@pytest.fixture
def jack(desk):
    """A desk at which Jack is logged in."""
    desk.log_in()
    return desk


@pytest.fixture
def impatient(monkeypatch):
    """Have a window ask and give up after half a second, and come back in no time."""
    assert (desktop.SILENCE, desktop.PATIENCE, desktop.FIRST_PAUSE) == (20, 8, 1)
    for name, seconds in ("SILENCE", 0.5), ("PATIENCE", 0.5), ("FIRST_PAUSE", 0.05):
        monkeypatch.setattr(desktop, name, seconds)


# Login and Log off


def test_offline_one_can_log_in_and_online_do_all_else_and_type_at_once(desk):
    assert desk.state == "● Offline  "
    assert desk.enabled() == {"Login"}
    desk.draft = "hello"
    desk.key("Return")
    assert desk.draft == "hello"
    red = str(desk.window.light["foreground"])
    desk.log_in()
    assert desk.enabled() == {"Log off", "Refresh", "Send"}
    assert str(desk.window.light["foreground"]) != red
    assert desk.window.focus_get() is desk.window.draft


@pytest.mark.parametrize("entry", [0, 1])
def test_enter_in_the_server_or_the_user_name_logs_in_once(desk, entry):
    desk.key("Return", desk.widgets("TEntry")[entry])
    desk.until_shown("Online")
    stay = desk.window.stay
    desk.key("Return", desk.widgets("TEntry")[entry])
    assert desk.window.stay is stay


@pytest.mark.parametrize(
    "server", ["http://{}", " {}/ ", "HTTP://{}/", "ws://{}", "{}"]
)
def test_a_server_may_be_written_as_its_address(desk, server):
    desk.window.tls.set(server != "{}" and server != " {}/ ")  # is overruled
    desk.window.server.set(server.format(desk.window.server.get()))
    desk.log_in()
    assert desk.window.tls.get() is False


def test_a_log_off_is_seen_at_once_and_a_whole_closing_handshake(jack, mary, room):
    jack.until(lambda: jack.users == ["Jack", "Mary"])
    jack.press("Log off")
    assert "Offline" in jack.state
    assert jack.enabled() == {"Login"}
    assert jack.users == []
    jack.until(jack.stay_is_over)
    assert jack.stay.socket.close_code == 1000
    assert room.users() == ["Mary"]
    jack.log_in()


def test_a_dead_line_holds_up_no_log_off_and_no_login_after_it(
    desks, elsewhere, room, line
):
    desk = desks(line.port)
    desk.log_in()
    line.darken()
    start = time.monotonic()
    desk.press("Log off")
    assert desk.enabled() == {"Login"}
    assert time.monotonic() - start < ALIVE
    first = desk.stay
    assert room.users() == ["Jack"]  # is in the way of nobody with the same key
    desk.log_in()
    desk.until(first.running.done)
    assert time.monotonic() - start < desktop.CLOSE + ALIVE
    desk.for_seconds(0.1)
    assert "Online" in desk.state


# A login that fails


def test_what_the_server_refuses_is_said_in_its_words(elsewhere, room, desk):
    jack = Visitor(elsewhere, room.port, "Jack")
    desk.press("Login")
    desk.until_shown("Offline  User Jack already logged in")
    assert desk.enabled() == {"Login"}
    desk.window.user.set("Jack: Mary")
    desk.press("Login")
    desk.until_shown("1 to 32 printable characters, no colon")
    desk.window.user.set("Jack")
    jack.leave()
    desk.until(lambda: room.users() == [])
    desk.log_in()


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ("nowhere.invalid", "There is no such server"),
        ("127.0.0.1:1", "No server answers there"),
        ("127.0.0.1:{silent}", "The server does not answer"),
        ("", "A server is written as host:port"),
        ("localhost:99999", "A server is written as host:port"),
        ("[::1", ""),
        ("a" * 70, ""),
    ],
)
def test_a_server_that_is_none_is_said(desk, monkeypatch, server, words):
    if "silent" in server:
        monkeypatch.setattr(desktop, "PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = server.format(silent=silent.getsockname()[1])
        desk.window.server.set(server)
        desk.press("Login")
        desk.until(lambda: "Login" in desk.enabled())
    assert desk.state.startswith(f"● Offline  {words}")
    assert desk.state != "● Offline  "


def test_a_server_that_is_no_chat_is_said(desk, room):
    room.refuse(404, "<p>?", "text/html")
    desk.press("Login")
    desk.until_shown("Offline  Not Found")


@pytest.fixture
def certificate(tmp_path):
    """The file of a certificate for 127.0.0.1, with its key, signed by nobody."""
    command = f"{program('openssl')} req -x509 -newkey rsa:2048 -nodes"
    command += " -addext subjectAltName=IP:127.0.0.1 -keyout pem -out certificate"
    command = [*command.split(), "-subj", "/CN=localhost"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with open(tmp_path / "pem", "a") as pem:
        pem.write((tmp_path / "certificate").read_text())
    return tmp_path / "pem"


@pytest.fixture
def secure(elsewhere, certificate):
    """A chat with that certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return Chat(elsewhere, ssl_context=context)


def test_a_certificate_that_is_not_trusted_is_said(desks, secure):
    desk = desks(secure.port)
    desk.window.server.set(f"https://127.0.0.1:{secure.port}")
    desk.press("Login")
    desk.until_shown("The server's certificate is not trusted")
    assert desk.window.tls.get() is True


# Messages


def test_what_is_said_is_heard_by_all_in_order(jack, mary):
    jack.say("hello")
    assert mary.hear() == ["Jack: hello"]
    jack.until_said("Jack: hello")
    assert jack.draft == ""
    mary.say(*map(str, range(300)))
    jack.until_said("Mary: 299")
    assert jack.said == ["Jack: hello", *(f"Mary: {i}" for i in range(300))]
    assert time.strptime(jack.text.partition("\t")[0], "%H:%M")


def test_enter_sends_and_shift_enter_breaks_the_line(jack, mary):
    jack.draft = "one"
    jack.key("Shift-Return")
    assert jack.draft == "one\n"
    jack.window.draft.insert("end", "two")
    jack.key("Return")
    assert mary.hear() == ["Jack: one\ntwo"]
    assert jack.draft == ""


def test_an_empty_message_is_not_sent(jack, mary):
    jack.say("", " \n ", "something")
    assert mary.hear() == ["Jack: something"]


def test_what_is_said_is_never_interpreted(jack, mary):
    odd = ["{{RefreshUsers}}", "{{Here 1}}", "[exit] $env(HOME) {", "\\n %s {0}", "🙂"]
    mary.say(*odd)
    jack.until_said(f"Mary: {odd[-1]}")
    assert jack.said == [f"Mary: {text}" for text in odd]
    jack.say(*odd)
    assert mary.hear(10) == [
        f"{name}: {text}" for name in ("Mary", "Jack") for text in odd
    ]


def test_a_character_that_ends_strings_in_c_ends_no_message(jack, mary):
    mary.say("one\0two")
    jack.until_said("Mary: one\ufffdtwo")


def test_a_second_line_does_not_look_like_a_message(jack, mary):
    mary.say("hello\n12:00\tJack: I owe Mary 100 euros")
    jack.until_said("euros")
    messages = jack.window.messages
    assert messages.tag_names("2.0") == messages.tag_names("2.7") == ("text",)
    assert messages.bbox("1.6")[0] < messages.bbox("2.0")[0]  # where authors are


def test_authors_look_different(jack, elsewhere, room):
    for name in "Mary", "Nora":
        Visitor(elsewhere, room.port, name).say("hello")
        jack.until_said(f"{name}: hello")
    messages = jack.window.messages
    colors = {
        messages.tag_cget(messages.tag_names(f"{n}.7")[0], "foreground") for n in (1, 2)
    }
    assert len(colors) == 2


def test_of_16_kib_a_message_is_sent_and_of_more_it_stays_in_the_draft(jack, mary):
    text = "é" * (LONGEST // 2)
    jack.say(text + "!")
    assert "16,385 bytes" in jack.state and "Online" in jack.state
    assert jack.draft == text + "!"
    jack.say(text)
    assert mary.hear() == [f"Jack: {text}"]


ENDLESS = "word " * 200_000


def test_an_endless_line_does_not_freeze_the_window(jack, mary):
    mary.say(ENDLESS[:LONGEST], "done")
    assert jack.longest_pause(lambda: "Mary: done" in jack.text) < ALIVE


def test_an_endless_line_that_is_pasted_does_not_freeze_the_window(desk):
    desk.window.clipboard_clear()
    desk.window.clipboard_append(ENDLESS)

    def paste():
        desk.window.draft.event_generate("<<Paste>>")
        desk.window.after_idle(desk.window.draft.see, "end")
        desk.window.after_idle(pasted.append, True)

    pasted = []
    desk.window.after(1, paste)
    assert desk.longest_pause(lambda: pasted) < ALIVE
    assert desk.draft == ENDLESS


# The room that messages take


@pytest.fixture
def hundred(jack, mary):
    """Jack's desk, with a hundred messages of Mary's."""
    mary.say(*map(str, range(100)))
    jack.until_said("Mary: 99")
    return jack


def test_the_messages_follow_the_end_unless_one_reads_back(hundred, mary):
    assert hundred.at_end
    messages = hundred.window.messages
    messages.yview_moveto(0.3)
    hundred.window.update()
    top = messages.index("@0,0")
    mary.say("later")
    hundred.until_said("Mary: later")
    hundred.window.update()
    assert messages.index("@0,0") == top
    messages.yview_moveto(1)
    hundred.window.update()
    mary.say("last")
    hundred.until_said("Mary: last")
    assert hundred.at_end


def test_the_room_goes_to_the_messages_and_the_end_stays(hundred):
    def has_size(*size):
        window.update()
        return size == (window.winfo_width(), window.winfo_height())

    window = hundred.window
    for size in (760, 400), (1200, 700), (740, 320):
        others = window.winfo_height() - window.messages.winfo_height()
        window.geometry("{}x{}".format(*size))
        hundred.until(lambda size=size: has_size(*size))
        assert window.winfo_height() - window.messages.winfo_height() == others
        assert hundred.at_end


def test_the_last_thousand_messages_are_kept_whole_while_one_reads_back(jack, mary):
    mary.say(*(f"{i}\nsecond line" for i in range(1000)))
    jack.until_said("Mary: 999")
    messages = jack.window.messages
    messages.yview("1001.0")
    jack.window.update()
    mary.say(*(f"{i}\nsecond line" for i in range(1000, 1100)))
    jack.until_said("Mary: 1099")
    jack.window.update()
    assert messages.get("@0,0 linestart", "@0,0 lineend").endswith("Mary: 500")
    lines = jack.text.split("\n")
    assert len(lines) == 2000
    assert lines[0].endswith("Mary: 100") and lines[1] == "second line"


def test_a_storm_leaves_the_window_alive(jack, mary, elsewhere, room):
    async def storm():
        for i in range(10):
            (await Peer.login(room.port, f"Storm {i}")).say(*map(str, range(1000)))
        await mary.peer.hear(10_000)
        mary.peer.say("the end")

    elsewhere.begin(storm())
    assert jack.longest_pause(lambda: "Mary: the end" in jack.text) < ALIVE
    assert len(jack.said) == 1000 and jack.at_end


def test_a_storm_is_drawn_in_portions(desk):
    desk.window.heard.extend([("12:00", "Mary: " + "word " * 200)] * 1000)
    desk.window.draw()
    assert desk.text and desk.window.heard


# The users


def test_the_users_are_listed_in_order_of_login(jack, elsewhere, room):
    jack.until(lambda: jack.users == ["Jack"])
    visitors = [Visitor(elsewhere, room.port, n) for n in ("{Zoë} $x", "Mary Ann")]
    jack.until(lambda: jack.users == ["Jack", "{Zoë} $x", "Mary Ann"])
    assert jack.window.side["text"] == "Users (3)"
    visitors[0].leave()
    jack.until(lambda: jack.users == ["Jack", "Mary Ann"])


def test_a_burst_of_notices_costs_two_requests_one_after_the_other(desk, room):
    asked = []  # each is set to let its answer go

    async def answer(request):
        if "getUsers2" in request.query:
            asked.append(asyncio.Event())
            number = len(asked)
            await asked[-1].wait()
            return web.Response(text=f"answer {number}")

    def go_on(number):
        desk.until(lambda: len(asked) == number)
        room.elsewhere.call(asked[-1].set)

    def notify():
        for user in room.room.users.values():
            user.transport.write(50 * b"\x81\x10{{RefreshUsers}}")

    room.instead = answer
    desk.log_in()
    desk.until(lambda: asked)
    room.elsewhere.call(notify)
    desk.for_seconds(0.5)
    go_on(1)
    go_on(2)
    desk.until(lambda: desk.users == ["answer 2"])
    desk.for_seconds(0.5)
    assert len(asked) == 2
    desk.press("Refresh")
    go_on(3)
    desk.until(lambda: desk.users == ["answer 3"])


@pytest.mark.parametrize("how", [{"status": 500}, {"body": b"J\xfcrgen"}])  # Latin-1
def test_a_list_that_could_not_be_got_is_asked_for_again(desk, room, impatient, how):
    async def fail_once(request):
        if "getUsers2" in request.query:
            room.instead = None
            return web.Response(**how)

    room.instead = fail_once
    desk.log_in()
    desk.until(lambda: desk.users == ["Jack"])


# A connection that is lost


def test_a_first_login_shows_the_last_50_messages_and_only_new_ones_have_a_time(
    desk, mary
):
    mary.say(*map(str, range(60)))
    mary.hear(60)
    desk.log_in()
    mary.say("new")
    desk.until_said("Mary: new")
    *old, new = desk.text.split("\n")
    assert old == [f"\tMary: {i}" for i in range(10, 60)]
    assert time.strptime(new, "%H:%M\tMary: new")


def test_who_logs_in_again_gets_what_was_missed_and_nothing_twice(
    jack, mary, room, elsewhere, desks
):
    mary.say("one")
    jack.until_said("one")
    jack.press("Log off")
    mary.say("two")
    jack.until(jack.stay_is_over)
    jack.log_in()
    jack.until_said("two")
    assert jack.said == ["Mary: one", "Mary: two"]
    jack.press("Log off")
    other = Chat(elsewhere)  # has other numbers
    jack.window.server.set(f"127.0.0.1:{other.port}")
    jack.log_in()
    jack.say("three")
    jack.until_said("three")
    assert jack.said == ["Mary: one", "Mary: two", "Jack: three"]


def test_a_line_that_goes_dark_is_noticed_without_a_word(
    desks, line, mary, impatient, monkeypatch
):
    monkeypatch.setattr(desktop, "FIRST_PAUSE", 2)  # long enough to be seen
    desk = desks(line.port)
    desk.log_in()
    line.darken()
    mary.say("missed")
    desk.until_shown("The server does not answer; trying again in")
    assert desk.enabled() == {"Log off"}
    desk.until_shown("Online")
    desk.until(lambda: desk.users == ["Mary", "Jack"])
    assert desk.text == "\tMary: missed"  # nobody knows when


def test_nothing_of_a_connection_runs_on_when_its_time_limits_pass_together(
    desks, line, impatient
):
    desk = desks(line.port)
    desk.log_in()
    desk.until(lambda: desk.users == ["Jack"])
    line.darken()
    desk.say("two")
    desk.press("Refresh")
    desk.for_seconds(0.1)
    desk.window.loop.call_soon_threadsafe(time.sleep, 1)  # as if the computer slept
    desk.until_shown("trying again in")
    desk.until_said("Jack: two")
    # And at its end, the desk looks whether anything still runs.


def test_who_only_listens_to_a_line_that_lives_is_left_in_peace(
    desks, line, room, mary, impatient
):
    desk = desks(line.port)
    desk.log_in()
    desk.for_seconds(2)
    mary.say("hello")
    desk.until_said("Mary: hello")
    assert len(room.logins) == 2  # the other is Mary's


@pytest.mark.parametrize("lights", [(0,), (1,), ()], ids=["up", "down", "both"])
def test_what_was_said_into_a_dark_line_is_heard_once_and_in_order(
    desks, line, room, mary, impatient, lights
):
    """Also among talkers, whose words come all the time, and if it is lit again later."""
    desk = desks(line.port, " Jack ")
    desk.log_in()
    desk.say("one")
    desk.until_said("Jack: one")
    line.darken(*lights)
    desk.say("two", "two", "three")
    logins = len(room.logins)

    def came_back():
        mary.say("two")  # is not Jack's
        return len(room.logins) > logins

    desk.until(came_back)
    desk.until_shown("Online")
    desk.say("four")
    desk.until_said("Jack: four")
    room.elsewhere.call(line.lighten)
    desk.for_seconds(0.3)
    mary.say("end")
    desk.until_said("Mary: end")
    heard = []
    while heard[-1:] != ["Mary: end"]:
        heard += mary.hear()
    said = [text for text in heard if text != "Mary: two"]
    jacks = ["one", "two", "two", "three", "four"]
    assert said == [*(f"Jack: {text}" for text in jacks), "Mary: end"]
    assert desk.said == heard[-1000:]
    assert desk.draft == ""


def test_who_says_more_than_is_read_at_once_is_patient(jack, room, monkeypatch):
    monkeypatch.setattr(desktop, "PATIENCE", 1.5)
    jack.say(*[str(i) * 2**14 for i in range(10)], *["x" * 2**14] * 2, "end")  # 2 s
    jack.until_said("Jack: end")
    assert len(room.logins) == 1


def test_what_is_missing_is_said_and_what_may_have_been_said_is_given_back(
    desks, line, room, mary, impatient, monkeypatch
):
    desk = desks(line.port)
    desk.log_in()
    desk.say("one")
    desk.until_said("Jack: one")
    line.there = 1  # where nobody answers
    line.darken()
    desk.say("two", "three")
    desk.draft = "half"
    monkeypatch.setattr(chat, "MAX_KEPT", 1000)
    mary.say(*map(str, range(100)))
    mary.hear(101)
    desk.until_shown("trying again in")
    line.there = room.port
    desk.until_shown("Online")
    mary.say("end")
    desk.until_said("Mary: end")
    one, missing, *rest = desk.text.split("\n")
    assert one.endswith("\tJack: one")
    assert missing == "\tSome messages are missing here"
    first = 101 - len(rest)
    said = [*(f"Mary: {i}" for i in range(first, 100)), "Mary: end"]
    assert first > 50 and [line.partition("\t")[2] for line in rest] == said
    assert desk.draft == "two\nthree\nhalf"
    desk.say("four")
    assert mary.hear(2) == ["Mary: end", "Jack: four"]


def test_what_was_not_heard_is_a_draft_after_a_log_off(desks, line):
    desk = desks(line.port)
    desk.log_in()
    line.darken()
    desk.say("one", "two")
    desk.press("Log off")
    assert desk.draft == "one\ntwo"
    assert desk.state == "● Offline  "


def test_each_login_has_the_key_of_the_window_and_a_turn_of_its_own(
    desks, elsewhere, room, impatient
):
    async def hold(request):
        if "Upgrade" in request.headers:
            room.instead = None
            await asyncio.sleep(1)  # so that it is given up, and arrives late

    desk = desks(room.port)
    desk.log_in()
    room.instead = hold
    room.close("Jack", 1012)
    desk.until_shown("The server does not answer; trying again")
    desk.until_shown("Online")
    desk.for_seconds(1.2)
    assert "Online" in desk.state
    keys = [login["key"].partition(".")[::2] for login in room.logins]
    assert [turn for _, turn in keys] == ["0", "1", "2"]
    assert {key for key, _ in keys} == {desk.window.key}
    assert desks(room.port).window.key != desk.window.key


@pytest.mark.parametrize(
    "words, status, kind",
    [
        ("User Jack already logged in", 409, "text/plain"),
        ("The pages of other sites may not log in", 403, "text/plain"),
        ("404: Not Found", 404, "text/plain"),
        ("<p>Forbidden", 403, "text/html"),
        ("Bad Gateway", 502, "text/plain"),
    ],
)
def test_only_the_chats_own_refusal_ends_the_coming_back(
    desks, elsewhere, room, line, impatient, words, status, kind
):
    desk = desks(line.port)
    desk.log_in()
    desk.say("heard")
    desk.until_said("heard")
    line.darken(0)
    desk.say("unheard")
    room.refuse(status, words, kind)
    desk.until_shown(words if kind == "text/plain" else "Forbidden")
    if kind == "text/plain" and status in (403, 409):
        assert desk.enabled() == {"Login"}
        assert desk.draft == "unheard"
    else:
        desk.until_shown("trying again in")
        room.instead = None
        desk.until_shown("Online")
        desk.until_said("Jack: unheard")
        assert desk.draft == ""


@pytest.mark.parametrize("code", [1000, 1002, 1007, 1009, 1001, 1011, 1012])
def test_after_a_close_it_comes_back_unless_that_was_for_good(jack, room, code):
    room.elsewhere.begin(room.room.users["Jack"].close(code=code, message=b"so be it"))
    jack.until_shown("Offline  Closed by the server: so be it")
    if code in (1000, 1002, 1007, 1009):
        assert jack.enabled() == {"Login"}
        jack.until(jack.stay_is_over)
    else:
        jack.until_shown("so be it; trying again")
        jack.until_shown("Online")


def test_a_log_off_ends_the_attempts(jack, room):
    room.refuse(502, "Bad Gateway")
    room.close("Jack", 1012)
    jack.until_shown("trying again in")
    jack.press("Log off")
    jack.until(jack.stay_is_over)
    assert jack.state == "● Offline  "
    assert jack.enabled() == {"Login"}


def test_a_log_off_ends_an_attempt_whose_time_limit_passes_with_it(
    desks, line, room, impatient
):
    desk = desks(line.port)
    desk.log_in()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LIMIT)
        line.cut(silent.getsockname()[1])
        with silent.accept()[0]:  # so the attempt waits for an answer
            stay = desk.stay
            stay.running.add_done_callback(lambda _: time.sleep(1))  # all are due then
            line.there = room.port
            desk.press("Log off")
            desk.until(stay.running.done)
    assert room.users() == []
    # And at its end, the desk looks whether anything still runs.


def test_the_pauses_grow_up_to_the_longest(jack, room, monkeypatch):
    ranges, pauses, sleep = [], [], asyncio.sleep

    def uniform(low, high):
        ranges.append((low, high))
        return 0.001 * high

    async def recorded(seconds):
        if asyncio.get_running_loop() is jack.window.loop:  # the room sleeps, too
            pauses.append(round(seconds, 6))
        await sleep(seconds)

    room.refuse(502, "Bad Gateway")
    monkeypatch.setattr(desktop.asyncio, "sleep", recorded)
    monkeypatch.setattr(random, "uniform", uniform)
    room.close("Jack", 1012)
    jack.until(lambda: len(ranges) >= 7)
    grown = [pause for pause in pauses if pause][:7]
    assert grown == [0.001, 0.002, 0.004, 0.008, 0.01, 0.01, 0.01]
    assert ranges[0] == (0.5, 1)


def test_a_server_that_fails_and_comes_back_is_joined_again(
    desks, elsewhere, line, impatient
):
    desk = desks(line.port)
    desk.log_in()
    desk.draft = "draft"
    desk.until(lambda: desk.users == ["Jack"])
    line.cut(1)  # where nobody answers
    desk.until_shown("trying again in")
    assert desk.state.startswith("● Offline")
    assert desk.enabled() == {"Log off"}
    assert desk.users == []
    line.cut(Chat(elsewhere).port)
    desk.until_shown("Online")
    desk.until(lambda: desk.users == ["Jack"])
    assert desk.draft == "draft"
    desk.until_said("Some messages are missing here")  # it has forgotten all
    line.cut(Chat(elsewhere).port)
    desk.until_shown("trying again in")
    desk.until_shown("Online")
    desk.say("end")
    desk.until_said("Jack: end")
    assert desk.text.count("missing") == 1  # since nothing came between


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

    def __init__(self, server, *options, before="pass"):
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{PROGRAM}\n{before}\ndesktop.main()"]
            + ["--user", "Jack", "--server", server, *options],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.limit = threading.Timer(LIMIT, self.process.kill)
        self.limit.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.limit.cancel()
        self.process.kill()
        self.process.communicate()

    def until_shown(self, state):
        lines = []
        while line := self.process.stdout.readline():
            lines.append(line)
            if state in line:
                return
        pytest.fail(f"{state!r} was not shown, but {lines}")

    def close_window(self):
        """Close the window, as Tk itself does when the window manager tells it to."""
        self.process.stdin.close()
        self.process.stdin = None

    def assert_ends_well(self):
        _, errors = self.process.communicate(timeout=desktop.CLOSE + ALIVE)
        assert errors == ""
        assert self.process.returncode == 0


def test_with_tls_it_logs_in_where_the_certificate_is_trusted(
    secure, certificate, monkeypatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Program(f"127.0.0.1:{secure.port}", "--tls") as process:
        process.until_shown("Online")


@pytest.mark.parametrize(
    "state", ["looking up a name", "connecting", "online", "retrying", "cut off"]
)
def test_closed_it_logs_off_and_ends_at_once_whatever_it_is_doing(room, line, state):
    server, before, shown = f"127.0.0.1:{line.port}", "pass", "Online"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if state == "looking up a name":
            server, shown = "slow.invalid", "Connecting"
            before = f"socket.getaddrinfo = lambda *a, **k: time.sleep({2 * LIMIT})"
        elif state == "connecting":
            server, shown = f"127.0.0.1:{silent.getsockname()[1]}", "Connecting"
        with Program(server, before=before) as process:
            process.until_shown(shown)
            if state == "retrying":
                room.refuse(502, "Bad Gateway")
                room.close("Jack", 1012)
                process.until_shown("trying again")
            elif state == "cut off":
                line.darken()
            process.close_window()
            process.assert_ends_well()
    assert room.users() == (["Jack"] if state == "cut off" else [])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_ctrl_c_ends_it_quietly(room):
    with Program(f"127.0.0.1:{room.port}") as process:
        process.until_shown("Online")
        process.process.send_signal(signal.SIGINT)
        process.assert_ends_well()
    assert room.users() == []


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        pytest.param(
            "os.environ.pop('DISPLAY')", ["install a desktop", "xvfb"], id="a display"
        ),
        pytest.param("sys.modules['tkinter'] = None", ["install python3-tk"], id="Tk"),
    ],
)
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="has both")
def test_where_something_is_missing_one_line_says_what_to_install(missing, words):
    program = f"import os, sys; {missing}; import desktop; desktop.main()"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert all(word in ended.stderr for word in words)
