# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "pytest", "pytest-aiohttp", "playwright", "axe-playwright-python",
# ]
# ///
"""What the chat promises: each test is one sentence of it, over real sockets.

The server runs in the test's own event loop, or as a process where signals and limits
matter; the page runs in a real Chromium.
"""

import asyncio
import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import weakref
from asyncio.subprocess import PIPE, STDOUT
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlencode

import playwright.async_api
import pytest
import pytest_asyncio
from aiohttp import ClientConnectionError, ClientSession, web
from aiohttp.test_utils import TestServer
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import async_playwright, expect

import chat

pytestmark = pytest.mark.asyncio
HERE = Path(__file__).parent
LIMIT = 30  # seconds after which whatever is awaited is not going to happen
LONGEST = "x" * 2**14  # a user may say eight of these at once
CONTINUED, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # RFC 6455, section 5.2
NOTICE = (TEXT, b"{{RefreshUsers}}")
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Extensions": "permessage-deflate",  # which no server has to use
}
number = itertools.count()  # for names that nobody had before
# Left there, it has pytest print all of a comparison, and compare for minutes.
CI = os.environ.pop("CI", "")


def unable(reason):
    """Skip this test, or fail it in CI, for want of something."""
    (pytest.fail if CI else pytest.skip)(reason)


def program(name, package=None):
    """Return the path of a program, which may be out of a user's PATH, or skip."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    return found or unable(f"there is no {name}: apt install {package or name}")


def frame(opcode: int, payload: bytes = b"", first: int = 0x80) -> bytes:
    """Return a frame, masked with zeros; `first` has FIN and the reserved bits."""
    size = len(payload)
    length = [0x80 | size] if size < 126 else [0x80 | 126, *size.to_bytes(2)]
    return bytes([first | opcode, *length, 0, 0, 0, 0]) + payload


class Peer:
    """A client that does only what it is told, so that it can misbehave."""

    everyone: ClassVar[list["Peer"]] = []

    @classmethod
    async def connect(cls, port):
        peer, peer.port, peer.socket = cls(), port, socket.socket()
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        peer.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(peer.socket, ("127.0.0.1", port))
        peer.reader, peer.writer = await asyncio.open_connection(sock=peer.socket)
        cls.everyone.append(peer)
        return peer

    @classmethod
    async def ask(cls, port, request, headers=(), body=""):
        """Send a request; the answer is in `status`, `head` and `body`."""
        peer = await cls.connect(port)
        peer.request(request, headers, body)
        async with asyncio.timeout(LIMIT):
            peer.head = (await peer.reader.readuntil(b"\r\n\r\n")).decode()
            peer.status = int(peer.head.split()[1])
            length = re.search(r"Content-Length: (\d+)", peer.head)
            size = int(length[1]) if length and not request.startswith("HEAD") else 0
            peer.body = (await peer.reader.readexactly(size)).decode()
        if peer.status != 101:
            peer.writer.close()
        return peer

    @classmethod
    def abort_all(cls):
        while cls.everyone:
            cls.everyone.pop().writer.transport.abort()

    @classmethod
    async def login(cls, port, name, headers=(), **query):
        target = "/ws?" + urlencode({"user": name, **query})
        peer = await cls.ask(port, f"GET {target}", UPGRADE | dict(headers))
        assert (peer.status, peer.body) == (101, "")
        assert (
            "Sec-WebSocket-Extensions" not in peer.head
        )  # so that nothing is compressed
        return peer

    def request(self, request, headers=(), body=""):
        fields = {"Host": "127.0.0.1"} | dict(headers)
        lines = [f"{request} HTTP/1.1", *map(": ".join, fields.items()), "", body]
        self.writer.write("\r\n".join(lines).encode("latin-1"))

    def send(self, opcode, payload=b"", count=1):
        self.writer.write(frame(opcode, payload) * count)

    def say(self, *texts):
        self.writer.write(b"".join(frame(TEXT, text.encode()) for text in texts))

    async def receive(self):
        """Return the opcode and the payload of the next frame."""
        async with asyncio.timeout(LIMIT):
            first, size = await self.reader.readexactly(2)
            assert first & 0xF0 == 0x80 and size <= 126  # in one, unmasked, < 64 KiB
            if size == 126:
                size = int.from_bytes(await self.reader.readexactly(2))
                assert size > 125  # the shortest way to say it
            return first & 0xF, await self.reader.readexactly(size)

    async def answer(self):
        """Return the next frame that is no notice; answer a ping before it."""
        async with asyncio.timeout(LIMIT):
            while (answer := await self.receive()) in (NOTICE, (PING, b"")):
                if answer != NOTICE:
                    self.send(PONG)
        return answer

    async def hear(self, count=1):
        """Return the next messages."""
        answers = [await self.answer() for _ in range(count)]
        assert all(opcode == TEXT for opcode, _ in answers)
        return [payload.decode() for _, payload in answers]

    async def here(self):
        """Return N of `{{Here N}}`, which is next."""
        (text,) = await self.hear()
        return int(re.fullmatch(r"\{\{Here (\d+)\}\}", text)[1])

    async def ping(self):
        """Wait until the server has read what was sent."""
        self.send(PING, b"?")
        assert await self.answer() == (PONG, b"?")

    async def told(self, *names):
        """Ask for the list at each notice, as a page does, until it is `names`.

        A change is told within a second: after 5 without one, the list stays wrong.
        """
        listed, loop = "never told", asyncio.get_running_loop()
        try:
            async with asyncio.timeout(5) as limit:
                while listed != [*names]:
                    if await self.receive() == NOTICE:
                        listed = await users(self.port)
                        limit.reschedule(loop.time() + 5)
        except TimeoutError:
            pytest.fail(f"the list should be {[*names]}, and is {listed}")

    async def closed(self):
        """Return the code and the reason that this is closed with; nothing follows."""
        while (answer := await self.receive())[0] == TEXT:
            pass
        assert answer[0] == CLOSE
        async with asyncio.timeout(LIMIT):
            assert await self.reader.read() == b""
        self.writer.close()  # or a test of thousands takes all descriptors
        return int.from_bytes(answer[1][:2]), answer[1][2:].decode()

    def stall(self):
        """Stop reading."""
        self.writer.transport.pause_reading()

    def resume(self):
        self.writer.transport.resume_reading()

    def vanish(self):
        """Reset the connection, without a close frame."""
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


async def users(port):
    return (await Peer.ask(port, "GET /?getUsers2=1")).body.split("\r\n")


async def login(port, *names, **query):
    """Log in all these; the first has been told of it."""
    peers = [await Peer.login(port, name, **query) for name in names]
    assert await users(port) == [*names]  # or each test would wait for it
    await peers[0].told(*names)
    return peers


async def flood(listener, bursts):
    """Have new users say 128 KiB each, which is their right; return what `listener` heard.

    28 of them are 3.5 MiB, of the 4 MiB that are kept.
    """
    heard = []
    for name in [f"talker{next(number)}" for _ in range(bursts)]:
        talker = await Peer.login(listener.port, name)
        texts = [str(next(number)).ljust(2**14, "x") for _ in range(8)]
        talker.say(*texts)
        heard += await listener.hear(8)
        assert heard[-8:] == [f"{name}: {text}" for text in texts]
        talker.vanish()
    return heard


class Talker:
    """A user whose connections die, and who does about it what a page does."""

    def __init__(self, port, name):
        self.port, self.name, self.turn, self.number = port, name, 0, -50
        self.heard, self.unheard, self.listening = [], [], None

    async def come_back(self):
        """Connect, without a word to the old connection; say again what was not heard."""
        await self.stop_listening()
        self.turn += 1
        key = f"the key of {self.name}.{self.turn}"
        self.peer = await Peer.login(self.port, self.name, after=self.number, key=key)
        place = await self.peer.here()
        assert place == self.number or self.turn == 1, "messages are missing"
        self.number, self.all_heard = place, asyncio.Event()
        self.peer.send(BINARY)
        self.listening = asyncio.create_task(self.listen(self.peer))
        async with asyncio.timeout(LIMIT):
            await self.all_heard.wait()
        self.peer.say(*self.unheard)

    async def stop_listening(self):
        if self.listening:
            self.listening.cancel()
            with suppress(asyncio.CancelledError, EOFError, ConnectionError):
                await self.listening

    async def listen(self, peer):
        while True:
            (message,) = await peer.hear()
            if message.startswith("{{Here"):
                assert message == f"{{{{Here {self.number}}}}}", "messages are missing"
                self.all_heard.set()
                continue
            self.number += 1
            self.heard.append(message)
            name, _, text = message.partition(": ")
            if name == self.name:
                assert self.unheard.pop(0) == text, "lost, doubled or out of order"

    async def talk(self, count, dice):
        """Say so many texts while connections die in every way; until all are heard."""
        await self.come_back()
        for i in range(count):
            self.unheard.append(text := f"{i} {'x' * dice.choice([0, 200, 5000])}")
            old, way = self.peer, dice.randrange(12)
            if way != 0:  # else it is lost on the way
                old.say(text)
            await asyncio.sleep(dice.choice([0, 0, 0.001, 0.02]))
            if way == 1:
                old.vanish()
            elif way == 2:
                old.writer.write(frame(TEXT, b"half a frame")[:9])
                old.vanish()
            elif way == 3:
                old.writer.write_eof()
            if way <= 5:
                if way >= 4:
                    old.stall()  # dark: nobody knows
                await self.come_back()
                if way == 5:  # what was held up in the network arrives after all
                    old.say("too late")
        async with asyncio.timeout(LIMIT):
            while self.unheard:
                await asyncio.sleep(0.01)
        await self.come_back()
        await self.stop_listening()


@asynccontextmanager
async def serving(app):
    """Serve `app` in this process; the kernel holds little for who does not read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, listener, backlog=1024).start()
        try:
            yield listener.getsockname()[1]
        finally:
            Peer.abort_all()
            await runner.cleanup()


@pytest_asyncio.fixture
async def port(caplog):
    """The port of a chat at 127.0.0.1, which logs no fault of its own."""
    async with serving(chat.make_app()) as port:
        yield port
    records = caplog.get_records("call") + caplog.records
    assert not [record for record in records if record.name != "chat"]


