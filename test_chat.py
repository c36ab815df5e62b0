# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "pytest", "pytest-aiohttp", "playwright", "axe-playwright-python",
# ]
# ///
"""What the chat promises: each test is one sentence of it, over real sockets.

They come in the order of chat.py's chapters, and the page, in a real Chromium, is last. What
both do on lines that die, and the page in other browsers, is in bonus/test_page.py.
"""

import asyncio
import gc
import itertools
import os
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
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlencode

import pytest
import pytest_asyncio
from aiohttp import web

import chat

try:
    from axe_playwright_python.async_playwright import Axe
    from playwright.async_api import Error, async_playwright, expect

    expect.set_options(timeout=20_000)  # milliseconds
except ImportError:  # the server is tested without them, too
    expect = None

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


async def soon(awaitable):
    """Wait for something, but not for ever."""
    async with asyncio.timeout(LIMIT):
        return await awaitable


async def until(sentence, condition):
    """Wait until a condition gives something, and return it; or fail with the sentence."""
    end = time.monotonic() + 10  # seconds; a page asks by itself after 20
    while not (found := condition()):
        assert time.monotonic() < end, f"never came: {sentence}"
        await asyncio.sleep(0.02)
    return found


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
        await peer.answered(has_body=not request.startswith("HEAD"))
        if peer.status != 101:
            peer.writer.close()
        return peer

    async def answered(self, has_body=True):
        self.head = (await soon(self.reader.readuntil(b"\r\n\r\n"))).decode()
        self.status = int(self.head.split()[1])
        length = re.search(r"Content-Length: (\d+)", self.head)
        size = int(length[1]) if length and has_body else 0
        self.body = (await soon(self.reader.readexactly(size))).decode()

    @classmethod
    def abort_all(cls):
        while cls.everyone:
            cls.everyone.pop().writer.transport.abort()

    @classmethod
    async def login(cls, port, name, headers=(), **query):
        target = "/ws?" + urlencode({"user": name, **query})
        peer = await cls.ask(port, f"GET {target}", UPGRADE | dict(headers))
        assert (peer.status, peer.body) == (101, "")
        assert "Sec-WebSocket-Extensions" not in peer.head  # nothing is compressed
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
        first, size = await soon(self.reader.readexactly(2))
        assert first & 0xF0 == 0x80 and size <= 126  # in one, unmasked, < 64 KiB
        if size == 126:
            size = int.from_bytes(await soon(self.reader.readexactly(2)))
            assert size > 125  # the shortest way to say it
        return first & 0xF, await soon(self.reader.readexactly(size))

    async def answer(self):
        """Return the next frame that is no notice; answer a ping before it."""
        while (answer := await self.receive()) in (NOTICE, (PING, b"")):
            if answer != NOTICE:
                self.send(PONG)
        return answer

    async def hear(self, count=1):
        """Return the next messages."""
        answers = [await self.answer() for _ in range(count)]
        assert all(opcode == TEXT for opcode, _ in answers)
        return [payload.decode() for _, payload in answers]

    async def hear_to(self, last):
        """Return the next messages, up to this one."""
        heard = await self.hear()
        while heard[-1] != last:
            heard += await self.hear()
        return heard

    async def here(self):
        """Return N of `{{Here N}}`, which is next."""
        (text,) = await self.hear()
        return int(re.fullmatch(r"\{\{Here (\d+)\}\}", text)[1])

    async def where(self):
        """Ask for the number of the last message."""
        self.send(BINARY)
        return await self.here()

    async def ping(self):
        """Wait until the server has read what was sent."""
        self.send(PING, b"?")
        assert await self.answer() == (PONG, b"?")

    async def told(self, *names):
        """Ask for the list at each notice, as a page does, until it is `names`."""
        listed = "never told"
        with suppress(TimeoutError):
            while listed != [*names]:
                async with asyncio.timeout(5):  # a change is told within a second
                    while await self.receive() != NOTICE:
                        pass
                listed = await users(self.port)
        assert listed == [*names]

    async def closed(self):
        """Return the code and the reason that this is closed with; nothing follows."""
        while (answer := await self.receive())[0] == TEXT:
            pass
        assert answer[0] == CLOSE
        assert await soon(self.reader.read()) == b""
        self.writer.close()  # or a test of thousands takes all descriptors
        return int.from_bytes(answer[1][:2]), answer[1][2:].decode()

    def stall(self):
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