WAYS_TO_LEAVE = {
    "closing": lambda peer: peer.send(CLOSE, b"\x03\xe8"),  # 1000
    "vanishing": Peer.vanish,
    "hanging up": lambda peer: peer.writer.write_eof(),
    "broken frame": lambda peer: peer.send(TEXT, b"\xff"),
    "too long": lambda peer: peer.say(LONGEST + "x"),
}
LEAVINGS = [
    *itertools.product(["idle", "behind", "paying"], WAYS_TO_LEAVE),
    ("behind", "not"),
]
NAMES = ["Jill", "Jack", '<b a="1">&']  # of those who are there when asked for:
OPTIONS = ["Jill", "Jack", "&lt;b a=&quot;1&quot;&gt;&amp;"]
CONTENT = {
    "the page": (HERE / "chat.html").read_text("utf-8"),
    "the names": "\r\n".join(NAMES),
    "the options": "\r\n".join(f'<option value="{o}">{o}</option>' for o in OPTIONS),
}
ANSWERS = {
    (200, "the page"): "GET /; POST /; HEAD /; HEAD /?resetUsers=1",
    (200, "the options"): "GET /?getUsers=1; POST /?getUsers=1",
    (200, "the names"): "GET /?getUsers2=1; POST /?getUsers2=1",
    (403, "Only the operator may reset the users"): """
        GET /?resetUsers=1 X-Forwarded-For: ::1; GET /?resetUsers=1 Forwarded: for=127.0.0.1;
        GET /?resetUsers=1 x-forwarded-for: ::1; POST /?resetUsers=1 Via: 1.1 proxy;
        GET /?resetUsers=1 Sec-Fetch-Site: cross-site; POST /?resetUsers=1 Origin: null;
        GET /?resetUsers=1 Sec-Fetch-Site: same-site; GET /?resetUsers=1 Origin: http://a.org;
        GET /?resetUsers=1 Sec-Purpose: prefetch;
        GET /?resetUsers=1 Sec-Fetch-Site: same-origin; POST /?resetUsers=1 Origin: http://[;
        GET /?resetUsers=1 Host: example.com; GET /?resetUsers=1 Host: localhost.org""",
    (404, "404: Not Found"): "GET /chat",
    (405, "405: Method Not Allowed"): """
        PUT /; DELETE /?resetUsers=1; POST /ws?user=Joe; HEAD /ws?user=Joe""",
    (400, "A name: 1 to 32 printable characters, no colon"): """
        GET /ws; GET /ws?user=; GET /ws?user=%20; GET /ws?user=33-characters-are-one-too-many---;
        GET /ws?user=a:b; GET /ws?user=a%09b; GET /ws?user=a%0Ab; GET /ws?user=%E2%80%AEJoe;
        GET /ws?user=%E2%80%8DJoe; GET /ws?user=Joe%E2%80%8C; GET /ws?user=%E2%80%8D;
        GET /ws?user=a%E2%80%8D%E2%80%8Db; GET /ws?user=a%E2%80%8Bb""",
    (403, "The pages of other sites may not log in"): """
        GET /ws?user=Joe Origin: http://a.org; GET /ws?user=Joe Origin: http://127.0.0.1:1;
        GET /ws?user=Joe Origin: null""",
    (409, "User Jack already logged in"): """
        GET /ws?user=%20Jack%20; GET /ws?user=Jack Upgrade: h2c; GET /ws?user=Jack&key=k""",
    (426, "Connect with a WebSocket"): """
        GET /ws?user=Joe Upgrade: h2c; GET /ws?user=Joe Connection: close;
        GET /ws?user=Joe Sec-WebSocket-Version: 12; GET /ws?user=Joe Sec-WebSocket-Key: abc;
        GET /ws?user=Joe Sec-WebSocket-Version: \xff; GET /ws?user=Joe Sec-WebSocket-Key: \xff""",
}
REQUESTS = [
    (request, *answer)
    for answer, requests in ANSWERS.items()
    for request in re.split(r";\s+", requests.strip())
]
# A frame or some, and what is answered: texts, pongs, or the code that closes
FRAMES = {
    "a text": (frame(TEXT, b"hello: you\nthere"), "Jack: hello: you\nthere"),
    "no text": (frame(TEXT), "Jack: "),
    "the longest with a short header": (frame(TEXT, b"x" * 119), "Jack: " + "x" * 119),
    "the shortest with a long one": (frame(TEXT, b"x" * 120), "Jack: " + "x" * 120),
    "the longest": (frame(TEXT, b"x" * 2**14), "Jack: " + LONGEST),
    "fragments, with half an umlaut and a ping": (
        frame(TEXT, b"gr\xc3", 0)
        + frame(PING, b"?")
        + frame(CONTINUED, b"\xbc\xc3", 0)
        + frame(CONTINUED, b"\x9f dich"),
        (b"?", "Jack: grüß dich"),
    ),
    "the longest in fragments": (
        frame(TEXT, bytes(2**13), 0) + frame(CONTINUED, bytes(2**13)),
        "Jack: " + "\0" * 2**14,
    ),
    "a ping": (frame(PING, b"?" * 125), b"?" * 125),
    "an empty ping": (frame(PING), b""),
    "a pong": (frame(PONG, b"?") + frame(PING), b""),
    "close": (frame(CLOSE, b"\x03\xe8"), 1000),
    "close, with a reason": (frame(CLOSE, b"\x0f\xa0bye"), 1000),  # 4000
    "close, without a code": (frame(CLOSE), 1000),
    "no UTF-8": (frame(TEXT, b"\xff"), 1007),
    "a lone surrogate": (frame(TEXT, b"\xed\xa0\x80"), 1007),
    "a reserved bit": (frame(TEXT, b"x", 0xC0), 1002),
    "a reserved opcode": (frame(3, b"x"), 1002),
    "a fragment of nothing": (frame(CONTINUED, b"x"), 1002),
    "a ping in fragments": (frame(PING, b"x", 0), 1002),
    "too long a ping": (frame(PING, bytes(126))[:2], 1002),
    "a fragment that is not continued": (
        frame(TEXT, b"x", 0) + frame(TEXT, b"y"),
        1002,
    ),
    "half a code": (frame(CLOSE, b"x"), 1002),
    # What is too long is refused when its length is known: to stop there leaves nothing
    # unread, for which TCP would reset the connection, and might lose the close frame.
    "too long": (frame(TEXT, bytes(2**14 + 1))[:4], 1009),
    "too long in all": (
        frame(TEXT, bytes(2**14), 0) + frame(CONTINUED, b"x")[:2],
        1009,
    ),
}