async def flood(listener, bursts=28):  # 3.5 MiB, of the 4 MiB that are kept
    """Have new users say 128 KiB each, which is their right; return what `listener` heard."""
    heard = []
    for name in [f"talker{next(number)}" for _ in range(bursts)]:
        talker = await Peer.login(listener.port, name)
        texts = [str(next(number)).ljust(2**14, "x") for _ in range(8)]
        talker.say(*texts)
        heard += await listener.hear(8)
        assert heard[-8:] == [f"{name}: {text}" for text in texts]
        talker.vanish()
    return heard


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


@pytest.fixture
def room():
    return chat.Room()


@pytest_asyncio.fixture
async def port(room, caplog):
    """The port of a chat at 127.0.0.1, which logs no fault of its own."""
    async with serving(chat.make_app(room)) as port:
        yield port
    records = caplog.get_records("call") + caplog.records
    assert not [record for record in records if record.name != "chat"]


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
        b"?",
        "Jack: grüß dich",
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
    "a fragment, not continued": (frame(TEXT, b"x", 0) + frame(TEXT, b"y"), 1002),
    "half a code": (frame(CLOSE, b"x"), 1002),
    # What is too long is refused when its length is known: to stop there leaves nothing
    # unread, for which TCP would reset the connection, and might lose the close frame.
    "too long": (frame(TEXT, bytes(2**14 + 1))[:4], 1009),
    "all too long": (frame(TEXT, bytes(2**14), 0) + frame(CONTINUED, b"x")[:2], 1009),
}
WAYS_TO_LEAVE = {
    "closing": lambda peer: peer.send(CLOSE, b"\x03\xe8"),  # 1000
    "vanishing": Peer.vanish,
    "hanging up": lambda peer: peer.writer.write_eof(),
    "half a frame": lambda peer: (peer.writer.write(frame(TEXT)[:3]), peer.vanish()),
    "broken frame": lambda peer: peer.send(TEXT, b"\xff"),
    "too long": lambda peer: peer.say(LONGEST + "x"),
}
LEAVINGS = [*itertools.product(["idle", "behind", "paying"], WAYS_TO_LEAVE)]
COSTS = {  # so many of these cost 192 KiB
    "empty texts": (TEXT, b"", 3072),
    "long texts": (TEXT, bytes(2**14 - 64), 12),
    "questions": (BINARY, bytes(2**14 - 2**12), 12),
    "pings": (PING, b"", 48),
    "pongs": (PONG, b"", 48),
}
PASSES = {  # of the event loop: what is done in each, and how many writes 50 of them are
    "when they are quick": (int, 1, 24),
    "or none waits for the last": (partial(time.sleep, 0.01), 11, 50),
}
KEYS = {  # of who is here | of who comes: whether the name is taken over
    101: "k|k, k.1|k.1, k.1|k.2, k.9|k.10, k|k.1, k.-1|k, a.b.1|a.b.2, k.x|k.x.1, \n ü|\n ü.1",
    409: "k.2|k.1, k.1|k, k.1|k.-1, k|K, k|, |, |k, k.1|k.x",
}
TAKEOVERS = [(*it.split("|"), code) for code in KEYS for it in KEYS[code].split(", ")]
NAMES = ["Jill", "Jack", '<b a="1">&']  # of those who are there when asked for:
OPTIONS = ["Jill", "Jack", "&lt;b a=&quot;1&quot;&gt;&amp;"]
CONTENT = {
    "the page": (HERE / "chat.html").read_text("utf-8"),
    "the names": "\r\n".join(NAMES),
    "the options": "\r\n".join(f'<option value="{o}">{o}</option>' for o in OPTIONS),
}
NO_NAME = "A name: 1 to 32 printable characters, no colon"
ANSWERS = {
    (200, "the page"): "GET /; POST /; HEAD /; HEAD /?resetUsers=1",
    (200, "the options"): "GET /?getUsers=1; POST /?getUsers=1",
    (200, "the names"): "GET /?getUsers2=1; POST /?getUsers2=1",
    (403, "Only the operator may reset the users"): """
        GET /?resetUsers=1 X-Forwarded-For: ::1; GET /?resetUsers=1 Forwarded: for=127.0.0.1;
        GET /?resetUsers=1 x-forwarded-for: ::1; POST /?resetUsers=1 Via: 1.1 proxy;
        GET /?resetUsers=1 Sec-Fetch-Site: cross-site; POST /?resetUsers=1 Origin: null;
        GET /?resetUsers=1 Sec-Fetch-Site: same-site; GET /?resetUsers=1 Origin: http://a.org;
        GET /?resetUsers=1 Sec-Purpose: prefetch; GET /?resetUsers=1 X-Real-IP: ::1;
        GET /?resetUsers=1 Sec-Fetch-Site: same-origin; POST /?resetUsers=1 Origin: http://[;
        GET /?resetUsers=1 Host: example.com; GET /?resetUsers=1 Host: localhost.org""",
    (404, "404: Not Found"): "GET /chat",
    (405, "405: Method Not Allowed"): """
        PUT /; DELETE /?resetUsers=1; POST /ws?user=Joe; HEAD /ws?user=Joe""",
    (400, NO_NAME): """
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
NOT_TO_BE_SERVED = "--port=65536 --port=70000 --port=-1 --port=taken"
NOT_TO_BE_SERVED += " --host= --host=192.0.2.1 --host=a.invalid"
KINDS_OF_NAMES = ["Żółw 李雷", "🦀" * 32, "{{RefreshUsers}}", "山田\u3000太郎"]
KINDS_OF_NAMES += ["می\u200cخواهم", "👩\u200d💻"]


class TestProtocol:
    """What anybody sees who speaks HTTP and WebSocket with the server at `port`.

    It is a class for another server with this protocol to be held to: whoever imports it
    next to a fixture `port` of its own runs all of it against that.
    """

    # 1. A connection, from its beginning to its end

    async def test_who_is_dead_is_gone_within_45_seconds_but_no_talker(self, port):
        started = time.monotonic()
        jill, dead, gone = await login(port, "Jill", "Dead", "Gone")
        gone.stall()
        await flood(jill)
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

    @pytest.mark.parametrize("sent_and_answers", FRAMES.values(), ids=FRAMES)
    async def test_each_frame_is_answered_so(self, port, sent_and_answers):
        jill, jack = await login(port, "Jill", "Jack")
        sent, *answers = sent_and_answers
        jack.writer.write(sent)
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

    async def test_what_a_user_said_last_is_heard_by_all(self, port):
        jill, jack = await login(port, "Jill", "Jack")
        jack.say(*map(str, range(1000)))
        jack.writer.close()
        assert await jill.hear(1000) == [f"Jack: {i}" for i in range(1000)]

    @pytest.mark.parametrize("state, way", [*LEAVINGS, ("behind", "not")])
    async def test_whoever_leaves_leaves_the_name_free(self, port, state, way):
        jill, jack = await login(port, "Jill", "Jack")
        if state == "behind":
            jack.stall()
            await flood(jill)
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

    async def test_who_leaves_behind_has_2_seconds_for_what_is_under_way(self, port):
        jill, taker, refuser = await login(port, "Jill", "Taker", "Refuser")
        for peer in taker, refuser:
            peer.stall()
        await flood(jill)
        for peer in taker, refuser:
            peer.send(CLOSE)
        await jill.told("Jill")
        taker.resume()
        assert await taker.closed() == (1000, "")
        await asyncio.sleep(3.5)
        refuser.resume()
        assert not (await soon(refuser.reader.read())).endswith(b"\x88\x02\x03\xe8")

    # 2. A user, who may not talk too much

    @pytest.mark.parametrize("said", COSTS.values(), ids=COSTS)
    async def test_all_is_read_at_32_kib_a_second_after_128_kib(self, port, said):
        jack = await Peer.login(port, "Jack")
        await asyncio.sleep(0.5)  # which saves nothing up
        started = time.monotonic()
        jack.send(*said)
        jack.say("end")
        while await jack.receive() != (TEXT, b"Jack: end"):
            pass
        assert 1.9 < time.monotonic() - started < 10  # 2, if only the price took time

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

    # 3. The room: who is here, and what was said

    async def test_of_many_simultaneous_logins_for_one_name_one_gets_in(self, port):
        logins = (Peer.ask(port, "GET /ws?user=Jack", UPGRADE) for _ in range(50))
        statuses = [peer.status for peer in await asyncio.gather(*logins)]
        assert sorted(statuses) == [101] + 49 * [409]
        assert await users(port) == ["Jack"]

    @pytest.mark.parametrize("crowd, pause", [(0, 0.1), (300, 0.3)])
    async def test_the_larger_the_room_the_rarer_are_notices(self, port, crowd, pause):
        jill = await Peer.login(port, "Jill")
        await asyncio.gather(*(Peer.login(port, f"user{i}") for i in range(crowd)))
        started, notices = time.monotonic(), 0
        await jill.ping()
        while time.monotonic() < started + 1.5:
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

    # 4. Who reads slowly

    async def test_who_is_behind_gets_an_answer_in_order_with_the_messages(self, port):
        jill, jack = await login(port, "Jill", "Jack")
        place = await jack.where()
        jack.stall()
        said = await flood(jill, 14)
        jack.send(BINARY, count=2)
        await jill.ping()
        said += await flood(jill, 14)
        jack.resume()
        heard = await jack.hear(len(said) + 1)
        (answer,) = [i for i, text in enumerate(heard) if text.startswith("{{Here")]
        assert heard.pop(answer) == f"{{{{Here {place + answer}}}}}", "not where it is"
        assert heard == said and answer >= 14 * 8

    async def test_who_asked_with_after_is_told_of_a_hole_and_never_let_go(self, port):
        jill = await Peer.login(port, "Jill")
        jack = await Peer.login(port, "Jack", after=-1)
        place = await jack.here()
        jack.stall()
        said = await flood(jill, 80)  # 10 MiB
        jack.resume()
        heard = await jack.hear_to(said[-1])
        (hole,) = [i for i, text in enumerate(heard) if text.startswith("{{Here")]
        start = int(heard[hole][7:-2]) - place
        assert hole < start, "nothing was missing"
        assert hole < 6, "the kernel holds so much that a ping would come too late"
        assert heard[:hole] == said[:hole] and heard[hole + 1 :] == said[start:]
        assert 100 < len(said) - start < 150  # it went on with the newer half
        late = await Peer.login(port, "Joe", after=place)
        kept = said[await late.here() - place :]  # that is all, and no more
        size = sum(64 + 4 + len(text) for text in kept)
        assert 4 * 2**20 - 2**15 < size <= 4 * 2**20
        assert await late.hear(len(kept)) == kept

    # 5. Who comes back

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
    async def test_an_after_that_is_no_integer_counts_as_none(self, port, after):
        (jill,) = await login(port, "Jill")
        jill.say("before")
        await jill.hear()
        jack = await Peer.login(port, "Jack", after=after)
        jill.say("after")
        assert await jack.hear() == ["Jill: after"]

    async def test_a_question_is_answered_in_order_with_the_messages(self, port):
        jill, jack = await login(port, "Jill", "Jack")
        place = await jack.where()
        question = frame(BINARY, b"what it says does not matter")
        jack.writer.write(frame(TEXT, b"one") + frame(TEXT, b"two") + question)
        assert await jack.hear(2) == ["Jack: one", "Jack: two"]
        assert await jack.here() == place + 2
        jack.send(BINARY, count=30)  # may have one answer
        jack.say("end")
        *answers, _ = await jack.hear_to("Jack: end")
        assert {*answers} <= {f"{{{{Here {place + 2}}}}}"}
        assert await jill.hear(3) == ["Jack: one", "Jack: two", "Jack: end"]

    @pytest.mark.parametrize("before, key, status", TAKEOVERS)
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

    async def test_who_was_replaced_says_nothing_more(self, port):
        jill, old = await login(port, "Jill", "Jack", key="k.1")
        old.say(*[LONGEST] * 12)  # of which 8 are heard at once, and one in each 0.5 s
        await jill.hear(8)
        new = await Peer.login(port, "Jack", key="k.2", after=-100)
        old.say("too late")
        await new.here()
        heard = len(await new.hear(8))  # unasked
        new.send(BINARY)
        while await new.hear() == [f"Jack: {LONGEST}"]:
            heard += 1
        new.say(LONGEST, LONGEST, LONGEST, "end")  # for a second and a half
        texts = [f"Jack: {LONGEST}"] * (heard - 8 + 3)
        assert await jill.hear_to("Jack: end") == [*texts, "Jack: end"]

    async def test_to_take_ones_own_name_over_is_no_way_to_say_more(self, port):
        jill, jack = await login(port, "Jill", "Jack", key="k.0")
        started = time.monotonic()
        for turn in range(1, 20):
            jack.say(*[LONGEST] * 2)
            jack = await Peer.login(port, "Jack", key=f"k.{turn}")
        jack.say("end")
        *heard, _ = await jill.hear_to("Jack: end")
        assert len(heard) <= 8 + 2 * (time.monotonic() - started) + 1
        jack.send(CLOSE)
        await jill.told("Jill")  # and soon

    # 6. Who may come in, and who may throw out

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

    @pytest.mark.parametrize("host", ["127.0.0.1", "chat.example:8080", "[::1]:9"])
    @pytest.mark.parametrize("name", KINDS_OF_NAMES)
    async def test_a_page_of_this_host_gets_in_with_any_name(self, port, name, host):
        headers = {"Host": host, "Origin": f"https://{host.upper()}"}
        peer = await Peer.login(port, f" {name}\u3000", headers)
        assert await users(port) == [name]  # without the white space
        peer.say(LONGEST)
        assert await peer.hear() == [f"{name}: {LONGEST}"]

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
        await flood(silent)
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


# Chapters 3 to 6, as they are seen from inside the process


def watch(user):
    """Return a list which gets, for each write to a user, its size and what was held then."""
    writes, transport = [], user.transport

    def watched(data, write=transport.write):
        writes.append((len(data), transport.get_write_buffer_size()))
        write(data)

    transport.write = watched
    return writes


async def test_what_is_said_in_one_pass_leaves_in_one_write_a_user(port, room):
    jill, jack = await login(port, "Jill", "Jack")
    writes = watch(room.users["Jill"])
    jack.say(*["hello"] * 500)
    assert await jill.hear(500) == ["Jack: hello"] * 500
    assert len(writes) < 5


@pytest.mark.parametrize("work, least, most", PASSES.values(), ids=PASSES)
async def test_messages_of_several_passes_share_writes(port, room, work, least, most):
    jill, _ = await login(port, "Jill", "Jack")
    writes = watch(room.users["Jill"])
    for i in range(50):  # one in each pass of the event loop
        await room.say(room.users["Jack"], str(i).encode())
        work()
        await asyncio.sleep(0)
    assert await jill.hear(50) == [f"Jack: {i}" for i in range(50)]
    assert least <= len(writes) <= most


async def test_the_last_word_is_heard_and_none_after_it(port, room):
    jill, _ = await login(port, "Jill", "Jack")
    jack = room.users["Jack"]
    await room.say(jack, b"the last word")
    await room.close(1001, "the end")
    assert await jill.hear() == ["Jack: the last word"]
    assert await jill.closed() == (1001, "the end")
    await room.say(jack, b"too late")
    assert b"too late" not in b"".join(room.messages.values())


async def test_after_a_restart_no_number_comes_again():
    last = 0
    for _ in range(2):
        async with serving(chat.make_app()) as port:
            jill = await Peer.login(port, "Jill", after=last)
            assert await jill.here() > last
            jill.say("one", "two")
            await jill.hear(2)
            last = await jill.where()


async def test_to_who_reads_nothing_nothing_more_is_written_and_no_pong(port, room):
    jill, jack = await login(port, "Jill", "Jack")
    writes = watch(room.users["Jack"])
    jack.stall()
    await flood(jill, 8)
    jack.send(PING, b"?" * 125, 20)
    for i in range(1500):
        jill.say(str(i))
        await jill.hear()
    assert sum(held > 0 for _, held in writes) < 5
    writes.clear()
    jack.resume()  # and what is written then, is neither in tiny pieces nor in huge ones
    assert (await jack.hear(64 + 1500))[64:] == [f"Jill: {i}" for i in range(1500)]
    assert len(writes) < 100 and max(writes) < (2**16,)
    await jack.ping()


async def test_what_many_did_not_take_is_kept_once_and_not_for_ever(port, room):
    jill, *others = await login(port, "Jill", *map(str, range(20)))
    for peer in others:
        peer.stall()
    tracemalloc.start()
    await flood(jill)
    assert tracemalloc.get_traced_memory()[0] < 20 * 2**20  # copies would be 70 MiB
    tracemalloc.stop()
    user = weakref.ref(room.users["19"])
    jills = room.users["Jill"]  # who is not to be behind
    await until("quiet", lambda: not (room.announcing or jills.catching_up))
    for _ in range(70_000):  # empty ones, which need memory, too
        room.add(b"")
    await jill.told("Jill")
    await until("nothing needs a user who is gone", lambda: gc.collect() and not user())


async def test_reset_does_not_wait_for_who_took_half_of_a_batch(port, room):
    (jill,) = await login(port, "Jill")
    for i in range(16):  # one after the other, so one's kernel has no room for a text
        (await Peer.login(port, str(i))).stall()
        await room.say(room.users["Jill"], LONGEST.encode())
        await jill.hear()
    for size in 2**14, 2**14, 11_000, 2**14, 2**14, 2**14:  # the largest batch
        await room.say(room.users["Jill"], bytes(size))
    held = max(it.transport.get_write_buffer_size() for it in room.users.values())
    async with asyncio.timeout(5):
        reset = await Peer.ask(port, "GET /?resetUsers=1")
    assert reset.body == "Users reseted" and held > 2**15


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


# 7. Serving


async def test_who_has_not_taken_earlier_answers_may_not_log_in(port):
    statuses = []
    for pages in range(16):
        peer = await Peer.connect(port)
        peer.stall()
        for target in [*pages * ["/"], f"/ws?user=user{pages}"]:
            peer.request(f"GET {target}", UPGRADE)
        for _ in range(pages + 1):
            await users(port)  # by then, one request more is answered
        peer.resume()
        for _ in range(pages + 1):
            await peer.answered()
        statuses.append(peer.status)
    assert statuses[0] == 101 and 400 in statuses, statuses


async def test_who_asks_thousands_of_times_in_one_go_lets_others_in_between(port):
    jill, jack = await login(port, "Jill", "Jack")
    flooder = await Peer.connect(port)
    flooder.writer.write(b"GET /?getUsers2=1 HTTP/1.1\r\nHost: a.org\r\n\r\n" * 3000)
    await flooder.reader.readline()  # of the first answer
    jack.say("hello")
    assert await jill.hear() == ["Jack: hello"]
    assert (await flooder.reader.read(2**20)).count(b"200 OK") < 150


HANGUP = getattr(signal, "SIGHUP", signal.SIGINT)  # Windows has none
KNOWS_HANGUP = partial(signal.signal, HANGUP, signal.SIG_DFL)  # if these tests do not


@asynccontextmanager
async def running(folder, *options, program=HERE / "chat.py", prepare=KNOWS_HANGUP):
    """Run the program, which says its `port`, with its `log` in the folder."""
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, program, "--host", "127.0.0.1", "--port", "0", *options,
            preexec_fn=prepare if os.name == "posix" else None,
            stdout=asyncio.subprocess.PIPE, stderr=log,
        )  # fmt: skip
    try:
        greeting = (await soon(process.stdout.readline())).decode()
        address = re.search(r"http://127\.0\.0\.1:(\d+)", greeting)
        process.port = int(address[1]) if address else None
        process.log = (folder / "log").read_text
        yield process
    finally:
        Peer.abort_all()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def stopped(process):
    """Tell it to stop, and return its exit status."""
    process.terminate()
    return await soon(process.wait())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, HANGUP])
async def test_a_signal_closes_all_with_1001_and_ends_with_status_0(number, tmp_path):
    async with running(tmp_path) as process:
        jill, half, stalled = await login(process.port, "Jill", "Half", "Stalled")
        half.writer.write(frame(TEXT, b"hello")[:3])
        (await Peer.connect(process.port)).request("POST /", {"Content-Length": "9"})
        stalled.stall()
        await flood(jill)
        stalled.send(PING, b"?", 100_000)
        await Peer.login(process.port, "Late")
        process.send_signal(number)
        for peer in jill, half:
            assert await peer.closed() == (1001, "the server stops")
        assert await soon(process.wait()) == 0
    assert "Traceback" not in process.log()


@pytest.mark.parametrize("option", NOT_TO_BE_SERVED.split())
async def test_what_cannot_be_served_gives_one_line_and_status_1(option, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        option = option.replace("taken", str(listener.getsockname()[1]))
        async with running(tmp_path, option) as process:
            assert await soon(process.wait()) == 1
    assert re.fullmatch(r"Cannot serve .+\n", process.log())


async def test_the_log_has_a_line_for_each_coming_and_going_and_no_other(tmp_path):
    async with running(tmp_path) as process:
        port = process.port

        async def are_gone(request, headers):
            for _ in range(20):
                gone = await Peer.connect(port)
                gone.request(request, headers)
                gone.vanish()

        jill, jack = await login(port, "Jill", "Jack", key="secret.1")
        await Peer.login(port, "Jack", key="secret.2", after=-50)
        assert await jack.closed() == (1000, "logged in again elsewhere")
        (await Peer.login(port, "Jack", key="secret.2")).send(CLOSE)
        await jill.told("Jill")
        await Peer.login(port, "Jack", {"Sec-WebSocket-Protocol": "\xff"})
        await jill.told("Jill", "Jack")
        # Whoever is gone when it is their turn was never here.
        process.send_signal(signal.SIGSTOP)
        await are_gone("GET /ws?user=Gone", UPGRADE)
        await Peer.connect(port)  # by when the last of them is gone, too
        process.send_signal(signal.SIGCONT)
        assert (await Peer.ask(port, "\x16\x03\x01")).status == 400
        key = {"Sec-WebSocket-Key": "\xff"}
        assert (await Peer.ask(port, "GET /ws?user=Joe", UPGRADE | key)).status == 426
        folded = {"Content-Encoding": "gzip", "Content-Length": "8"}
        assert (await Peer.ask(port, "POST /", folded, "not gzip")).status == 200
        assert (await Peer.ask(port, "GET /", {"no header": ""})).status == 400
        await are_gone("GET /", {"Expect": "100-continue"})
        await Peer.ask(port, "GET /?resetUsers=1")
        assert await stopped(process) == 0
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
    nohup = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    async with running(tmp_path, prepare=nohup) as process:
        process.send_signal(signal.SIGHUP)
        await Peer.login(process.port, "Jack")
        assert await stopped(process) == 0


async def test_a_page_that_is_missing_is_500_and_in_the_log(tmp_path):
    program = shutil.copy(HERE / "chat.py", tmp_path)
    async with running(tmp_path, program=program) as process:
        assert (await Peer.ask(process.port, "GET /")).status == 500
        assert (await Peer.ask(process.port, "GET /?getUsers2=1")).status == 200
    assert re.search(r"Traceback[^\0]*FileNotFoundError.*chat\.html", process.log())


async def test_hundreds_can_connect_while_the_server_is_busy(tmp_path):
    async with running(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        await soon(asyncio.gather(*(Peer.connect(process.port) for _ in range(300))))


async def test_descriptors_are_used_up_before_newcomers_have_to_wait(tmp_path):
    from resource import RLIMIT_NOFILE, setrlimit  # not on Windows

    few = partial(setrlimit, RLIMIT_NOFILE, (64, 128))
    async with running(tmp_path, prepare=few) as process:
        jack, *_ = await login(process.port, *map(str, range(100)))
        crowd = [await Peer.connect(process.port) for _ in range(100)]
        jack.say("still here")
        assert await jack.hear() == ["0: still here"]
        await until("a line", lambda: "out of system resource" in process.log())
        for peer in crowd:
            peer.vanish()
        await Peer.login(process.port, "Jill")  # now that there is room again
        assert await stopped(process) == 0


async def test_the_readmes_smallest_chat_works(tmp_path):
    readme = (HERE / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.+?)```", readme, re.DOTALL)[1]
    assert code.count('host="localhost", port=8080)') == 1
    code = code.replace('host="localhost", port=8080', 'host="127.0.0.1", port=0')
    start = "import sys\nsys.stdout.reconfigure(line_buffering=True)  # for this pipe\n"
    (program := tmp_path / "smallest.py").write_text(start + code)
    async with running(tmp_path, program=program) as process:
        assert "new WebSocket(" in (await Peer.ask(process.port, "GET /")).body
        plain = {"Sec-WebSocket-Extensions": ""}
        jill = await Peer.login(process.port, "Jill", plain)
        jack = await Peer.login(process.port, "Jack", plain)
        jack.say("hello")
        assert await jill.hear() == await jack.hear() == ["Jack: hello"]


async def test_every_place_that_names_the_dependencies_says_the_same():
    requirement = (HERE / "requirements.txt").read_text().strip()
    for script in [Path(__file__), *HERE.glob("bonus/*.py")]:
        dependencies = re.findall('"(aiohttp[^"]*)"', script.read_text("utf-8"))
        assert dependencies[:1] in ([], [requirement]), script


# The page

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
fixture = pytest_asyncio.fixture(loop_scope="session")


class Tab:
    """A page, and what is on it, by the names that a screen reader says."""

    def __init__(self, page):
        self.page, self.run = page, page.evaluate
        self.sockets, self.errors = [], []
        page.on("websocket", lambda it: self.sockets.append(it))
        page.on("pageerror", lambda it: self.errors.append(str(it)))
        self.name, self.box = self("textbox", "User name"), self("textbox", "Message")
        self.enter, self.logoff = self("button", "Login"), self("button", "Log off")
        self.send, self.status = self("button", "Send"), self("status")
        self.refresh, self.notice = self("button", "Refresh users"), self("alert")
        self.list, self.log = self("list", "Users"), self("log")
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

    async def say(self, *texts):
        for text in texts:
            await self.box.fill(text)
            await self.box.press("Enter")

    async def hears(self, *texts):
        await expect(self.texts).to_have_text(texts)


@asynccontextmanager
async def chromium(*arguments, names=("chromium-headless-shell", "chromium")):
    """Playwright's own Chromium if it is there, else what the machine has."""
    version = [sys.executable, "-m", "playwright", "--version"]
    ran = await asyncio.to_thread(subprocess.run, version, capture_output=True)
    if ran.returncode or not expect:  # its own node may lack a library
        wanted = "playwright axe-playwright-python, apt install libatomic1"
        unable(f"Playwright does not start: pip install {wanted}")
    async with async_playwright() as player:
        names = *names, "chromium-browser", "google-chrome", "chrome"
        path = next(filter(None, map(shutil.which, names)), None)
        for options in {}, {"executable_path": path}, {"channel": "chrome"}:
            with suppress(Error):
                browser = await player.chromium.launch(args=arguments, **options)
                break
        else:
            unable("the page needs a browser: apt install chromium")
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def browser():
    async with chromium("--host-resolver-rules=MAP chat.test 127.0.0.1") as browser:
        yield browser


@pytest.mark.page
@pytest.mark.asyncio(loop_scope="session")
class WithPages:
    """What tests with pages share; a browser starts slowly, so that one does for all."""

    tab_class = Tab

    @fixture
    async def port(self):
        async with serving(chat.make_app()) as port:
            yield port

    @fixture
    async def url(self, port):
        return f"http://chat.test:{port}"  # plain http, and from another host

    @fixture
    async def jill(self, port):
        return await Peer.login(port, "Jill")

    @fixture
    async def tab(self, browser, url):
        """The page, not logged in; a test with errors on it fails."""
        async with await browser.new_page(base_url=url) as page:
            await page.goto("/")
            yield (tab := self.tab_class(page))
            assert tab.errors == []

    @fixture
    async def jack(self, tab):
        """The page of Jack, who is logged in."""
        await tab.login()
        return tab


class TestPage(WithPages):
    """The page in Chromium: what everybody meets who uses it."""

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
        async with asyncio.timeout(LIMIT):
            while await users(port) != [""]:  # the page does not wait for the server
                await asyncio.sleep(0.02)
        await tab.page.reload()
        await expect(tab.name).to_have_value("Jack")
        await tab.offline("")

    async def test_a_login_that_is_refused_says_why(self, tab, port):
        await Peer.login(port, "Joe")
        for name, why in ("Joe", "User Joe already logged in"), ("a:b", NO_NAME):
            await tab.name.fill(name)
            await tab.enter.click()
            await tab.offline(f"Not logged in: {why}")
        await tab.login()
        await expect(tab.notice).to_be_empty()

    async def test_who_comes_hears_the_last_50_and_no_time_of_them(self, tab, jill):
        jill.say(*map(str, range(60)))
        await jill.hear(60)
        await tab.login()
        await tab.say("hello")
        await tab.hears(*map(str, range(10, 60)), "hello")
        await expect(tab.times).to_have_count(1)

    async def test_a_reload_stays_logged_in_and_hears_all_again(self, jack, jill):
        await jack.say("hello")
        await jack.hears("hello")
        await jack.page.reload()
        await jack.online()
        await expect(jack.box).to_be_focused()
        jill.say("hi")
        await jack.hears("hello", "hi")
        await expect(jack.users).to_have_text(["Jill", "Jack"])

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

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    async def test_it_fits_all_screens_and_axe_finds_nothing(self, tab, port, scheme):
        back = "getComputedStyle(document.documentElement).backgroundColor"
        other = await tab.run(back)
        await tab.page.emulate_media(color_scheme=scheme)
        assert (await tab.run(back) == other) == (scheme == "light")
        over = """(({ scrollWidth, scrollHeight }) => [
            scrollX, scrollY, scrollWidth - innerWidth, scrollHeight - innerHeight
        ])(document.documentElement)"""

        async def check():
            for width, height in (667, 375), (2560, 1440), (1100, 700), (320, 568):
                await tab.page.set_viewport_size({"width": width, "height": height})
                assert await tab.run(over) == [0, 0, 0, 0], width
                for there in tab.box, tab.send, tab.enter, tab.logoff:
                    await expect(there).to_be_in_viewport(ratio=1)
                assert (await tab.log.bounding_box())["height"] > 100
                if width == (1100 if scheme == "light" else 320):
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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