class TestProtocol:
    """What anybody sees who speaks HTTP and WebSocket with the server at `port`.

    It is a class for another server with this protocol to be held to: whoever imports it
    next to a fixture `port` of its own runs all of it against that.
    """

    @pytest.mark.parametrize("request_, status, text", REQUESTS)
    async def test_each_request_is_answered_so(self, port, request_, status, text):
        await login(port, *NAMES)
        method, target, *header = request_.split(" ", 2)
        headers = dict(line.split(": ") for line in header)
        peer = await Peer.ask(port, f"{method} {target}", headers)
        assert peer.status == status
        assert peer.body == ("" if method == "HEAD" else CONTENT.get(text, text))
        if text in CONTENT:
            kind = "plain" if text == "the names" else "html"
            assert f"Content-Type: text/{kind}; charset=utf-8\r\n" in peer.head
            assert "Cache-Control: no-store\r\n" in peer.head
            assert "X-Content-Type-Options: nosniff\r\n" in peer.head
        elif target.startswith("/ws") and method == "GET":  # refused in the same words:
            socket = await Peer.ask(port, f"{method} {target}", UPGRADE | headers)
            assert (socket.status, socket.body) == (peer.status, peer.body)
        if status == 426:
            assert "Upgrade: websocket\r\n" in peer.head
            assert "Sec-WebSocket-Version: 13\r\n" in peer.head
        assert await users(port) == NAMES

    @pytest.mark.parametrize("sent, answers", FRAMES.values(), ids=FRAMES)
    async def test_each_frame_is_answered_so(self, port, sent, answers):
        jill, jack = await login(port, "Jill", "Jack")
        jack.writer.write(sent)
        answers = answers if isinstance(answers, tuple) else (answers,)
        for answer in answers:
            if isinstance(answer, str):
                assert await jack.answer() == (TEXT, answer.encode())
                assert await jill.hear() == [answer]
            elif isinstance(answer, bytes):
                assert await jack.answer() == (PONG, answer)
            else:
                assert await jack.closed() == (answer, "")
                await jill.told("Jill")
        jill.say("end")
        assert await jill.hear() == ["Jill: end"]

    @pytest.mark.parametrize("host", ["127.0.0.1", "chat.example:8080", "[::1]:9"])
    @pytest.mark.parametrize(
        "name",
        [
            "Żółw 李雷",
            "🦀" * 32,
            "{{RefreshUsers}}",
            "山田\u3000太郎",
            "می\u200cخواهم",
            "👩\u200d💻",
        ],
    )
    async def test_a_page_of_this_host_gets_in_with_any_name(self, port, name, host):
        headers = {"Host": host, "Origin": f"https://{host.upper()}"}
        peer = await Peer.login(port, f" {name}\u3000", headers)
        assert await users(port) == [name]  # without the white space
        peer.say(LONGEST)
        assert await peer.hear() == [f"{name}: {LONGEST}"]

    async def test_of_many_simultaneous_logins_for_one_name_one_gets_in(self, port):
        logins = (Peer.ask(port, "GET /ws?user=Jack", UPGRADE) for _ in range(50))
        statuses = [peer.status for peer in await asyncio.gather(*logins)]
        assert sorted(statuses) == [101] + 49 * [409]
        assert await users(port) == ["Jack"]

    @pytest.mark.parametrize("method", ["GET", "POST"])
    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:8080"])
    async def test_the_operators_reset_closes_all(self, port, host, method):
        for headers in {}, {"Origin": f"http://{host}", "Sec-Fetch-Site": "none"}:
            peers = await login(port, "Jack", "Jill")
            reset = f"{method} /?resetUsers=1"
            answer = await Peer.ask(port, reset, {"Host": host} | headers)
            assert (answer.status, answer.body) == (200, "Users reseted")
            for peer in peers:
                assert await peer.closed() == (1000, "the users were reset")
            assert await users(port) == [""]

    async def test_reset_waits_for_nobody_and_who_is_out_hears_no_more(self, port):
        silent, stalled = await login(port, "Silent", "Stalled")
        stalled.stall()
        await flood(silent, 28)
        silent.say(*[LONGEST] * 20)  # more than is read before the reset
        await silent.hear(8)
        reset = asyncio.create_task(Peer.ask(port, "GET /?resetUsers=1"))
        while (await silent.receive())[0] != CLOSE:
            pass
        again = await Peer.login(port, "Silent")
        again.say("anybody?")
        assert await again.hear() == ["Silent: anybody?"]
        async with asyncio.timeout(8):
            assert (await reset).body == "Users reseted"
            assert await silent.reader.read() == b""
        assert await users(port) == ["Silent"]

    @pytest.mark.parametrize("state, way", LEAVINGS)
    async def test_whoever_leaves_leaves_the_name_free(self, port, state, way):
        jill, jack = await login(port, "Jill", "Jack")
        if state == "behind":
            jack.stall()
            await flood(jill, 28)  # 3.5 MiB
        elif state == "paying":
            jack.say(*[LONGEST] * 10)
            await jill.hear(8)
        assert "Jack" in await users(port)
        WAYS_TO_LEAVE.get(way, Peer.stall)(jack)
        if state == "behind" and way in ("not", "hanging up"):  # is let go at 4 MiB,
            await flood(jill, 34)  # and what the kernel holds
        async with asyncio.timeout(20):  # before the heartbeat
            await jill.told("Jill")
            await Peer.login(port, "Jack")
            jack.resume()
            with suppress(ConnectionError):
                await jack.reader.read()  # The connection ends.

    async def test_what_a_user_said_last_is_heard_by_all(self, port):
        jill, jack = await login(port, "Jill", "Jack")
        jack.say(*map(str, range(1000)))
        jack.writer.close()
        assert await jill.hear(1000) == [f"Jack: {i}" for i in range(1000)]

    async def test_who_leaves_behind_has_2_seconds_for_what_is_under_way(self, port):
        jill, taker, refuser = await login(port, "Jill", "Taker", "Refuser")
        for peer in taker, refuser:
            peer.stall()
        await flood(jill, 28)
        for peer in taker, refuser:
            peer.send(CLOSE)
        await jill.told("Jill")
        taker.resume()
        assert await taker.closed() == (1000, "")
        await asyncio.sleep(3.5)
        refuser.resume()
        async with asyncio.timeout(LIMIT):
            taken = await refuser.reader.read()
        assert not taken.endswith(b"\x88\x02\x03\xe8")

    @pytest.mark.parametrize("crowd, pause", [(0, 0.1), (300, 0.3)])
    async def test_the_larger_the_room_the_rarer_are_notices(self, port, crowd, pause):
        jill = await Peer.login(port, "Jill")
        await asyncio.gather(*(Peer.login(port, f"user{i}") for i in range(crowd)))
        started, notices = time.monotonic(), 0
        await jill.ping()
        while time.monotonic() < started + 2.5:
            jack = await Peer.login(port, "Jack")
            jack.send(CLOSE)
            await jack.closed()
        jill.say("end")
        while await jill.receive() == NOTICE:
            notices += 1
        seconds = time.monotonic() - started
        assert seconds / pause / 4 < notices <= seconds / pause + 1
        await Peer.login(port, "Joe")
        await jill.told(*await users(port))  # the last is not left out

    # Who comes back

    async def test_who_goes_on_after_a_message_hears_all_that_came_since(self, port):
        jill = await Peer.login(port, "Jill", after=-50)
        first = await jill.here()
        jill.say(*map(str, range(10)))
        said, last = await jill.hear(10), first + 10
        for after, place in (
            (first, first), (last - 3, last - 3), (last, last), (last + 1, last),
            (10**15 + last, last), (-3, last - 3), (-100, first), (0, first),
        ):  # fmt: skip
            jack = await Peer.login(port, f"user{next(number)}", after=after)
            assert await jack.receive() == (TEXT, b"{{Here %d}}" % place), after
            assert await jack.hear(last - place) == said[place - first :], after
            await jack.ping()  # and no more

    @pytest.mark.parametrize("after", ["", "x", "1.5", "0x1", "9" * 5000])
    async def test_an_after_that_is_no_integer_is_as_if_it_were_not_there(
        self, port, after
    ):
        (jill,) = await login(port, "Jill")
        jill.say("before")
        await jill.hear()
        jack = await Peer.login(port, "Jack", after=after)
        jill.say("after")
        assert await jack.hear() == ["Jill: after"]

    async def test_a_question_is_answered_in_order_with_the_messages(self, port):
        jill, jack = await login(port, "Jill", "Jack")
        jack.send(BINARY)
        place = await jack.here()
        jack.say("one", "two")
        jack.send(BINARY, b"what it says does not matter")
        assert await jack.hear(2) == ["Jack: one", "Jack: two"]
        assert await jack.here() == place + 2
        jack.send(BINARY, count=30)  # may have one answer
        jack.say("end")
        answers = [await jack.answer()]
        while answers[-1] != (TEXT, b"Jack: end"):
            answers.append(await jack.answer())
        assert set(answers[:-1]) <= {(TEXT, b"{{Here %d}}" % (place + 2))}
        assert await jill.hear(3) == ["Jack: one", "Jack: two", "Jack: end"]

    async def test_who_is_behind_gets_each_answer_after_what_was_said_before(
        self, port
    ):
        jill, jack = await login(port, "Jill", "Jack")
        jack.send(BINARY)
        place = await jack.here()
        jack.stall()
        said = []
        for _ in range(2):
            said += await flood(jill, 14)
            jack.send(BINARY)
            await jill.ping()
        jack.resume()
        heard, answers = [], []
        while not answers or answers[-1] < len(said):
            (message,) = await jack.hear()
            if message.startswith("{{Here"):
                answers.append(int(message[7:-2]) - place)
                assert answers[-1] == len(heard), "not where it is"
            else:
                heard.append(message)
        assert heard == said and answers[0] >= len(said) / 2

    async def test_who_asked_with_after_is_told_of_a_hole_and_never_let_go(self, port):
        jill = await Peer.login(port, "Jill")
        jack = await Peer.login(port, "Jack", after=-1)
        place = await jack.here()
        jack.stall()
        said = await flood(jill, 80)  # 10 MiB
        numbers = {message: place + 1 + i for i, message in enumerate(said)}
        jack.resume()
        holes, after = 0, 0
        while place < numbers[said[-1]]:
            (message,) = await jack.hear()
            if message in numbers:
                place, after = place + 1, after + 1
                assert numbers[message] == place
            else:
                there = int(message.removeprefix("{{Here ").removesuffix("}}"))
                assert there > place, "nothing was missing"
                assert after < 32, "the kernel held more than 512 KiB: pings come late"
                place, holes, after = there, holes + 1, 0
        assert holes == 1 and 100 < after < 150  # it went on with the newer half
        late = await Peer.login(port, "Joe", after=numbers[said[0]])
        oldest = await late.here()  # all that is kept, and no more
        kept = len(said) - (oldest - numbers[said[0]]) - 1
        assert (
            4 * 2**20 - 2**15 < sum(64 + 4 + len(m) for m in said[-kept:]) <= 4 * 2**20
        )
        assert await late.hear(kept) == said[-kept:]

    @pytest.mark.parametrize(
        "before, key, status",
        [
            ("k", "k", 101),
            ("k.1", "k.1", 101),
            ("k.1", "k.2", 101),
            ("k.9", "k.10", 101),
            ("k", "k.1", 101),
            ("k.-1", "k", 101),
            ("a.b.1", "a.b.2", 101),
            ("k.x", "k.x.1", 101),
            ("\n ü", "\n ü.1", 101),
            ("k.2", "k.1", 409),
            ("k.1", "k", 409),
            ("k.1", "k.-1", 409),
            ("k", "K", 409),
            ("k", "", 409),
            ("", "", 409),
            ("", "k", 409),
            ("k.1", "k.x", 409),
        ],
    )
    async def test_who_has_the_key_and_no_earlier_turn_takes_the_name_over(
        self, port, before, key, status
    ):
        jill, old = await login(port, "Jill", "Jack", key=before)
        target = "GET /ws?" + urlencode({"user": "Jack", "key": key})
        assert (await Peer.ask(port, target)).status == (426 if status == 101 else 409)
        new = await Peer.ask(port, target, UPGRADE)
        assert new.status == status
        if status == 101:
            assert await old.closed() == (1000, "logged in again elsewhere")
            old = new
        old.say("here")
        assert await jill.hear() == ["Jack: here"]
        assert await users(port) == ["Jill", "Jack"]

    async def test_who_was_replaced_says_nothing_more_and_has_no_second_burst(
        self, port
    ):
        (jill,) = await login(port, "Jill")
        old = await Peer.login(port, "Jack", key="k.1")
        old.say(*[LONGEST] * 12)  # of which 8 are heard at once, and one in each 0.5 s
        await jill.hear(8)
        new = await Peer.login(port, "Jack", key="k.2", after=-100)
        old.say("too late")
        await new.here()
        new.send(BINARY)
        own = 0
        while (await new.hear()) == [f"Jack: {LONGEST}"]:
            own += 1
        started = time.monotonic()
        new.say(LONGEST, LONGEST, LONGEST, "end")
        assert await jill.hear(own - 8 + 3) == [f"Jack: {LONGEST}"] * (own - 8 + 3)
        assert await jill.hear() == ["Jack: end"]
        assert time.monotonic() - started > 1

    async def test_to_take_ones_own_name_over_is_no_way_to_say_more(self, port):
        jill, jack = await login(port, "Jill", "Jack", key="k.0")
        started = time.monotonic()
        for turn in range(1, 20):
            jack.say(*[LONGEST] * 2)
            jack = await Peer.login(port, "Jack", key=f"k.{turn}")
        jack.say("end")
        heard = 0
        while (await jill.hear()) != ["Jack: end"]:
            heard += 1
        assert heard <= 8 + 2 * (time.monotonic() - started) + 1
        jack.send(CLOSE)
        await jill.told("Jill")  # and soon

    async def test_what_users_say_is_heard_once_by_all_however_connections_die(
        self, port
    ):
        count, seed = int(os.environ.get("TEXTS", "60")), random.randrange(10**6)
        witness = Talker(port, "Witness")
        await witness.come_back()
        talkers = [Talker(port, f"Talker {i}") for i in range(6)]
        dice = [random.Random(seed + i) for i in range(6)]
        print(f"seed {seed}")
        await asyncio.gather(
            *(t.talk(count, d) for t, d in zip(talkers, dice, strict=True))
        )
        await witness.come_back()
        await witness.stop_listening()
        assert len(witness.heard) == 6 * count
        for talker in talkers:
            begin = witness.heard.index(talker.heard[0])
            assert talker.heard == witness.heard[begin:][: len(talker.heard)]
            mine = [m for m in witness.heard if m.startswith(f"{talker.name}: ")]
            assert [int(m.split()[2]) for m in mine] == [*range(count)]
        print(f"{sum(talker.turn - 1 for talker in talkers)} connections died")

    # Who talks too much

    async def test_16_users_say_all_they_may_and_slow_readers_hear_it(self, port):
        slow = [await Peer.login(port, f"slow{i}") for i in range(20)]
        talkers = {name: await Peer.login(port, name) for name in map(str, range(16))}
        texts = [str(i) + LONGEST[1:] for i in range(8)]

        async def hear(peer):
            heard = []
            for _ in range(16 * 8):
                heard += await peer.hear()
                await asyncio.sleep(2**14 / 2e6)  # 16 Mbit/s
            return heard

        for talker in talkers.values():
            talker.say(*texts)
        heard = await asyncio.gather(*map(hear, slow))
        assert all(messages == heard[0] for messages in heard)
        for name in talkers:
            mine = [message for message in heard[0] if message.startswith(f"{name}: ")]
            assert mine == [f"{name}: {text}" for text in texts]

    async def test_all_costs_the_same_128_kib_at_once_then_32_kib_a_second(self, port):
        async def seconds(opcode, payload, count):
            """Return how long it takes to say these, which cost 192 KiB."""
            peer = await Peer.login(port, name := f"user{next(number)}")
            started = time.monotonic()
            peer.send(opcode, payload, count)
            peer.say("end")
            while await peer.receive() != (TEXT, f"{name}: end".encode()):
                pass
            return time.monotonic() - started

        kinds = [
            (TEXT, b"", 3072),
            (TEXT, bytes(2**14 - 64), 12),
            (BINARY, bytes(2**14 - 2**12), 12),
            (PING, b"", 48),
            (PONG, b"", 48),
        ]
        for took in await asyncio.gather(*(seconds(*kind) for kind in kinds)):
            assert 1.9 < took < 10  # 2, if only the price took time

    async def test_who_is_dead_is_gone_within_45_seconds_but_not_who_says_much(
        self, port
    ):
        started = time.monotonic()
        jill, dead, gone = await login(port, "Jill", "Dead", "Gone")
        gone.stall()
        await flood(jill, 28)
        gone.writer.write_eof()  # which nobody sees before that is taken
        (await Peer.login(port, "Jack")).say(*map(str, range(10_000)))  # takes 17 s
        hearing = asyncio.create_task(jill.hear(10_001))
        while (await dead.receive())[0] != PING:
            pass
        assert time.monotonic() > started + 24.9
        while await users(port) != ["Jill", "Jack"]:
            assert time.monotonic() < started + 45
            await asyncio.sleep(0.5)
        jill.say("end")
        assert await hearing == [*(f"Jack: {i}" for i in range(10_000)), "Jill: end"]


# What is seen from inside the process


@pytest_asyncio.fixture
async def watched():
    """A chat's port and room, and for each user how much was written when how much was held."""
    writes = defaultdict(list)

    @web.middleware
    async def watch(request, handler):
        transport, name = request.transport, request.query.get("user")

        def write(data, really=transport.write):
            writes[name].append((len(data), transport.get_write_buffer_size()))
            really(data)

        transport.write = write
        return await handler(request)

    app = chat.make_app()
    app.middlewares.append(watch)
    async with serving(app) as port:
        yield port, app[chat.ROOM], writes


async def test_what_is_said_in_one_pass_leaves_in_one_write_a_user(watched):
    port, room, writes = watched
    jill, jack = await login(port, "Jill", "Jack")
    writes.clear()
    jack.say(*["hello"] * 500)
    assert await jill.hear(500) == ["Jack: hello"] * 500
    assert len(writes["Jill"]) < 5
    writes.clear()
    for i in range(
        50
    ):  # one in each pass: they do not leave before a pass brings nothing
        await room.say(room.users["Jack"], str(i).encode())
        await asyncio.sleep(0)
    assert await jill.hear(50) == [f"Jack: {i}" for i in range(50)]
    assert len(writes["Jill"]) < 25
    writes.clear()
    for i in range(50):  # in slow passes: they do not wait for the last of them
        await room.say(room.users["Jack"], str(i).encode())
        until = time.monotonic() + 0.002
        while time.monotonic() < until:
            pass
        await asyncio.sleep(0)
    assert await jill.hear(50) == [f"Jack: {i}" for i in range(50)]
    assert len(writes["Jill"]) > 10
    writes.clear()
    others = [await Peer.login(port, str(i)) for i in range(20)]
    for peer in others:
        peer.say(*[LONGEST] * 8)
    await jill.hear(160)
    assert max(writes["Jill"]) < (2**17,)  # or it would be held for long


async def test_to_who_reads_nothing_nothing_more_is_written_and_no_pong(watched):
    port, _, writes = watched
    jill, jack = await login(port, "Jill", "Jack")
    jack.stall()
    await flood(jill, 8)
    jack.send(PING, b"?" * 125, 20)
    for i in range(1500):
        jill.say(str(i))
        await jill.hear()
    assert sum(held > 0 for _, held in writes["Jack"]) < 5
    writes.clear()
    jack.resume()  # and what is written then, is neither in tiny pieces nor in huge ones
    assert (await jack.hear(64 + 1500))[64:] == [f"Jill: {i}" for i in range(1500)]
    assert len(writes["Jack"]) < 100 and max(writes["Jack"]) < (2**16,)
    await jack.ping()


async def test_what_many_did_not_take_is_kept_once_and_not_for_ever():
    room = chat.Room()
    async with serving(chat.make_app(room)) as port:
        jill, *others = await login(port, "Jill", *map(str, range(20)))
        for peer in others:
            peer.stall()
        tracemalloc.start()
        await flood(jill, 28)
        assert tracemalloc.get_traced_memory()[0] < 20 * 2**20  # copies would be 70 MiB
        tracemalloc.stop()
        user = weakref.ref(room.users["19"])
        for _ in range(70_000):  # empty ones, which need memory, too
            room.add(b"")
        await jill.told("Jill")
        async with asyncio.timeout(LIMIT):
            while user():  # is needed by something
                gc.collect()
                await asyncio.sleep(0.1)


async def test_who_asks_thousands_of_times_in_one_go_lets_others_in_between():
    class Counting(chat.Room):
        asked = 0

        def names(self):
            self.asked += 1
            return super().names()

    room = Counting()
    async with serving(chat.make_app(room)) as port:
        (jill,) = await login(port, "Jill")
        flooder = await Peer.connect(port)
        for _ in range(3000):
            flooder.request("GET /?getUsers2=1")
        await jill.ping()
        assert room.asked < 300


async def test_the_last_word_is_heard_and_none_after_it():
    room = chat.Room()
    async with serving(chat.make_app(room)) as port:
        jill, _ = await login(port, "Jill", "Jack")
        jack = room.users["Jack"]
        await room.say(jack, b"the last word")
        await room.close(1001, "the end")
        assert await jill.hear() == ["Jack: the last word"]
        assert await jill.closed() == (1001, "the end")
        await room.say(jack, b"too late")
        assert b"too late" not in b"".join(room.messages.values())


async def test_reset_is_refused_to_another_machine():
    remotes = iter(["192.0.2.7", "2001:db8::7", "::1"])

    @web.middleware
    async def from_elsewhere(request, handler):
        return await handler(request.clone(remote=next(remotes)))

    app = chat.make_app()
    app.middlewares.append(from_elsewhere)
    async with serving(app) as port:
        answers = [await Peer.ask(port, "GET /?resetUsers=1") for _ in range(3)]
    assert [peer.status for peer in answers] == [403, 403, 200]


# The process


@asynccontextmanager
async def running(
    folder,
    *options,
    program=HERE / "chat.py",
    limits=None,
    hangup=signal.SIG_DFL,
    flags=(),
):
    """Run the program, which says its `port`, with its `log` in the folder."""

    def prepare():
        if limits:  # soft and hard, of descriptors
            from resource import RLIMIT_NOFILE, setrlimit

            setrlimit(RLIMIT_NOFILE, limits)
        signal.signal(signal.SIGHUP, hangup)  # whatever started these tests

    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *flags, program, "--host", "127.0.0.1", "--port", "0", *options,
            preexec_fn=prepare if hasattr(signal, "SIGHUP") else None,  # not on Windows
            stdout=asyncio.subprocess.PIPE, stderr=log,
        )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT):
            greeting = (await process.stdout.readline()).decode()
        address = re.search(r"http://127\.0\.0\.1:(\d+)", greeting)
        process.port = int(address[1]) if address else None
        process.log = (folder / "log").read_text
        yield process
    finally:
        Peer.abort_all()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def status(process):
    """Return the exit status of a process that has to end soon."""
    async with asyncio.timeout(LIMIT):
        return await process.wait()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)]
)
async def test_a_signal_closes_all_with_1001_and_ends_with_status_0(number, tmp_path):
    async with running(tmp_path) as process:
        jill, half, stalled = await login(process.port, "Jill", "Half", "Stalled")
        half.writer.write(frame(TEXT, b"hello")[:3])
        (await Peer.connect(process.port)).request("POST /", {"Content-Length": "9"})
        stalled.stall()
        await flood(jill, 28)
        stalled.send(PING, b"?", 100_000)
        await Peer.login(process.port, "Late")
        process.send_signal(number)
        for peer in jill, half:
            assert await peer.closed() == (1001, "the server stops")
        assert await status(process) == 0
    assert "Traceback" not in process.log()


@pytest.mark.parametrize(
    "option",
    [
        "--port=65536",
        "--port=70000",
        "--port=-1",
        "--host=",
        "--port=taken",
        "--host=192.0.2.1",
        "--host=a.invalid",
    ],
)
async def test_what_cannot_be_served_gives_one_line_and_status_1(option, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        option = option.replace("taken", str(listener.getsockname()[1]))
        async with running(tmp_path, option) as process:
            assert await status(process) == 1
    assert re.fullmatch(r"Cannot serve .+\n", process.log())


async def test_the_log_has_a_line_for_each_coming_and_going_and_no_other(tmp_path):
    async with running(tmp_path) as process:
        port = process.port
        jill, jack = await login(port, "Jill", "Jack", key="secret.1")
        await Peer.login(port, "Jack", key="secret.2", after=-50)
        assert await jack.closed() == (1000, "logged in again elsewhere")
        (await Peer.login(port, "Jack", key="secret.2")).send(CLOSE)
        await jill.told("Jill")
        await Peer.login(port, "Jack", {"Sec-WebSocket-Protocol": "\xff"})
        await jill.told("Jill", "Jack")
        # Whoever is gone when it is their turn was never here.
        process.send_signal(signal.SIGSTOP)
        for _ in range(20):
            gone = await Peer.connect(port)
            gone.request("GET /ws?user=Gone", UPGRADE)
            gone.vanish()
        await Peer.connect(port)  # by when the last of them is gone, too
        process.send_signal(signal.SIGCONT)
        assert (await Peer.ask(port, "\x16\x03\x01")).status == 400
        key = {"Sec-WebSocket-Key": "\xff"}
        assert (await Peer.ask(port, "GET /ws?user=Joe", UPGRADE | key)).status == 426
        folded = {"Content-Encoding": "gzip", "Content-Length": "8"}
        assert (await Peer.ask(port, "POST /", folded, "not gzip")).status == 200
        assert (await Peer.ask(port, "GET /", {"no header": ""})).status == 400
        for _ in range(20):
            gone = await Peer.connect(port)
            gone.request("GET /", {"Expect": "100-continue"})
            gone.vanish()
        await Peer.ask(port, "GET /?resetUsers=1")
        process.terminate()
        assert await status(process) == 0
    # Each line begins with the date and the time.
    assert [line.split(" ", 2)[2] for line in process.log().splitlines()] == [
        "Jill logged in, 1 here",
        "Jack logged in, 2 here",
        "Jack came back, 2 here",
        "Jack came back, 2 here",
        "Jack left, 1 here",
        "Jack logged in, 2 here",
        "Jill was let go: the users were reset, 1 here",
        "Jack was let go: the users were reset, 0 here",
    ]


async def test_a_link_to_the_program_runs_it(tmp_path):
    (link := tmp_path / "link.py").symlink_to(HERE / "chat.py")
    async with running(tmp_path, program=link) as process:
        assert (await Peer.ask(process.port, "GET /")).body == CONTENT["the page"]


async def test_under_nohup_the_end_of_the_terminal_is_not_its_end(tmp_path):
    async with running(tmp_path, hangup=signal.SIG_IGN) as process:
        process.send_signal(signal.SIGHUP)
        await Peer.login(process.port, "Jack")
        process.terminate()
        assert await status(process) == 0


async def test_a_page_that_is_missing_is_500_and_in_the_log(tmp_path):
    program = shutil.copy(HERE / "chat.py", tmp_path)
    async with running(tmp_path, program=program) as process:
        assert (await Peer.ask(process.port, "GET /")).status == 500
        assert (await Peer.ask(process.port, "GET /?getUsers2=1")).status == 200
    assert re.search(r"Traceback[^\0]*FileNotFoundError.*chat\.html", process.log())


async def test_hundreds_can_connect_while_the_server_is_busy(tmp_path):
    async with running(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*(Peer.connect(process.port) for _ in range(300)))


async def test_descriptors_are_used_up_before_newcomers_have_to_wait(tmp_path):
    async with running(tmp_path, limits=(64, 128)) as process:
        jack, *_ = await login(process.port, *map(str, range(100)))
        crowd = [await Peer.connect(process.port) for _ in range(100)]
        jack.say("still here")
        assert await jack.hear() == ["0: still here"]
        while "out of system resource" not in process.log():
            await asyncio.sleep(0.1)
        for peer in crowd:
            peer.vanish()
        await Peer.login(process.port, "Jill")  # now that there is room again
        process.terminate()
        assert await status(process) == 0


async def test_the_readmes_smallest_chat_works(tmp_path):
    readme = (HERE / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.+?)```", readme, re.DOTALL)[1]
    assert code.count("port=8080)") == 1
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    code = code.replace('"localhost", port=8080', f'"127.0.0.1", port={port}')
    (program := tmp_path / "smallest.py").write_text(code)
    async with running(tmp_path, program=program, flags=["-u"]):
        assert "new WebSocket(" in (await Peer.ask(port, "GET /")).body
        plain = {"Sec-WebSocket-Extensions": ""}
        jill, jack = [await Peer.login(port, name, plain) for name in ("Jill", "Jack")]
        jack.say("hello")
        assert await jill.hear() == await jack.hear() == ["Jack: hello"]


async def test_every_place_that_names_the_dependencies_says_the_same():
    requirement = (HERE / "requirements.txt").read_text().strip()
    for script in [Path(__file__), *HERE.glob("bonus/*.py")]:
        dependencies = re.findall('"(aiohttp[^"]*)"', script.read_text("utf-8"))
        assert dependencies[:1] in ([], [requirement]), script


# The page

AT_END = "e => e.scrollHeight - e.scrollTop - e.clientHeight < 5"
DRAWN = "new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))"
ENTER, SHIFT = "\ue007", "\ue008"  # as WebDriver has them
LINKS = """
https://a.org/b?c=d&e=f#g or HTTP://B.ORG | https://a.org/b?c=d&e=f#g HTTP://B.ORG
https://a.org, http://b.org; http://c.org!? | https://a.org http://b.org http://c.org
"https://a.org" 'https://b.org' <http://c>… | https://a.org https://b.org http://c
»https://a.org« “https://b.org” | https://a.org https://b.org
(http://a.org/b_(c)). [http://[::1]]: | http://a.org/b_(c) http://[::1]
javascript:alert(1) data:,x xhttp://a https://. |
https://a.org/"><script>alert(1)</script> | https://a.org/
请看 https://a.org/b，谢谢 https://b.org。「http://c」 | https://a.org/b https://b.org http://c
https://a.org/photo\u202egpj.exe http://b/\u2066c | https://a.org/photo http://b/
https://a.org/żółw/李雷?ü=ß | https://a.org/żółw/李雷?ü=ß
"""
UNUSUAL = {  # browsers
    "takes no relative address for a WebSocket": """
        const Real = WebSocket;
        WebSocket = class extends Real { constructor(url) { super(new URL(url)); } };
        delete String.prototype.toWellFormed;
    """,
    "forbids storage": """
        for (const kind of ["localStorage", "sessionStorage"])
            Object.defineProperty(window, kind, {get() { throw new DOMException(); }});
    """,
}
expect.set_options(timeout=20_000)  # milliseconds
fixture = pytest_asyncio.fixture(loop_scope="class")


async def until(condition):
    """Wait until something is there, and return it."""
    async with asyncio.timeout(10):  # a page asks by itself after 20
        while not (found := condition()):
            await asyncio.sleep(0.01)
    return found


class Line:
    """A TCP proxy before a server, over which connections fail as on a real line.

    Each has a state for the way up, to the server, and one for the way down: "whole",
    "dark" (nothing arrives, ever), "frozen" (it arrives when thawed), or "torn" (half of
    the next bytes arrive, and the connection breaks). `new` is that of later ones.
    """

    def __init__(self, target):
        self.target, self.new, self.links = target, "whole", []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        self.cut()

    async def connect(self, *near):
        try:
            far = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return near[1].transport.abort()
        link = {
            "up": self.new,
            "down": self.new,
            "first": b"",
            "ends": (near[1], far[1]),
        }
        link["thawed"] = asyncio.Event()
        self.links.append(link)
        up = self.pass_on(link, "up", near[0], far[1])
        await asyncio.gather(up, self.pass_on(link, "down", far[0], near[1]))
        self.links.remove(link)

    async def pass_on(self, link, way, reader, writer):
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                link["first"] = link["first"] or data
                if link[way] == "frozen":
                    await link["thawed"].wait()
                if link[way] == "torn":
                    writer.write(data[: len(data) // 2])
                elif link[way] != "dark":
                    writer.write(data)
                if link[way] != "whole" or link["thawed"].is_set():
                    await asyncio.sleep(0.1)  # before what follows, if only the end
                if link[way] == "torn":
                    self.cut(link)
            if link[way] == "frozen":
                await link["thawed"].wait()
            if link[way] != "dark":
                writer.close()

    def sockets(self):
        return [link for link in self.links if link["first"].startswith(b"GET /ws")]

    def fail(self, how, *ways, links=None):
        for link in links or self.links:
            link |= dict.fromkeys(ways or ("up", "down"), how)

    def thaw(self, *links):
        for link in links or self.links:
            link |= {way: "whole" for way in ("up", "down") if link[way] == "frozen"}
            link["thawed"].set()

    def cut(self, *links):
        for end in [end for link in links or self.links for end in link["ends"]]:
            end.transport.abort()

    @asynccontextmanager
    async def ends_at(self, status, kind):
        """Have something answer all requests like this, in place of the server."""

        async def answer(request):
            return web.Response(status=status, text="Sorry", content_type=kind)

        app, target = web.Application(), self.target
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app) as server:
            self.target = server.port
            self.cut()
            yield
            self.target = target
            self.cut()


class Tab:
    """A page, and what is on it, by the names that a screen reader says."""

    def __init__(self, page):
        self.page, self.run = page, page.evaluate
        self.sockets, self.errors = [], []
        page.on("websocket", lambda it: self.sockets.append(it))
        page.on("pageerror", lambda it: self.errors.append(str(it)))
        self.name, self.box = self("textbox", "User name"), self("textbox", "Message")
        self.enter, self.logoff = self("button", "Login"), self("button", "Log off")
        self.send = self("button", "Send")
        self.refresh = self("button", "Refresh users")
        self.status, self.notice, self.log = self("status"), self("alert"), self("log")
        self.list = self("list", "Users")
        self.users = self.list.get_by_role("listitem")
        self.entries = self.log.locator(":scope > *")
        self.authors, self.texts = self.log.locator("b"), self.log.locator("div > p")
        self.times, self.links = self.log.locator("time"), self.log.locator("a")

    def __call__(self, role, name=None):
        return self.page.get_by_role(role, name=name, exact=True)

    async def login(self, name="Jack"):
        await self.name.fill(name)
        await self.name.press("Enter")
        await self.online()

    async def online(self):
        await expect(self.status).to_have_text("Online")

    async def offline(self, notice):
        await expect(self.notice).to_have_text(notice)
        await expect(self.status).to_have_text("Offline")

    async def lost(self):
        await self.offline("The connection is lost. Trying to come back …")

    async def say(self, *texts):
        for text in texts:
            await self.box.fill(text)
            await self.box.press("Enter")

    async def hears(self, *texts):
        await expect(self.texts).to_have_text(texts)

    async def with_clock(self):
        """Load it again, with a clock that can be put forward."""
        await self.page.clock.install()
        await self.page.reload()

    async def wait(self, seconds):
        """Put the clock forward; what is due in that time is done once."""
        await self.page.clock.fast_forward(seconds * 1000)

    async def with_mail(self, up=lambda end, it: True, down=lambda end, it: True):
        """Load it again; these say of each message on a WebSocket whether it passes."""
        ends = []

        def connect(end):
            ends.append(end)
            server = end.connect_to_server()
            end.on_message(lambda it: up(end, it) and server.send(it))
            server.on_message(lambda it: down(end, it) and end.send(it))

        await self.page.route_web_socket(re.compile("/ws"), connect)
        await self.page.reload()
        return ends

    async def network_changes(self):
        await self.run("dispatchEvent(new Event('online'))")

    async def hide(self, hidden):
        await self.run(
            """hidden => {
                Object.defineProperty(document, "hidden", {get: () => hidden, configurable: true});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )


def check_playwright():
    """Skip where Playwright's own node lacks a library, before each test waits for it."""
    version = [sys.executable, "-m", "playwright", "--version"]
    ran = subprocess.run(version, check=False, capture_output=True, timeout=LIMIT)
    if ran.returncode:
        unable("Playwright does not start: apt install libatomic1")


@pytest_asyncio.fixture(loop_scope="class", scope="class")
async def browser():
    """Playwright's own Chromium if it is there, else what the machine has."""
    check_playwright()
    async with async_playwright() as player:
        names = "chromium", "chromium-browser", "google-chrome", "chrome"
        path = next(filter(None, map(shutil.which, names)), None)
        rule = "--host-resolver-rules=MAP chat.test 127.0.0.1"
        for options in {}, {"executable_path": path}, {"channel": "chrome"}:
            with suppress(playwright.async_api.Error):
                browser = await player.chromium.launch(args=[rule], **options)
                break
        else:
            unable("the page needs a browser: apt install chromium")
        yield browser
        await browser.close()


@pytest.mark.page
@pytest.mark.asyncio(loop_scope="class")
class WithPages:
    """What tests with pages share; a browser lives as long as the event loop of a class."""

    @fixture
    async def port(self):
        async with serving(chat.make_app()) as port:
            yield port

    @fixture
    async def line(self, port):
        async with Line(port) as line:
            yield line

    @fixture
    async def jill(self, port):
        return await Peer.login(port, "Jill")


class TestPage(WithPages):
    """All of the page, in Chromium, by plain http from another host, over a line."""

    @fixture
    async def context(self, browser, line):
        url = f"http://chat.test:{line.port}"
        async with await browser.new_context(base_url=url) as context:
            yield context

    @fixture
    async def tab(self, context):
        """The page, not logged in; a test with errors on it fails."""
        tab = Tab(await context.new_page())
        await tab.page.goto("/")
        yield tab
        assert tab.errors == []

    @fixture
    async def jack(self, tab):
        """The page of Jack, who is logged in."""
        await tab.login()
        return tab

    # Logging in, and staying in

    async def test_it_works_by_keyboard_and_says_what_can_be_done(self, tab, port):
        keyboard = tab.page.keyboard
        await expect(tab.name).to_be_focused()
        for button in tab.logoff, tab.send:
            await expect(button).to_be_disabled()
        await keyboard.type("Jack")
        await keyboard.press("Enter")
        await tab.online()
        await expect(tab.enter).to_be_disabled()
        await expect(tab.box).to_be_focused()
        assert await users(port) == ["Jack"]
        await keyboard.type("hello")
        await keyboard.press("Tab")
        await keyboard.press("Space")  # on Send
        await tab.hears("hello")
        for it in tab.log, tab.list, tab.refresh, tab.logoff:
            await keyboard.press("Shift+Tab")
            await expect(it).to_be_focused()
        await keyboard.press("Enter")
        await tab.offline("")
        await expect(tab.name).to_be_focused()
        assert await users(port) == [""]
        await tab.page.reload()
        await expect(tab.name).to_have_value("Jack")
        await tab.offline("")

    async def test_a_login_that_fails_says_why(self, tab, port, line):
        async def fails(name, why):
            await tab.name.fill(name)
            await tab.enter.click()
            await tab.offline(f"Not logged in: {why}")

        await Peer.login(port, "Jack")
        await fails("Jack", "User Jack already logged in")
        await fails("a:b", "A name: 1 to 32 printable characters, no colon")
        async with line.ends_at(404, "text/plain"):
            await fails("Jill", "status 404")
        async with line.ends_at(426, "text/html"):
            await fails("Jill", "the WebSocket does not get through")
        line.new = "torn"
        await fails("Jill", "the server does not answer")
        line.new = "whole"
        await tab.login("Jill")
        await expect(tab.notice).to_be_empty()

    async def test_a_login_that_nobody_answers_is_given_up_after_8_s(self, tab, line):
        await tab.with_clock()
        line.new = "dark"
        line.cut()
        await tab.name.press("x")
        await tab.name.press("Enter")
        await expect(tab.logoff).to_be_enabled()
        await tab.wait(8)
        await tab.offline("Not logged in: the server does not answer")

    @pytest.mark.parametrize(
        "name",
        ["山田\u3000太郎", "می\u200cخواهم 👩\u200d💻", "\x1f J\ud83dack\x85\ufeff"],
    )
    async def test_ones_own_name_and_words_are_known_when_they_return(self, tab, name):
        await tab.with_clock()
        for box, text in (tab.name, name), (tab.box, "half a pair: \ud83d"):
            set_value = "(box, json) => { box.value = JSON.parse(json); }"
            await box.evaluate(set_value, json.dumps(text))
            await box.press("Enter")
            await tab.online()
        await tab.say("\ufeff \x00\x1f end\r\n\u2028 ")
        await expect(tab.log.locator(".own")).to_have_count(2)
        await tab.wait(8)  # after which they would be said again
        await tab.say("end")
        await expect(tab.log.locator(".own")).to_have_count(3)
        assert len(tab.sockets) == 1

    @pytest.mark.parametrize("kind", UNUSUAL)
    async def test_it_works_in_a_browser_that(self, tab, line, kind):
        await tab.page.add_init_script(UNUSUAL[kind])
        await tab.page.reload()
        await tab.login()
        line.fail("dark")
        await tab.say("hello")
        await tab.network_changes()
        await tab.hears("hello")
        await tab.logoff.click()
        await tab.login()

    async def test_who_comes_hears_the_last_50_and_no_time_of_them(self, tab, jill):
        jill.say(*map(str, range(60)))
        await jill.hear(60)
        await tab.login()
        await tab.say("hello")
        await tab.hears(*map(str, range(10, 60)), "hello")
        await expect(tab.times).to_have_count(1)

    async def test_a_reload_is_back_at_once_under_its_name(self, jack, jill, line):
        await jack.say("hello")
        await jack.hears("hello")
        line.fail("dark", links=line.sockets())  # which the server takes for alive
        await jack.page.reload()
        await jack.online()
        await expect(jack.box).to_be_focused()
        jill.say("hi")
        await jack.hears("hello", "hi")
        await expect(jack.users).to_have_text(["Jack", "Jill"])

    async def test_of_a_tab_and_its_duplicate_the_newer_one_stays(self, jack, jill):
        async with jack.page.expect_popup() as popup:
            await jack.run("open(location)")  # which copies the session
        newer, why = Tab(await popup.value), "Logged off: logged in again elsewhere"
        await newer.online()
        await jack.offline(why)
        await newer.say("hello")
        await newer.hears("hello")
        await jack.page.reload()
        await expect(jack.users).to_have_text(["Jack", "Jill"])
        await jack.offline("")
        await jack.login()
        await newer.offline(why)

    @pytest.mark.parametrize("why", ["the users were reset", "the message is too long"])
    async def test_after_a_final_close_it_stays_out(self, tab, port, why, monkeypatch):
        monkeypatch.setattr(chat, "MAX_MESSAGE", 5)
        await tab.with_clock()
        await tab.login()
        is_reset = why == "the users were reset"
        if is_reset:
            await Peer.ask(port, "GET /?resetUsers=1")
        else:
            await tab.say("hello!")
        await tab.offline(f"Logged off: {why}")
        await expect(tab.box).to_have_value("" if is_reset else "hello!")
        await tab.wait(60)
        await tab.offline(f"Logged off: {why}")
        assert len(tab.sockets) == 1

    @pytest.mark.parametrize("status, kind", [(404, "text/plain"), (403, "text/html")])
    async def test_whatever_a_proxy_says_it_comes_back(self, jack, line, status, kind):
        async with line.ends_at(status, kind):
            async with jack.page.expect_response("**/ws?*") as response:
                await jack.lost()
            assert (await response.value).status == status
        await jack.online()
        await expect(jack.notice).to_be_empty()

    async def test_what_the_chat_itself_refuses_is_final(self, jack, line):
        async with line.ends_at(403, "text/plain"):
            await jack.offline("Logged off: Sorry")

    async def test_if_somebody_else_has_the_name_it_stays_out(self, jack, port, line):
        line.fail("dark", "up")
        await jack.say("one", "two")
        await jack.box.fill("half typed")
        line.new = "frozen"
        line.cut()
        other = await Peer.login(port, "Jack")
        line.new = "whole"
        line.thaw()
        await jack.offline("Logged off: User Jack already logged in")
        await expect(jack.box).to_have_value("one\ntwo\nhalf typed")
        other.say("end")
        assert await other.hear() == ["Jack: end"]

    async def test_the_pauses_between_tries_grow_to_10_seconds(self, jack, line):
        await jack.run(
            """() => {
                window.pauses = [];
                const real = setTimeout;
                setTimeout = (f, pause) => {
                    const isTry = pause > 100 && pause <= 10_000 && pause !== 8000;
                    if (isTry) pauses.push(pause);
                    return real(f, isTry ? 0 : pause);
                };
            }"""
        )
        line.new = "torn"
        line.cut()
        pauses = []
        async with asyncio.timeout(LIMIT):
            while len(pauses) < 10:
                pauses = await jack.run("pauses.slice(0, 10)")
        assert pauses[0] <= 500 and 5000 <= pauses[-1] <= 10_000
        assert len(set(pauses)) == 10  # jitter

    # Whether the connection is alive

    @pytest.mark.parametrize(
        "way, seen", [("up", "after 20 s of silence"), ("down", "when it is looked at")]
    )
    async def test_a_dead_connection_is_noticed(self, tab, jill, line, way, seen):
        await tab.with_clock()
        await tab.login()
        await expect(tab.users).to_have_count(2)
        line.fail("dark", way)
        await (tab.wait(20) if "silence" in seen else tab.hide(False))
        await tab.wait(7.9)
        assert len(tab.sockets) == 1
        await tab.wait(0.1)
        await until(lambda: len(tab.sockets) == 2)
        jill.say("hi")
        await tab.hears("hi")

    async def test_a_living_one_is_kept_if_timers_run_once_a_minute(self, tab):
        await tab.with_clock()
        await tab.login()
        for _ in range(3):
            async with tab.sockets[0].expect_event("framereceived"):  # it asked
                await tab.wait(60)
        await tab.online()
        assert len(tab.sockets) == 1

    async def test_on_another_network_it_reconnects_at_once(self, jack, jill, line):
        await jill.told("Jack", "Jill")
        line.fail("dark")
        jill.say("missed")
        await jill.hear()
        await jack.network_changes()
        await jack.hears("missed")
        line.fail("frozen", "down")
        await jack.network_changes()
        jill.say("hi")
        await jack.hears("missed", "hi")
        line.thaw()
        await until(lambda: jack.sockets[1].is_closed())
        await jack.say("hello")
        await jack.hears("missed", "hi", "hello")
        jill.say("end")  # nobody was away for a moment
        assert NOTICE not in [await jill.receive() for _ in range(3)]

    async def test_who_pastes_much_is_read_slowly_but_not_given_up(self, tab):
        await tab.with_clock()
        await tab.login()
        paste = """(box, text) => {
            for (let i = 0; i < 11; i++) box.value = text, box.form.requestSubmit();
        }"""
        await tab.box.evaluate(paste, LONGEST)
        for i in 8, 9, 10:
            await expect(tab.texts.nth(i)).to_be_attached()
            await tab.wait(5)
        assert len(tab.sockets) == 1

    async def test_a_login_that_was_given_up_and_comes_late_is_refused(self, tab, line):
        await tab.with_clock()
        await tab.login()
        line.new = "frozen"
        await tab.network_changes()
        late = await until(lambda: line.sockets()[1:])
        line.new = "whole"
        await tab.wait(8)
        await tab.online()
        line.thaw()
        await until(lambda: late[0] not in line.links)  # but is answered
        await tab.say("hello")
        await tab.hears("hello")
        await expect(tab.notice).to_be_empty()

    async def test_a_connection_that_never_opens_is_given_up_too(self, tab, line):
        await tab.with_clock()
        await tab.login()
        line.new = "dark"
        async with tab.page.expect_websocket():
            line.cut()
        await tab.lost()
        line.new = "whole"
        await tab.wait(8)
        await tab.online()

    # Talking, and hearing everything once

    async def test_what_was_said_into_a_dead_line_is_said_again(self, tab, jill, line):
        await tab.with_clock()
        await tab.login()
        line.fail("dark", "up")
        await tab.say("one", "one", "two")
        await tab.wait(4)
        jill.say("one")  # as others' words do, it proves nothing
        await tab.hears("one")
        await tab.wait(4)
        await tab.hears("one", "one", "one", "two")
        await tab.say("end")
        jacks = ["Jack: one", "Jack: one", "Jack: two", "Jack: end"]
        assert await jill.hear(5) == ["Jill: one", *jacks]
        assert len(tab.sockets) == 2

    async def test_what_all_heard_but_oneself_is_not_said_again(self, tab, jill, line):
        await tab.with_clock()
        await tab.login()
        line.fail("dark", "down")
        await tab.say("one", "one", "two")
        assert await jill.hear(3) == ["Jack: one", "Jack: one", "Jack: two"]
        await tab.wait(8)
        await tab.hears("one", "one", "two")
        await tab.say("end")
        assert await jill.hear() == ["Jack: end"]

    async def test_what_an_old_one_still_brings_is_ignored(self, jack, jill, line):
        line.fail("frozen", "down")
        jill.say("once")
        await jill.hear()
        line.new = "frozen"
        await jack.network_changes()
        await until(lambda: line.sockets()[1:])
        async with jack.sockets[0].expect_event("framereceived"):
            line.thaw(*line.sockets()[:1])
        line.thaw()
        await jack.online()
        await jack.say("end")
        await jack.hears("once", "end")

    async def test_send_waits_until_all_that_was_missed_has_come(self, tab, jill):
        places = []

        def down(_, text):
            if is_place := text.startswith("{{Here"):
                places.append(text)
            # The answer on the second connection is kept back.
            return not is_place or len(places) < 4

        ends = await tab.with_mail(down=down)
        await tab.login()
        await ends[0].close(code=1011)
        jill.say("missed")
        await tab.hears("missed")
        await until(lambda: len(places) == 4)
        await tab.say("hello")
        await expect(tab.box).to_have_value("hello")
        await expect(tab.send).to_be_disabled()
        await expect(tab.status).to_have_text("Offline")
        ends[1].send(places[-1])
        await tab.send.click()
        await tab.hears("missed", "hello")

    async def test_a_hole_is_told_and_what_may_have_been_said_returned(self, tab, jill):
        await tab.with_clock()
        ends = await tab.with_mail(up=lambda _, it: it == b"")  # no text gets through
        await tab.login()
        await tab.say("one", "two")
        await tab.box.fill("half typed")
        ends[0].send("{{Here 1}}")
        hole = "Some messages are missing here"  # and one on the way back to the truth
        await expect(tab.entries).to_have_text([hole, hole])
        await expect(tab.box).to_have_value("one\ntwo\nhalf typed")
        jill.say("end")
        await tab.hears("end")
        await tab.wait(8)
        await tab.online()
        assert len(ends) == 1

    async def test_a_server_that_was_restarted_makes_a_hole(self, context, tmp_path):
        tab = Tab(await context.new_page())
        async with running(tmp_path) as process:
            await tab.page.goto(f"http://127.0.0.1:{process.port}")
            await tab.login()
            await tab.say("heard")
            await tab.hears("heard")
            process.send_signal(signal.SIGSTOP)
            await tab.say("one", "two")
            await tab.box.fill("half typed")
        await tab.lost()
        async with running(tmp_path, f"--port={process.port}"):
            await tab.online()
            await expect(tab.notice).to_be_empty()
            hole = "Some messages are missing here"
            await expect(tab.entries).to_have_text([re.compile("heard"), hole])
            await expect(tab.box).to_have_value("one\ntwo\nhalf typed")
            await expect(tab.users).to_have_text(["Jack"])

    async def test_at_a_log_off_what_is_unheard_is_returned(self, jack, jill, line):
        line.fail("dark", "down")
        await jack.say("one")
        await jill.hear()
        line.new = "dark"
        await jack.network_changes()
        await jack.logoff.click()
        await expect(jack.box).to_have_value("one")
        await jill.told("Jill")

    async def test_who_logs_off_while_it_tries_to_come_back_stays_out(self, tab, line):
        await tab.with_clock()
        await tab.login()
        line.cut()
        await tab.lost()
        await tab.logoff.click()
        await tab.wait(20)
        await tab.offline("")

    async def test_enter_sends_but_not_with_shift_nor_of_an_ime(self, jack):
        await jack.box.type("one")
        await jack.box.press("Shift+Enter")
        await jack.box.type("two")
        await jack.box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
        await expect(jack.box).to_have_value("one\ntwo")
        await jack.box.press("Enter")
        await expect(jack.box).to_have_value("")
        await jack.box.press("Enter")  # sends nothing
        await jack.say("three")
        await jack.hears("one\ntwo", "three")
        assert await jack.texts.first.inner_text() == "one\ntwo"

    async def test_on_a_phone_enter_breaks_the_line_and_send_sends(self, browser, port):
        phone = {"is_mobile": True, "has_touch": True}
        async with await browser.new_context(**phone) as context:
            tab = Tab(await context.new_page())
            await tab.page.goto(f"http://chat.test:{port}")
            await tab.login()
            await tab.say("one")
            await tab.box.type("two")
            await tab.send.tap()
            await tab.hears("one\ntwo")
            assert await tab.texts.inner_text() == "one\ntwo"

    async def test_too_long_a_message_is_not_sent_and_it_says_by_how_much(self, jack):
        await jack.say("é" * 8191 + "xyz")  # 16 KiB and a byte
        await expect(jack.notice).to_contain_text("too long: 1 of")
        await jack.say("é" * 9000)
        await expect(jack.notice).to_contain_text("too long: 1616 of")
        await expect(jack.box).to_have_value("é" * 9000)
        await jack.say("é" * 8192)
        await jack.hears("é" * 2000 + "…")
        await expect(jack.notice).to_be_empty()
        await expect(jack.box).to_have_value("")

    async def test_a_hidden_tab_counts_and_other_scripts_hear(self, tab, jill, line):
        await tab.run(
            """() => {
                window.heard = [];
                document.addEventListener("heard", ({detail: {author, text, replayed}}) =>
                    heard.push(`${author} ${text} ${replayed}`));
            }"""
        )
        jill.say("past")
        await jill.hear()
        await tab.hide(True)
        await tab.login()
        await tab.hears("past")
        await expect(tab.page).to_have_title("Chat")
        line.fail("dark")
        jill.say("missed")
        await tab.network_changes()
        await expect(tab.page).to_have_title("(1) Chat")
        jill.say("new")
        await expect(tab.page).to_have_title("(2) Chat")
        heard = await tab.run("heard")
        assert heard == ["Jill past true", "Jill missed false", "Jill new false"]
        await tab.hide(False)
        await expect(tab.page).to_have_title("Chat")

    async def test_other_scripts_find_their_places_and_the_key(self, jack, port):
        page = (await Peer.ask(port, "GET /")).body
        assert re.search("\n<!-- policy -->\n<meta http-equiv=[^>]+-Policy", page)
        assert page.endswith("\n<!-- scripts -->\n</body>\n</html>\n")
        key = await jack.page.locator("#key").input_value()
        for query, status in ("", 409), (f"&key={key}.999", 426):
            peer = await Peer.ask(port, f"GET /ws?user=Jack{query}")
            assert peer.status == status

    # The list of users

    async def test_the_list_is_asked_for_once_a_change(self, jill, tab, port):
        asked = []
        await expect(tab.users).to_have_text(["Jill"])
        tab.page.on("request", lambda it: "getUsers2" in it.url and asked.append(it))
        await tab.login()
        await expect(tab.users).to_have_text(["Jill", "Jack"])
        joe = await Peer.login(port, "Joe")
        await expect(tab.users).to_have_text(["Jill", "Jack", "Joe"])
        await expect(tab.page.get_by_role("heading").last).to_have_text("Users 3")
        joe.vanish()
        await expect(tab.users).to_have_text(["Jill", "Jack"])
        assert len(asked) == 3

    async def test_the_list_is_never_asked_for_twice_at_once(self, tab):
        asked = asyncio.Queue()
        await tab.page.route("**/?getUsers2=1", lambda it: asked.put_nowait(it))
        for _ in range(5):
            await tab.refresh.click()
        for names in ["Jack"], ["Jack", "Jill"]:  # one more after the last press
            async with asyncio.timeout(LIMIT):
                route = await asked.get()
            assert asked.empty()
            await route.fulfill(body="\r\n".join(names))
            await expect(tab.users).to_have_text(names)
        assert asked.empty()

    async def test_who_comes_back_asks_for_it_until_it_comes(self, jack, jill, line):
        joe = await Peer.login(jill.port, "Joe")
        await joe.told("Jack", "Jill", "Joe")
        await expect(jack.users).to_have_text(["Jack", "Jill", "Joe"])
        async with jack.page.expect_response("**/?getUsers2=1"):
            await jack.refresh.click()
        await jack.run(DRAWN)  # by when none is under way
        await jack.run(
            """() => {
                const real = AbortSignal.timeout; // 0.8 s instead of 8
                AbortSignal.timeout = (pause) => real.call(AbortSignal, pause / 10);
                window.counts = [];
                const note = () => counts.push(users.childElementCount);
                new MutationObserver(note).observe(users, {childList: true});
            }"""
        )
        line.fail("dark")  # also the connection that the list comes on
        jill.vanish()
        await joe.told("Jack", "Joe")  # and Jack is not
        async with jack.page.expect_event("requestfailed"):
            await jack.network_changes()
        await expect(jack.users).to_have_text(["Jack", "Joe"])
        assert 0 not in await jack.run("counts")

    # Drawing

    async def test_a_message_has_author_and_time_and_own_ones_differ(self, jack, jill):
        jill.say("hello: you\nJack: I am not Jack")
        await jack.hears("hello: you\nJack: I am not Jack")
        await jack.say("hi")
        await expect(jack.authors).to_have_text(["Jill", "Jack"])
        stamp = await jack.times.last.get_attribute("datetime")
        assert abs(datetime.fromisoformat(stamp).timestamp() - time.time()) < LIMIT
        colour = "e => getComputedStyle(e).backgroundColor"
        theirs, own = [await it.evaluate(colour) for it in await jack.entries.all()]
        assert theirs != own

    async def test_markup_stays_text_in_messages_and_in_names(self, jack, port):
        evil = '<img src=x onerror="document.title=1">'[:32]
        jill = await Peer.login(port, evil)
        text = "<b>bold</b> &amp; <script>document.title=2</script>"
        jill.say(text)
        await jack.hears(text)
        await expect(jack.authors).to_have_text([evil])
        await expect(jack.users).to_have_text(["Jack", evil])
        await expect(jack.page).to_have_title("Chat")

    async def test_links_can_be_pressed_and_a_text_stays_as_it_was_said(self, jack):
        rows = [row.split(" |") for row in LINKS.strip().split("\n")]
        await jack.say(*(text for text, _ in rows))
        await jack.hears(*(text for text, _ in rows))
        for text, (_, links) in zip(await jack.texts.all(), rows, strict=True):
            await expect(text.locator("a")).to_have_text(links.split())
            for link in await text.locator("a").all():
                assert await link.get_attribute("href") == await link.text_content()

    async def test_a_link_opens_a_new_tab_that_cannot_reach_this_one(self, jack, line):
        await jack.say(f"http://chat.test:{line.port}/?getUsers2=1")
        async with jack.page.expect_popup() as popup:
            await jack.links.click()
        new = await popup.value
        await expect(new.locator("body")).to_have_text("Jack")
        assert await new.evaluate("opener") is None
        await jack.online()

    async def test_texts_keep_direction_and_marks_to_themselves(self, jack, port):
        hebrew = "\u05d0\u05d1\u05d2"
        jill = await Peer.login(port, hebrew + " " + "x\u0301" * 14)
        stacked = await Peer.login(port, "z" + "\u0301\u0323" * 15)
        jill.say(f"12:34 {hebrew}\nand this")
        await expect(jack.entries).to_have_count(1)
        boxes = [
            await jack.entries.locator(it).bounding_box() for it in ("b", "time", "p")
        ]
        author, said, text = boxes
        assert author["x"] == text["x"] and author["x"] + author["width"] <= said["x"]
        await jack.run("document.activeElement.blur()")
        before = await jack.entries.screenshot()
        stacked.say("z" + "\u0301\u0323" * 400)
        await expect(jack.entries).to_have_count(2)
        await jack.run(DRAWN)
        assert await jack.entries.first.screenshot() == before
        overflow = "li => getComputedStyle(li).overflowY"
        assert await jack.users.nth(1).evaluate(overflow) == "clip"

    async def test_of_a_long_message_2_000_characters_are_shown_first(self, jack, jill):
        long = "\U0001f600" * 2001 + " https://a.org"
        jill.say("y" * 2000, long, "x" * 1990 + " https://a.org/b")
        button = jack.page.get_by_role("button", name="Show")
        cut = ["\U0001f600" * 2000 + "…", "x" * 1990 + " …"]  # no half of a link
        await jack.hears("y" * 2000, *cut)
        await expect(button).to_have_count(2)
        await button.first.click()
        await jack.hears("y" * 2000, long, cut[1])
        await expect(jack.links).to_have_text(["https://a.org"])
        await expect(button).to_have_count(1)

    async def test_the_log_follows_its_end_unless_one_reads_back(self, jack, jill):
        async def stays_at_end():
            await jack.run(DRAWN)
            assert await jack.log.evaluate(AT_END)

        jill.say(*(f"number {i}" + "\n" * (i % 5) for i in range(1000)))
        await expect(jack.entries).to_have_count(1000)
        await stays_at_end()
        await jack.page.set_viewport_size({"width": 900, "height": 400})
        await stays_at_end()
        read = jack.entries.filter(has_text="number 700")
        await read.scroll_into_view_if_needed()
        await jack.run(DRAWN)
        place = "e => e.getBoundingClientRect().top"
        where = await read.evaluate(place)
        jill.say(*(f"number {i}" for i in range(1000, 1200)))  # each pushes out another
        await expect(jack.entries.last).to_contain_text("number 1199")
        await jack.run(DRAWN)
        assert abs(await read.evaluate(place) - where) < 2  # pixels
        async with asyncio.timeout(LIMIT):
            while not await jack.log.evaluate(
                AT_END
            ):  # entries grow as they come in view
                await jack.log.press("End")
                await jack.run(DRAWN)
        jill.say("last\n\n\n\n")
        await expect(jack.entries.last).to_contain_text("last")
        await stays_at_end()

    async def test_a_storm_is_drawn_by_the_frame_and_1_000_are_kept(self, jack, port):
        await jack.run(
            """() => {
                window.drawings = 0;
                new MutationObserver(() => drawings++).observe(log, {childList: true});
            }"""
        )
        storm = [await Peer.login(port, f"Storm {i}") for i in range(10)]
        for peer in storm:
            peer.say(*map(str, range(1000)))
        await jack.say("still here")  # while it storms
        assert len(await storm[0].hear(10_001)) == 10_001
        storm[0].say("the end")
        await expect(jack.entries.last).to_contain_text("the end")
        await expect(jack.entries).to_have_count(1000)
        assert await jack.run("drawings") < 1000

    async def test_a_storm_of_the_largest_is_bearable(self, jack, browser, port):
        devtools = await jack.page.context.new_cdp_session(jack.page)
        machine = await browser.new_browser_cdp_session()
        listed = await machine.send("SystemInfo.getProcessInfo")
        renderers = [p["id"] for p in listed["processInfo"] if p["type"] == "renderer"]

        async def memory():
            await devtools.send("HeapProfiler.collectGarbage")
            pages = [
                Path(f"/proc/{it}/statm").read_text().split()[1] for it in renderers
            ]
            return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")

        async def storm():
            for i in range(60):
                talker = await Peer.login(port, f"Storm {i}")
                text = ("a" + "\u0301" * 8191, "\u0640" * 8192, "x" * 2**14)[i % 3]
                talker.say(*[text] * 8)
                await expect(jack.entries).to_have_count(8 * i + 8)
                talker.vanish()

        before, longest = await memory(), 0
        storming = asyncio.create_task(storm())
        while not storming.done():
            started = time.monotonic()
            await jack.run("new Promise(requestAnimationFrame)")
            longest = max(longest, time.monotonic() - started)
        await storming
        assert longest < 4  # seconds; 0.4 when nothing else runs
        started = time.monotonic()
        await jack.page.set_viewport_size({"width": 800, "height": 600})
        await jack.run(DRAWN)
        assert time.monotonic() - started < 1.2  # seconds; 0.05 when nothing else runs
        assert await memory() - before < 100 * 2**20

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    async def test_it_fits_all_screens_and_axe_finds_nothing(self, tab, port, scheme):
        back = "getComputedStyle(document.documentElement).backgroundColor"
        other = await tab.run(back)
        await tab.page.emulate_media(color_scheme=scheme)
        assert (await tab.run(back) == other) == (scheme == "light")
        over = """html => {
            const { scrollX, scrollY, innerWidth, innerHeight } = window;
            return [scrollX, scrollY, html.scrollWidth - innerWidth, html.scrollHeight - innerHeight];
        }"""

        async def check():
            for width, height in (667, 375), (2560, 1440), (1100, 700), (320, 568):
                size = {"width": width, "height": height}
                await tab.page.set_viewport_size(size)
                assert await tab.page.locator("html").evaluate(over) == [0, 0, 0, 0], (
                    size
                )
                for there in tab.box, tab.send, tab.enter, tab.logoff:
                    await expect(there).to_be_in_viewport(ratio=1)
                assert (await tab.log.bounding_box())["height"] > 100
                if width in (1100, 320):
                    violations = (await Axe().run(tab.page)).response["violations"]
                    assert [violation["help"] for violation in violations] == []

        await check()
        others = [await Peer.login(port, f"{'W' * 28} {i}") for i in range(40)]
        await tab.login()
        for peer in others:
            peer.say("words https://a.org " * 20 + "\nand" + "x" * 200)
        others[0].say("long " * 1000)
        await tab.say("hello")
        await expect(tab.entries).to_have_count(42)
        await tab.run("document.activeElement.blur()")
        await check()

    async def test_nothing_is_loaded_from_elsewhere_or_could_be(self, tab, line):
        asked = []
        tab.page.on("request", lambda request: asked.append(request.url))
        await tab.page.reload()
        await tab.login()
        here = f"http://chat.test:{line.port}/"
        assert asked and all(url.startswith((here, "data:")) for url in asked)
        violated = await tab.run(
            """() => {
                const seen = new Promise((f) => document.onsecuritypolicyviolation = f);
                fetch("data:,x").catch(() => {});
                return seen.then((event) => event.violatedDirective);
            }"""
        )
        assert violated == "connect-src"


@asynccontextmanager
async def started(*command, display="", says=None):
    """Run a program; yield what the pattern `says` finds in its output."""
    environment = os.environ | ({"DISPLAY": display} if display else {})
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=PIPE, stderr=STDOUT, start_new_session=True
    )
    try:
        found = None
        async with asyncio.timeout(2 * LIMIT):
            while says and not found:
                found = re.search(says, (await process.stdout.readline()).decode())
        yield found and found[1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


class Engine:
    """A tab of another browser, where one can go, run a script, press keys, and resize."""

    async def shows(self, selector, *texts):
        """Wait until these are the texts of what the selector finds."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        await self.gives(f"{found}.map((it) => it.textContent)", [*texts])

    async def gives(self, script, expected=True):
        """Wait until a script gives this."""
        result = None
        try:
            async with asyncio.timeout(LIMIT):
                while (result := await self.run(script)) != expected:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"{script} should give {expected}, and gives {result}")

    def pressing(self, keys):
        both = [
            {"type": f"key{way}", "value": key}
            for key in keys
            for way in ("Down", "Up")
        ]
        return {"actions": [{"type": "key", "id": "keyboard", "actions": both}]}


class Firefox(Engine):
    """By WebDriver BiDi, which is built in."""

    @classmethod
    @asynccontextmanager
    async def start(cls, folder):
        self, path = cls(), program("firefox", "firefox-esr")
        options = "--headless", "--profile", folder, "--remote-debugging-port=0"
        async with (
            started(path, *options, says=r"BiDi listening on (\S+)") as url,
            ClientSession() as http,
            http.ws_connect(f"{url}/session") as self.socket,
        ):
            await self.call("session.new", capabilities={})
            tree = await self.call("browsingContext.getTree")
            self.tab = {"context": tree["contexts"][0]["context"]}
            yield self

    async def call(self, method, **params):
        await self.socket.send_json({"id": 1, "method": method, "params": params})
        answer = await self.socket.receive_json(timeout=LIMIT)
        assert answer["type"] == "success", answer
        return answer["result"]

    async def go(self, url):
        await self.call(
            "browsingContext.navigate", url=url, wait="complete", **self.tab
        )

    async def run(self, script):
        what = {"expression": f"JSON.stringify({script})", "awaitPromise": False}
        answer = await self.call("script.evaluate", target=self.tab, **what)
        return json.loads(answer["result"].get("value", "null"))

    async def press(self, keys):
        await self.call("input.performActions", **self.tab, **self.pressing(keys))

    async def resize(self, width, height):
        size = {"width": width, "height": height}
        await self.call("browsingContext.setViewport", viewport=size, **self.tab)


class WebKit(Engine):
    """By WebDriver, on a screen of its own."""

    @classmethod
    @asynccontextmanager
    async def start(cls, folder):
        self, path = cls(), program("WebKitWebDriver", "webkit2gtk-driver")
        screen = program("Xvfb"), "-displayfd", "1", "-screen", "0", "1400x1000x24"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        async with (
            started(*screen, says=r"^(\d+)$") as number,
            started(path, f"--port={port}", display=f":{number}"),
            ClientSession(f"http://127.0.0.1:{port}") as self.http,
        ):
            self.session = ""
            async with asyncio.timeout(LIMIT):
                while not self.session:
                    with suppress(ClientConnectionError):
                        new = await self.call("", capabilities={})
                        self.session = "/" + new["sessionId"]
            yield self

    async def call(self, command, **body):
        path = f"/session{self.session}{command}"
        async with self.http.post(path, json=body) as response:
            answer = await response.json(content_type=None)
            assert response.status == 200, answer
            return answer["value"]

    async def go(self, url):
        await self.call("/url", url=url)

    async def run(self, script):
        return await self.call("/execute/sync", script=f"return {script}", args=[])

    async def press(self, keys):
        await self.call("/actions", **self.pressing(keys))

    async def resize(self, width, height):
        await self.call("/window/rect", width=width, height=height)


@pytest_asyncio.fixture(
    loop_scope="class",
    scope="class",
    params=[Firefox, WebKit],
    ids=["Firefox", "WebKit"],
)
async def engine(request, tmp_path_factory):
    async with request.param.start(tmp_path_factory.mktemp("profile")) as engine:
        yield engine


class TestEngines(WithPages):
    """The main things, in Firefox and in WebKit."""

    @fixture
    async def jack(self, engine, line):
        """A tab in which Jack has logged in, by the keyboard."""
        await engine.resize(1100, 700)
        await engine.go(f"http://127.0.0.1:{line.port}")
        await engine.gives("document.activeElement.id", "name")
        await engine.press(
            SHIFT + "Jack" + ENTER
        )  # a new window may miss the first key
        await engine.shows("#status", "Online")
        return engine

    async def test_one_logs_in_talks_hears_and_sees_links(self, jack, jill):
        await jack.press("see https://a.org/b。" + ENTER)
        assert await jill.hear() == ["Jack: see https://a.org/b。"]
        jill.say("hi")
        await jack.shows("#log p", "see https://a.org/b。", "hi")
        await jack.shows("#log .own p", "see https://a.org/b。")
        await jack.shows("#log a", "https://a.org/b")
        await jack.shows("#users li", "Jack", "Jill")

    async def test_a_reload_is_back_at_once_under_its_name(self, jack, jill, line):
        for is_lost in False, True, False:
            if is_lost:
                line.fail("dark", links=line.sockets())
            jill.say("missed")
            await jill.hear()
            await jack.go(f"http://127.0.0.1:{line.port}")
            await jack.shows("#status", "Online")
        await jack.shows("#log p", *["missed"] * 3)
        await jack.shows("#log time")  # none

    async def test_after_a_loss_all_that_was_said_is_heard_once(self, jack, jill, line):
        line.fail("dark")
        await jack.press("one" + ENTER + "one" + ENTER)
        jill.say("missed")
        await jill.hear()
        await jack.run("dispatchEvent(new Event('online'))")
        await jack.shows("#log p", "missed", "one", "one")
        line.cut()
        jill.say("two")
        await jack.shows("#log p", "missed", "one", "one", "two")
        await jack.shows("#status", "Online")
        await jack.press("end" + ENTER)
        heard = ["Jack: one", "Jack: one", "Jill: two", "Jack: end"]
        assert await jill.hear(4) == heard

    async def test_nothing_is_cut_off(self, jack, jill, line, monkeypatch):
        jill.say(*[f"{i} " + "long " * 50 for i in range(30)])
        jill.say("x" * 60 + " \u05d0\u05d1\u05d2 \u05d3\u05d4\u05d5")  # Hebrew
        log = "document.querySelector('#log')"
        await jack.gives(f"{log}.children.length", 31)
        last = f"{log}.lastElementChild"
        cut = """(it) => {
            const words = document.createRange();
            words.selectNodeContents(it);
            const [inner, outer] = [words, it].map((that) => that.getBoundingClientRect());
            return getComputedStyle(it).overflowX !== "visible" && inner.left < outer.left;
        }"""
        assert not await jack.run(f"({cut})({last}.querySelector('p'))")
        baseline = """(it) => {
            const probe = document.createElement("img");
            it.append(probe);
            const { bottom } = probe.getBoundingClientRect();
            probe.remove();
            return bottom;
        }"""
        both = f"[...{last}.querySelectorAll('b, time')]"
        author, said = await jack.run(f"{both}.map({baseline})")
        assert abs(author - said) < 1  # pixel
        for width, height in (500, 600), (1100, 700), (500, 400):
            await jack.resize(width, height)
            await jack.gives("innerWidth", width)
            await jack.gives(f"({AT_END})({log})")
        inside = """['name', 'enter', 'logoff', 'message', 'send'].every((id) => {
            const box = document.getElementById(id).getBoundingClientRect();
            return box.x >= 0 && box.right <= innerWidth && box.bottom <= innerHeight;
        })"""
        await jack.gives(inside)
        monkeypatch.setattr(chat, "MAX_KEPT", 1000)
        line.fail("dark")
        jill.say(*map(str, range(50)))
        await jill.hear(50)
        await jack.run("dispatchEvent(new Event('online'))")
        await jack.shows("#log > p", "Some messages are missing here")
        assert await jack.run(f"{log}.querySelector(':scope > p').offsetHeight") > 15


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
