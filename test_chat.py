# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14,<4", "pytest", "pytest-aiohttp", "playwright", "axe-playwright-python",
# ]
# ///
"""What the chat promises: each test is one sentence of it, over real sockets.

The server runs in the test's own event loop, or as a process where signals and ports
matter; the page runs in a real Chromium.
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import playwright.async_api
import pytest
import pytest_asyncio
from aiohttp import ClientSession, ClientWebSocketResponse, TCPConnector, web
from aiohttp.test_utils import TestClient, TestServer
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, async_playwright, expect

import chat

pytestmark = pytest.mark.asyncio
HERE = Path(__file__).parent
REFRESH = "{{RefreshUsers}}"
LIMIT = 30  # seconds after which whatever is awaited is not going to happen
Chat = TestClient[web.Request, web.Application]
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10  # RFC 6455, section 5.2


class Server(TestServer):
    """A test server that lets handlers end by themselves, as web.run_app does."""

    async def _make_runner(self, **options: Any) -> web.AppRunner:
        return web.AppRunner(self.app, shutdown_timeout=1)


@pytest_asyncio.fixture
async def client(aiohttp_client):
    """A client of a chat that runs in this process; `room(client)` is its room."""
    server = Server(chat.make_app())
    return await aiohttp_client(server, connector=TCPConnector(limit=0))


def room(client: Chat) -> chat.Room:
    assert client.app is not None
    return client.app[chat.ROOM]


async def login(client: Chat, name: str, **options: Any) -> ClientWebSocketResponse:
    options.setdefault("max_msg_size", 2**23)
    async with asyncio.timeout(LIMIT):
        return await client.ws_connect("/ws", params={"user": name}, **options)


async def get(client: Chat, path: str, **options: Any) -> tuple[int, str]:
    response = await client.get(path, **options)
    return response.status, await response.text()


async def users(client: Chat) -> list[str]:
    return (await get(client, "/?getUsers2=1"))[1].split("\r\n")


async def until(condition: Callable[[], Any]) -> None:
    """Let everything run until `condition` holds."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.005)


async def hear(ws: ClientWebSocketResponse, count: int = 1) -> list[str]:
    """Return the next `count` messages, without the notices between them."""
    heard: list[str] = []
    async with asyncio.timeout(LIMIT):
        while len(heard) < count:
            if (text := await ws.receive_str()) != REFRESH:
                heard.append(text)
    return heard


async def notice(ws: ClientWebSocketResponse) -> None:
    async with asyncio.timeout(LIMIT):
        while await ws.receive_str() != REFRESH:
            pass


async def closing(ws: ClientWebSocketResponse) -> int | None:
    """Return the code that the server closes `ws` with."""
    async with asyncio.timeout(LIMIT):
        async for _ in ws:
            pass
    return ws.close_code


class Peer:
    """A WebSocket client that does only what it is told, so that it can misbehave."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def login(cls, port: int, name: str, headers: str = "") -> "Peer":
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", port))
        peer = cls(*await asyncio.open_connection(sock=connection))
        peer.writer.write(cls.handshake(port, name, headers))
        async with asyncio.timeout(LIMIT):
            peer.answer = (await peer.reader.readuntil(b"\r\n\r\n")).decode()
        return peer

    @staticmethod
    def handshake(port: int, name: str, headers: str) -> bytes:
        return (
            f"GET /ws?user={name} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{headers}\r\n"
        ).encode()

    answer = ""  # to the handshake

    @staticmethod
    def frame(opcode: int, payload: bytes = b"", first: int = 0x80) -> bytes:
        """Return a frame, masked with zeros; `first` has FIN and the reserved bits."""
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", first | opcode, 0x80 | size)
        elif size < 2**16:
            head = struct.pack("!BBH", first | opcode, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", first | opcode, 0x80 | 127, size)
        return head + bytes(4) + payload

    def send(self, opcode: int, payload: bytes = b"", first: int = 0x80) -> None:
        self.writer.write(self.frame(opcode, payload, first))

    async def receive(self) -> tuple[int, bytes]:
        """Return the opcode and the payload of the next frame that is no notice."""
        async with asyncio.timeout(LIMIT):
            while True:
                first, size = await self.reader.readexactly(2)
                for flag, width, least in (126, 2, 126), (127, 8, 2**16):
                    if size == flag:
                        size = int.from_bytes(await self.reader.readexactly(width))
                        assert size >= least  # the shortest way to say it
                        break
                payload = await self.reader.readexactly(size)
                if payload != REFRESH.encode():
                    return first, payload

    def stall(self) -> None:
        """Stop reading."""
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]

    def vanish(self) -> None:
        """Reset the connection, without a close frame."""
        linger = struct.pack("ii", 1, 0)
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


# The page and the lists


async def test_the_page_answers_get_head_and_post_and_is_never_cached(client):
    for method in "GET", "HEAD", "POST":
        response = await client.request(method, "/")
        body = await response.text()
        assert response.status == 200
        assert body == ("" if method == "HEAD" else chat.PAGE.read_text("utf-8"))
        assert response.content_type == "text/html"
        assert response.headers["Cache-Control"] == "no-store"


async def test_another_path_is_404_and_another_method_405(client):
    assert (await client.get("/chat")).status == 404
    assert (await client.put("/")).status == 405
    assert (await client.delete("/?resetUsers=1")).status == 405
    assert (await client.post("/ws?user=Jack")).status == 405
    assert (await client.head("/ws?user=Jack")).status == 405


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_get_users_lists_escaped_options_in_order_of_login(client, method):
    for name in "Jill", "Jack", '<b a="1">&':
        await login(client, name)
    response = await client.request(method, "/?getUsers=1")
    escaped = "&lt;b a=&quot;1&quot;&gt;&amp;"
    assert await response.text() == (
        '<option value="Jill">Jill</option>\r\n<option value="Jack">Jack</option>\r\n'
        f'<option value="{escaped}">{escaped}</option>'
    )
    assert response.content_type == "text/html"
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_get_users_2_lists_one_name_a_line(client, method):
    response = await client.request(method, "/?getUsers2=1")
    assert await response.text() == ""
    for name in "Jill", "Żółw", "<b>":
        await login(client, name)
    response = await client.request(method, "/?getUsers2=1")
    assert await response.text() == "Jill\r\nŻółw\r\n<b>"
    assert response.content_type == "text/plain"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


# The operator's reset


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_reset_closes_every_socket_with_1000_and_frees_the_names(client, method):
    sockets = [await login(client, name) for name in ("Jack", "Jill")]
    reset = asyncio.create_task(client.request(method, "/?resetUsers=1"))
    assert [await closing(ws) for ws in sockets] == [1000, 1000]
    response = await reset
    assert (response.status, await response.text()) == (200, "Users reseted")
    assert await users(client) == [""]
    await login(client, "Jack")


async def test_reset_takes_5_seconds_at_most_even_if_nobody_answers(client):
    silent = await Peer.login(client.port, "Silent")
    stalled = await Peer.login(client.port, "Stalled")
    stalled.stall()
    stalled.writer.write(Peer.frame(PING, bytes(125)) * 10_000)  # pongs pile up
    async with asyncio.timeout(5):
        assert await get(client, "/?resetUsers=1") == (200, "Users reseted")
    first, payload = await silent.receive()
    assert (first & 15, payload[:2]) == (CLOSE, struct.pack("!H", 1000))


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"x-forwarded-for": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Host": "example.com", "Origin": "http://example.com"},
        {"Host": "localhost.example.com"},
    ],
    ids=str,
)
async def test_reset_is_refused_through_a_proxy_or_from_another_site(client, headers):
    await login(client, "Jack")
    status, text = await get(client, "/?resetUsers=1", headers=headers)
    assert status == 403
    assert "Only the operator may reset the users" in text
    assert await users(client) == ["Jack"]


async def test_reset_is_refused_to_another_machine(aiohttp_client):
    peers = iter(["192.0.2.7", "2001:db8::7", "::1"])

    @web.middleware
    async def from_peer(request: web.Request, handler: Any) -> web.StreamResponse:
        return await handler(request.clone(remote=next(peers)))  # type: ignore[no-any-return]

    app = chat.make_app()
    app.middlewares.append(from_peer)
    client = await aiohttp_client(app)
    assert (await get(client, "/?resetUsers=1"))[0] == 403
    assert (await get(client, "/?resetUsers=1"))[0] == 403
    assert (await get(client, "/?resetUsers=1"))[0] == 200


async def test_reset_is_open_to_the_operators_own_page_and_command_line(client):
    for host in "localhost", "127.0.0.1", "[::1]":
        authority = f"{host}:{client.port}"
        page = {"Origin": f"http://{authority}", "Sec-Fetch-Site": "same-origin"}
        for headers in page, {"Sec-Fetch-Site": "none"}, {}:
            headers = {"Host": authority, **headers}
            answer = await get(client, "/?resetUsers=1", headers=headers)
            assert answer == (200, "Users reseted")


async def test_a_head_request_never_resets(client):
    await login(client, "Jack")
    await client.head("/?resetUsers=1")
    assert await users(client) == ["Jack"]


# Login


async def refusal(client: Chat, name: str, **options: Any) -> tuple[int, str]:
    """Return how a login is refused, after a look that a plain GET is told the same."""
    answer = await get(client, "/ws", params={"user": name}, **options)
    headers = {
        **options.pop("headers", {}),
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert await get(client, "/ws", params={"user": name}, headers=headers) == answer
    return answer


@pytest.mark.parametrize(
    "name",
    ["", "  ", "x" * 33, "a:b", "a\nb", "a\tb", "\u202eJack", "a\u2028b"],
    ids=ascii,
)
async def test_a_bad_name_is_refused_with_400(client, name):
    status, text = await refusal(client, name)
    assert status == 400
    assert "1 to 32 printable characters, no colon" in text


async def test_a_login_without_a_name_is_refused_with_400(client):
    assert (await get(client, "/ws"))[0] == 400


@pytest.mark.parametrize(
    "name",
    ["x", "x" * 32, "Jack Sparrow", "Олена", "李雷", "🦀" * 32, "{{RefreshUsers}}"],
)
async def test_a_name_may_have_any_script_and_is_trimmed(client, name):
    ws = await login(client, f" {name}\u3000")
    assert await users(client) == [name]
    await ws.send_str("hello")
    assert await hear(ws) == [f"{name}: hello"]


async def test_a_name_in_use_is_refused_with_409(client):
    ws = await login(client, "Jack")
    assert await refusal(client, " Jack ") == (409, "User Jack already logged in")
    await ws.send_str("still here")
    assert await hear(ws) == ["Jack: still here"]


@pytest.mark.parametrize("origin", ["http://example.com", "null", "http://127.0.0.1:1"])
async def test_a_page_of_another_site_is_refused_with_403(client, origin):
    status, text = await refusal(client, "Jack", headers={"Origin": origin})
    assert (status, text) == (403, "The pages of other sites may not log in")


async def test_a_page_of_this_host_logs_in_however_the_browser_addressed_it(client):
    for number, authority in enumerate(["127.0.0.1:8080", "chat.example", "[::1]:9"]):
        headers = {"Host": authority, "Origin": f"https://{authority.upper()}"}
        await login(client, str(number), headers=headers)


async def test_a_request_that_is_no_handshake_is_told_so_with_426(client):
    response = await client.get("/ws?user=Jack")
    assert response.status == 426
    assert response.headers["Upgrade"] == "websocket"
    assert response.headers["Sec-WebSocket-Version"] == "13"
    assert await response.text() == "Connect to this address with a WebSocket"
    assert await users(client) == [""]


@pytest.mark.parametrize("key", ["", "short", "AAAAAAAAAAAAAAAAAAAAAA\xe9="])
async def test_a_broken_handshake_is_told_so_with_426(client, key):
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(
        "GET /ws?user=Jack HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {key}\r\n\r\n".encode("latin1")
    )
    assert b" 426 " in await reader.readline()
    assert await users(client) == [""]


async def test_of_many_simultaneous_logins_for_one_name_one_gets_in(client):
    logins = [login(client, "Jack") for _ in range(50)]
    results = await asyncio.gather(*logins, return_exceptions=True)
    assert sum(isinstance(r, ClientWebSocketResponse) for r in results) == 1
    assert sum(getattr(r, "status", 0) == 409 for r in results) == 49
    assert await users(client) == ["Jack"]


@pytest.mark.parametrize("end", ["close", "vanish", "broken frame", "end of stream"])
async def test_the_name_is_free_at_once_however_its_user_leaves(
    client, end, monkeypatch
):
    monkeypatch.setattr(chat, "CLOSE_TIMEOUT", LIMIT)  # longer than the test may take
    peer = await Peer.login(client.port, "Jack")
    if end == "close":
        peer.send(CLOSE, struct.pack("!H", 1000))
    elif end == "vanish":
        peer.vanish()
    elif end == "broken frame":
        peer.send(TEXT, b"\xff")
    else:
        peer.writer.write_eof()
    started = time.monotonic()
    await until(lambda: not room(client).users)
    await login(client, "Jack")
    assert time.monotonic() - started < LIMIT / 2
    peer.writer.transport.abort()


async def test_a_user_who_waits_to_pay_and_vanishes_leaves_the_name_free(
    client, monkeypatch
):
    monkeypatch.setattr(
        chat, "RATE", 1
    )  # bytes a second: whoever waits, waits for days
    monkeypatch.setattr(chat, "BURST", 0)
    peer = await Peer.login(client.port, "Jack")
    listener = await login(client, "Jill")
    peer.send(TEXT, b"hello")
    assert await hear(listener) == ["Jack: hello"]
    peer.vanish()
    await until(lambda: list(room(client).users) == ["Jill"])


# Messages


async def test_a_message_goes_to_everyone_with_the_name_in_front(client):
    sockets = [await login(client, name) for name in ("Jack", "Jill", "Joe")]
    await sockets[0].send_str("hello: you\nthere")
    assert [await hear(ws) for ws in sockets] == [["Jack: hello: you\nthere"]] * 3


async def test_everyone_hears_everything_in_the_same_order(client):
    sockets = [await login(client, f"user{i}") for i in range(20)]

    async def talk(ws: ClientWebSocketResponse) -> None:
        for number in range(50):
            await ws.send_str(str(number))
            await asyncio.sleep(0)

    heard, *_ = await asyncio.gather(
        asyncio.gather(*(hear(ws, 1000) for ws in sockets)), *map(talk, sockets)
    )
    assert all(messages == heard[0] for messages in heard)
    for i in range(20):
        mine = [m for m in heard[0] if m.startswith(f"user{i}: ")]
        assert mine == [f"user{i}: {number}" for number in range(50)]


async def test_what_is_said_in_one_pass_leaves_in_one_write_a_user(client, monkeypatch):
    listener = await login(client, "Jill")
    batches: list[bytes] = []
    deliver = room(client).deliver
    monkeypatch.setattr(
        room(client), "deliver", lambda batch: (batches.append(batch), deliver(batch))
    )
    peer = await Peer.login(client.port, "Jack")
    await notice(listener)
    batches.clear()
    peer.writer.write(Peer.frame(TEXT, b"hello") * 500)
    assert await hear(listener, 500) == ["Jack: hello"] * 500
    assert len(batches) < 10
    assert b"".join(batches) == chat.frame(TEXT, b"Jack: hello") * 500


@pytest.mark.parametrize("size", [3, 125, 126, 2**16 - 1, 2**16, 2**20])
async def test_a_message_of_up_to_1_mib_arrives_whole(client, size):
    peer = await Peer.login(client.port, "J")
    text = b"x" * (size if size == 2**20 else size - 3)  # "J: " comes on top
    peer.send(TEXT, text)
    assert await peer.receive() == (0x80 | TEXT, b"J: " + text)


async def test_a_message_of_more_than_1_mib_closes_its_sender_with_1009(client):
    listener, ws = await login(client, "Jill"), await login(client, "Jack")
    await ws.send_str("x" * (2**20 + 1))
    assert await closing(ws) == 1009
    await listener.send_str("hello")
    assert await hear(listener) == ["Jill: hello"]


async def test_fragments_are_joined_with_pings_between_them(client):
    peer = await Peer.login(client.port, "Jack")
    peer.send(TEXT, "grüß".encode()[:3], first=0)  # splits the ü
    peer.send(PING, b"?")
    peer.send(0, "grüß".encode()[3:], first=0)
    peer.send(0, b" dich")
    assert await peer.receive() == (0x80 | PONG, b"?")
    assert await peer.receive() == (0x80 | TEXT, "Jack: grüß dich".encode())


async def test_binary_frames_are_ignored(client):
    ws = await login(client, "Jack")
    await ws.send_bytes(b"\xff\xfe")
    await ws.send_str("hello")
    assert await hear(ws) == ["Jack: hello"]


async def test_no_frame_is_compressed_even_if_the_client_offers_it(client):
    offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
    peer = await Peer.login(client.port, "Jack", offer)
    assert "Sec-WebSocket-Extensions" not in peer.answer
    peer.send(TEXT, b"hello")
    assert await peer.receive() == (0x80 | TEXT, b"Jack: hello")


@pytest.mark.parametrize(
    "broken, code",
    [
        (Peer.frame(TEXT, b"\xff"), 1007),
        (Peer.frame(TEXT, b"\xed\xa0\x80"), 1007),  # a lone surrogate
        (Peer.frame(TEXT, b"x", first=0xC0), 1002),  # a reserved bit
        (Peer.frame(3, b"x"), 1002),  # a reserved opcode
        (Peer.frame(0, b"x"), 1002),  # a continuation of nothing
        (Peer.frame(PING, b"x", first=0), 1002),  # a control frame in fragments
        (Peer.frame(PING, bytes(126)), 1002),  # a control frame too long
        (Peer.frame(TEXT, b"x", 0) + Peer.frame(TEXT, b"y"), 1002),  # no continuation
        (Peer.frame(CLOSE, b"x"), 1002),  # half a close code
        (Peer.frame(TEXT, bytes(2**20), 0) + Peer.frame(0, b"x"), 1009),
    ],
)
async def test_a_broken_frame_closes_its_sender_and_reaches_nobody(
    client, broken, code
):
    listener = await login(client, "Jill")
    peer = await Peer.login(client.port, "Jack")
    peer.send(TEXT, b"before")
    peer.writer.write(broken + Peer.frame(TEXT, b"after"))
    assert await peer.receive() == (0x80 | TEXT, b"Jack: before")
    assert await peer.receive() == (0x80 | CLOSE, struct.pack("!H", code))
    assert "Jack" not in room(client).users
    await listener.send_str("well")
    assert await hear(listener, 2) == ["Jack: before", "Jill: well"]


async def test_what_a_user_said_last_arrives_even_if_the_connection_ends(client):
    listener = await login(client, "Jill")
    peer = await Peer.login(client.port, "Jack")
    peer.writer.write(b"".join(Peer.frame(TEXT, b"%d" % i) for i in range(1000)))
    peer.writer.close()
    assert await hear(listener, 1000) == [f"Jack: {i}" for i in range(1000)]


# Notices


async def test_a_notice_follows_each_login_and_leaving_when_the_list_is_right(client):
    jack = await login(client, "Jack")
    await notice(jack)
    assert await users(client) == ["Jack"]
    jill = await login(client, "Jill")
    await notice(jack)
    assert await users(client) == ["Jack", "Jill"]
    await jill.close()
    await notice(jack)
    assert await users(client) == ["Jack"]


async def test_changes_one_after_the_other_share_notices(client):
    jack = await login(client, "Jack")
    for i in range(100):
        await login(client, f"user{i}")
    await jack.send_str("all here")
    notices = 0
    async with asyncio.timeout(LIMIT):
        while (text := await jack.receive_str()) != "Jack: all here":
            notices += text == REFRESH
    assert notices < 50
    await notice(jack)


async def test_500_users_joining_at_once_all_get_in_with_few_notices(client):
    assert chat.NOTICE_DELAY <= 0.2
    names = [f"user{i}" for i in range(500)]
    sockets = await asyncio.gather(*(login(client, name) for name in names))
    assert sorted(await users(client)) == sorted(names)
    await sockets[0].send_str("all here")
    notices = 0
    async with asyncio.timeout(LIMIT):
        while (text := await sockets[0].receive_str()) != "user0: all here":
            notices += text == REFRESH
    assert notices < 100
    await asyncio.gather(*map(notice, sockets[1:]))  # nobody is left out


# Nobody holds up anybody


@pytest.fixture
def no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let users talk as much as they like."""
    monkeypatch.setattr(chat, "RATE", 2**40)


async def test_a_user_more_than_4_mib_behind_is_let_go_and_others_notice_nothing(
    client, no_rate, caplog
):
    assert chat.MAX_BEHIND == 4 * 2**20
    caplog.set_level("INFO", "chat")
    jack, jill = await login(client, "Jack"), await login(client, "Jill")
    stalled = await Peer.login(client.port, "Stalled")
    stalled.stall()
    behind = room(client).users["Stalled"].transport.get_write_buffer_size
    backlog = said = 0
    while "Stalled" in room(client).users:
        await jack.send_str("x" * 100_000)
        said += 1
        assert len((await hear(jill))[0]) == len("Jack: ") + 100_000
        backlog = max(backlog, behind())
        assert said < 1000
    assert backlog <= 4 * 2**20
    assert "Stalled was let go: too far behind, 2 left" in caplog.text
    assert len(await hear(jack, said)) == said
    await until(lambda: not behind())


async def test_a_batch_is_bounded_however_many_talk_at_once(client, monkeypatch):
    batches: list[bytes] = []
    monkeypatch.setattr(room(client), "deliver", batches.append)
    for peer in [await Peer.login(client.port, f"user{i}") for i in range(16)]:
        peer.send(TEXT, b"x" * 10**6)
    await until(lambda: sum(map(len, batches)) > 16 * 10**6)
    assert max(map(len, batches)) < chat.MAX_BATCH + chat.MAX_MESSAGE + 1000
    assert chat.MAX_BATCH + chat.MAX_MESSAGE < chat.MAX_BEHIND


async def test_a_user_who_talks_too_much_is_slowed_and_nothing_is_dropped(
    client, monkeypatch
):
    assert (chat.RATE, chat.BURST) == (256 * 2**10, 2**20)
    monkeypatch.setattr(chat, "BURST", 2**16)
    listener = await login(client, "Jill")
    peer = await Peer.login(client.port, "Flooder")
    frames = [Peer.frame(TEXT, b"%06d " % i + bytes(90)) for i in range(2000)]
    started = time.monotonic()
    peer.writer.write(b"".join(frames))
    said = 0
    for i in range(2000):
        text = (await hear(listener))[0]
        assert text.startswith(f"Flooder: {i:06d} ")
        said += len(text) + chat.OVERHEAD
        allowed = chat.BURST + chat.RATE * (time.monotonic() - started)
        assert said <= allowed + 2 * (len(text) + chat.OVERHEAD)


async def test_others_are_heard_while_somebody_floods(client, monkeypatch):
    monkeypatch.setattr(chat, "BURST", 2**16)
    jill = await login(client, "Jill")
    peer = await Peer.login(client.port, "Flooder")
    peer.writer.write(Peer.frame(TEXT, b"x" * 1000) * 500)
    await hear(jill)
    await jill.send_str("may I?")
    before = 1
    while (await hear(jill))[0] != "Jill: may I?":
        before += 1
    assert before < 400  # of 500: the flood is far from its end
    await hear(jill, 500 - before)


async def test_pings_are_not_free_either(client, monkeypatch):
    monkeypatch.setattr(chat, "BURST", 2**12)
    peer = await Peer.login(client.port, "Jack")
    started = time.monotonic()
    peer.writer.write(Peer.frame(PING, b"?") * 3000)
    for answered in range(3000):
        assert await peer.receive() == (0x80 | PONG, b"?")
        allowed = chat.BURST + chat.RATE * (time.monotonic() - started)
        assert answered * (1 + chat.OVERHEAD) <= allowed


async def test_10_000_short_messages_sent_in_one_go_all_arrive(client):
    listener = await login(client, "Jill")
    peer = await Peer.login(client.port, "Jack")
    peer.writer.write(b"".join(Peer.frame(TEXT, b"%d" % i) for i in range(10_000)))
    assert await hear(listener, 10_000) == [f"Jack: {i}" for i in range(10_000)]


async def test_a_user_whose_network_died_is_gone_within_45_seconds(client, monkeypatch):
    rounding = 1  # second, which aiohttp may add to each of the two waits
    assert 1.5 * chat.HEARTBEAT + 2 * rounding < 45
    monkeypatch.setattr(chat, "HEARTBEAT", 0.2)
    alive = await login(client, "Jill")
    dead = await Peer.login(client.port, "Jack")
    listening = asyncio.create_task(hear(alive))  # aiohttp's client answers the pings
    await until(lambda: list(room(client).users) == ["Jill"])
    assert (await dead.receive())[0] == 0x80 | PING
    await alive.send_str("hello")
    assert await listening == ["Jill: hello"]


async def test_who_leaves_without_reading_is_cut_off(client, no_rate, monkeypatch):
    monkeypatch.setattr(chat, "CLOSE_TIMEOUT", 0.2)
    peer = await stall(client, "Jack")
    transport = room(client).users["Jack"].transport
    peer.send(CLOSE, struct.pack("!H", 1000))
    await until(lambda: not transport.get_write_buffer_size())


async def test_a_slow_reader_gets_everything_in_order_in_the_end(client, no_rate):
    slow = await Peer.login(client.port, "Slow")
    jack = await login(client, "Jack")
    slow.stall()
    behind = room(client).users["Slow"].transport.get_write_buffer_size
    said = 0
    while behind() < 2**20:  # more than the kernel takes
        await jack.send_str(f"{said} " + "x" * 100_000)
        await hear(jack)
        said += 1
    slow.writer.transport.resume_reading()
    for number in range(said):
        text = (await slow.receive())[1]
        assert text.startswith(b"Jack: %d " % number)


async def test_who_was_let_go_is_heard_no_more(client, monkeypatch):
    listener = await login(client, "Jill")
    peer = await Peer.login(client.port, "Jack")
    peer.writer.write(Peer.frame(TEXT, bytes(1000)) * 2000)  # paid for in 4 s
    await hear(listener, 1000)
    user = room(client).users["Jack"]
    said: list[bytes] = []
    monkeypatch.setattr(room(client), "say", said.append)
    room(client).leave(user, "was let go")
    user.transport.abort()
    await until(lambda: user.closed)
    assert all(frame == chat.REFRESH_USERS for frame in said)


async def stall(client: Chat, name: str) -> Peer:
    """Log in somebody who reads nothing, and fill the buffers on the way there."""
    peer = await Peer.login(client.port, name)
    peer.stall()
    talker = await login(client, "Talker")
    while not room(client).users[name].transport.get_write_buffer_size() > 2**17:
        await talker.send_str("x" * 100_000)
        await hear(talker)
    await talker.close()
    return peer


@pytest.mark.parametrize("size", [1, 2**20 + 1])
async def test_who_reads_nothing_and_breaks_the_protocol_leaves_the_name_free(
    client, no_rate, size
):
    peer = await stall(client, "Jack")
    peer.send(TEXT, b"\xff" * size)
    await until(lambda: not room(client).users)


async def test_who_reads_nothing_and_hangs_up_leaves_the_name_free(client, no_rate):
    peer = await stall(client, "Jack")
    peer.writer.write_eof()
    await until(room(client).users["Jack"].transport.is_closing)
    await login(client, "Jack")


async def test_who_takes_no_pongs_is_let_go_like_who_takes_no_messages(
    client, no_rate, monkeypatch
):
    monkeypatch.setattr(chat, "MAX_BEHIND", 2**16)
    peer = await Peer.login(client.port, "Jack")
    peer.stall()
    pings = Peer.frame(PING, bytes(125)) * 100
    while "Jack" in room(client).users:
        peer.writer.write(pings)
        await asyncio.sleep(0)


# The process


@asynccontextmanager
async def server(*options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `chat.py` with `options` until it has said where it is."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "chat.py"), *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    assert process.stdout
    try:
        async with asyncio.timeout(LIMIT):
            process.greeting = (await process.stdout.readline()).decode()
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def outcome(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Return the exit status of `process`, and what it wrote to stderr."""
    async with asyncio.timeout(LIMIT):
        stderr = (await process.communicate())[1].decode()
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_closes_every_socket_with_1001_and_ends_with_status_0(number):
    port = free_port()
    async with server("--port", str(port)) as process, ClientSession() as session:
        ws = await session.ws_connect(f"http://localhost:{port}/ws?user=Jack")
        silent = await Peer.login(port, "Silent")  # never answers the close
        _, half = await asyncio.open_connection("localhost", port)
        half.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        started = time.monotonic()
        process.send_signal(number)
        assert await closing(ws) == 1001
        first, payload = await silent.receive()
        assert (first & 15, payload[:2]) == (CLOSE, struct.pack("!H", 1001))
        status, stderr = await outcome(process)
        assert time.monotonic() - started < 5
        assert status == 0
        assert "Traceback" not in stderr


async def test_the_start_tells_the_address_to_open():
    port = free_port()
    async with server("--host", "127.0.0.1", "--port", str(port)) as process:
        assert f"http://127.0.0.1:{port}" in process.greeting


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "99999999"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--host", "192.0.2.1"],  # not an address of this machine (RFC 5737)
        ["--host", "nowhere.invalid"],
        ["--port", "taken"],
    ],
    ids=" ".join,
)
async def test_an_address_that_cannot_be_served_gives_one_line_and_a_bad_status(
    options,
):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        options = [taken if option == "taken" else option for option in options]
        async with server(*options) as process:
            status, stderr = await outcome(process)
    assert status not in (0, None)
    assert re.fullmatch(r"chat\.py: .+\n", stderr)


async def test_the_log_has_a_line_for_each_coming_and_going_and_no_other():
    port = free_port()
    async with server("--port", str(port)) as process, ClientSession() as session:
        url = f"http://localhost:{port}"
        jack = await session.ws_connect(f"{url}/ws?user=Jack")
        jill = await session.ws_connect(f"{url}/ws?user=Jill")
        await jill.close()
        await jack.send_bytes(bytes(2**20 + 1))
        await closing(jack)
        await (await session.get(url)).read()
        folded = {"Content-Encoding": "gzip"}
        async with session.post(url, data=b"not gzip", headers=folded) as response:
            assert response.status == 200  # nobody tries to unfold it
        reader, writer = await asyncio.open_connection("localhost", port)
        writer.write(b"GET / HTTP/1.1\r\nthis is not a header\r\n\r\n")
        assert b"400 Bad Request" in await reader.readline()
        joe = await session.ws_connect(f"{url}/ws?user=Joe")
        await session.get(f"{url}/?resetUsers=1")
        await closing(joe)
        (await Peer.login(port, "Ann")).vanish()
        async with asyncio.timeout(LIMIT):
            while await (await session.get(f"{url}/?getUsers2=1")).text():
                pass
        for _ in range(30):  # gone before they are answered
            _, gone = await asyncio.open_connection("localhost", port)
            gone.write(Peer.handshake(port, "Gone", "Sec-WebSocket-Protocol: x\r\n"))
            gone.close()
            await (await session.get(url)).read()
        process.terminate()
        _, stderr = await outcome(process)
    stderr = re.sub(r".* Gone .*\n", "", stderr)
    # each line begins with the date and the time
    assert [line.split(" ", 2)[2] for line in stderr.splitlines()] == [
        "Jack logged in, 1 here",
        "Jill logged in, 2 here",
        "Jill logged off, 1 left",
        "Jack was let go: Message size 1048577 exceeds limit 1048577, 0 left",
        "Joe logged in, 1 here",
        "Joe was let go: the users were reset, 0 left",
        "Ann logged in, 1 here",
        "Ann lost the connection, 0 left",
    ]


async def test_without_descriptors_left_those_inside_talk_on_and_the_log_is_not_filled():
    port = free_port()
    few = f"ulimit -n 40; exec {sys.executable} {HERE / 'chat.py'} --port {port}"
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", few, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout
    async with asyncio.timeout(LIMIT):
        await process.stdout.readline()
    inside = await Peer.login(port, "Jack")
    crowd = [await asyncio.open_connection("localhost", port) for _ in range(60)]
    inside.send(TEXT, b"still here")
    assert await inside.receive() == (0x80 | TEXT, b"Jack: still here")
    for _, writer in crowd:
        writer.transport.abort()
    await Peer.login(port, "Jill")  # once there is room again
    process.terminate()
    status, stderr = await outcome(process)
    assert status == 0
    assert "socket.accept" not in stderr  # asyncio's, with a traceback each


async def test_every_place_that_names_the_dependencies_says_the_same():
    requirement = (HERE / "requirements.txt").read_text().strip()
    assert re.fullmatch(r"aiohttp>=3\.\d+,<4", requirement)
    for script in "chat.py", "test_chat.py":
        assert f'"{requirement}"' in (HERE / script).read_text("utf-8")


# The page


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Playwright's own Chromium if it is there, else what the machine has."""
    async with async_playwright() as player:
        names = "chromium", "chromium-browser", "google-chrome", "chrome"
        path = next(filter(None, map(shutil.which, names)), None)
        for options in {}, {"executable_path": path}, {"channel": "chrome"}:
            with suppress(playwright.async_api.Error):
                browser = await player.chromium.launch(**options)
                yield browser
                await browser.close()
                return
    missing = (
        "the page's tests need a browser: apt install chromium, or playwright install"
    )
    (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


@pytest_asyncio.fixture
async def browser():
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture
async def page(browser, client):
    """The page of `client`'s chat, not logged in; a test with errors on it fails."""
    page = await browser.new_page(base_url=str(client.make_url("/")))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: "Content Security" in m.text and errors.append(m.text))
    await page.goto("/")
    yield page
    assert errors == []


def name_box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="User name")


def message_box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message")


def messages(page: Page) -> Locator:
    return page.get_by_role("log", name="Messages").locator(":scope > *")


async def enter(page: Page, name: str = "Jack") -> None:
    await name_box(page).fill(name)
    await name_box(page).press("Enter")
    await expect(page.get_by_role("status")).to_have_text("Online")


async def test_enter_in_the_name_logs_in_and_the_cursor_is_in_the_message_box(
    page, client
):
    button = page.get_by_role
    await expect(page.get_by_role("status")).to_have_text("Offline")
    await expect(button("button", name="Log off")).to_be_disabled()
    await expect(button("button", name="Send")).to_be_disabled()
    await enter(page)
    await expect(message_box(page)).to_be_focused()
    await expect(button("button", name="Login")).to_be_disabled()
    await expect(button("button", name="Log off")).to_be_enabled()
    assert list(room(client).users) == ["Jack"]


async def test_enter_sends_shift_enter_breaks_the_line_and_an_imes_enter_does_neither(
    page,
):
    await enter(page)
    box = message_box(page)
    await box.type("one")
    await box.press("Shift+Enter")
    await box.type("two")
    await box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    await expect(box).to_have_value("one\ntwo")
    await box.press("Enter")
    await expect(box).to_have_value("")
    await box.press("Enter")  # sends nothing
    await box.fill("three")
    await page.get_by_role("button", name="Send").click()
    await expect(messages(page).locator("p")).to_have_text(["one\ntwo", "three"])
    assert await messages(page).locator("p").first.inner_text() == "one\ntwo"


async def test_a_message_shows_its_author_and_time_and_ones_own_look_different(
    page, client
):
    await enter(page)
    jill = await login(client, "Jill")
    await jill.send_str("hello: you\nJack: I am not Jack")
    await message_box(page).fill("hi")
    await message_box(page).press("Enter")
    await expect(messages(page)).to_have_count(2)
    theirs, own = messages(page).nth(0), messages(page).nth(1)
    await expect(theirs.locator("b")).to_have_text("Jill")
    await expect(theirs.locator("p")).to_have_text("hello: you\nJack: I am not Jack")
    await expect(own.locator("b")).to_have_text("Jack")
    stamp = await own.locator("time").get_attribute("datetime")
    assert abs(datetime.fromisoformat(stamp).timestamp() - time.time()) < LIMIT
    colour = "e => getComputedStyle(e).backgroundColor"
    assert await theirs.evaluate(colour) != await own.evaluate(colour)
    # the second line is inside Jill's box, to the right of where authors stand out
    box = "e => e.getBoundingClientRect().bottom"
    assert await theirs.evaluate(box) >= await theirs.locator("p").evaluate(box)


async def test_markup_stays_text_in_messages_and_in_names(page, client):
    evil = '<img src=x onerror="document.title=1">'[:32]
    jill = await login(client, evil)
    await enter(page)
    await jill.send_str("<b>bold</b> &amp; <script>document.title=2</script>")
    await expect(messages(page).locator("b")).to_have_text([evil])
    await expect(messages(page).locator("p")).to_have_text(
        ["<b>bold</b> &amp; <script>document.title=2</script>"]
    )
    await expect(page.get_by_role("option")).to_have_text([evil, "Jack"])
    await expect(page).to_have_title("Chat")


async def test_the_log_follows_its_end_and_stays_put_while_one_reads_back(page, client):
    at_end = "e => e.scrollHeight - e.scrollTop - e.clientHeight < 5"
    log = page.get_by_role("log")
    await enter(page)
    jill = await login(client, "Jill")
    for i in range(1000):
        await jill.send_str(f"number {i}")
    await expect(messages(page)).to_have_count(1000)
    assert await log.evaluate(at_end)
    await page.set_viewport_size({"width": 900, "height": 400})
    assert await log.evaluate(at_end)
    read = messages(page).filter(has_text="number 700")
    await read.scroll_into_view_if_needed()
    place = "e => e.getBoundingClientRect().top"
    where = await read.evaluate(place)
    for i in range(1000, 1200):  # each pushes out one of the first
        await jill.send_str(f"number {i}")
    await expect(messages(page).last).to_contain_text("number 1199")
    assert abs(await read.evaluate(place) - where) < 1  # pixel
    await log.press("End")
    await log.evaluate(
        f"async e => {{ while (!({at_end})(e)) await new Promise(requestAnimationFrame) }}"
    )
    await jill.send_str("last")
    await expect(messages(page).last).to_contain_text("last")
    assert await log.evaluate(at_end)


async def test_a_storm_of_10_000_messages_is_drawn_by_the_frame_and_1_000_are_kept(
    page, client
):
    await enter(page)
    peer = await Peer.login(client.port, "Storm")
    await page.evaluate(
        """() => {
            window.drawings = 0;
            new MutationObserver(() => drawings++).observe(
                document.querySelector("[role=log]"), {childList: true});
        }"""
    )
    peer.writer.write(b"".join(Peer.frame(TEXT, b"%d" % i) for i in range(10_000)))
    await message_box(page).fill("still here")  # while it storms
    await message_box(page).press("Enter")
    await expect(messages(page).filter(has_text="9999")).to_have_count(1)
    await expect(messages(page)).to_have_count(1000)
    assert await page.evaluate("drawings") < 1000


async def test_a_login_that_fails_says_why_in_the_servers_words(page, client):
    await login(client, "Jack")
    await name_box(page).fill("Jack")
    await page.get_by_role("button", name="Login").click()
    await expect(page.get_by_role("alert")).to_contain_text(
        "User Jack already logged in"
    )
    await expect(page.get_by_role("status")).to_have_text("Offline")
    await name_box(page).fill("a:b")
    await page.get_by_role("button", name="Login").click()
    await expect(page.get_by_role("alert")).to_contain_text("1 to 32 printable")
    await enter(page, "Jill")
    await expect(page.get_by_role("alert")).to_be_empty()


async def test_a_lost_connection_is_said_and_comes_back_without_losing_the_draft(
    browser,
):
    port = free_port()
    page = await browser.new_page()
    async with server("--port", str(port)):
        await page.goto(f"http://localhost:{port}")
        await enter(page)
        await message_box(page).fill("half typed")
    await expect(page.get_by_role("status")).to_have_text("Offline")
    await expect(page.get_by_role("alert")).to_contain_text("connection is lost")
    await message_box(page).press("Enter")
    async with server("--port", str(port)):
        await expect(page.get_by_role("status")).to_have_text("Online", timeout=20_000)
        await expect(page.get_by_role("alert")).to_be_empty()
        await expect(message_box(page)).to_have_value("half typed")
        await message_box(page).press("Enter")
        await expect(messages(page).locator("p")).to_have_text(["half typed"])


async def test_a_login_without_a_server_says_so(browser):
    port = free_port()
    page = await browser.new_page()
    async with server("--port", str(port)):
        await page.goto(f"http://localhost:{port}")
    await name_box(page).fill("Jack")
    await name_box(page).press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("server does not answer")


async def test_a_page_comes_back_once_its_own_lost_connection_frees_the_name(
    page, client
):
    await enter(page)
    user = room(client).users.pop("Jack")
    ghost = await login(client, "Jack")  # as the server may take it for, for 45 s
    user.transport.abort()
    await expect(page.get_by_role("alert")).to_contain_text("connection is lost")
    async with page.expect_response("**/ws?user=Jack") as refused:
        pass
    assert (await refused.value).status == 409
    await ghost.close()
    await expect(page.get_by_role("status")).to_have_text("Online", timeout=20_000)


@pytest.mark.parametrize("end", ["log off", "reset", "too long"])
async def test_after_a_log_off_or_being_let_go_the_page_does_not_come_back(
    page, client, end
):
    await page.clock.install()
    await enter(page)
    if end == "log off":
        await page.get_by_role("button", name="Log off").click()
        await expect(page.get_by_role("alert")).to_be_empty()
    elif end == "reset":
        await get(client, "/?resetUsers=1")
        await expect(page.get_by_role("alert")).to_contain_text("users were reset")
    else:
        await room(client).users["Jack"].close(code=1009)
        await expect(page.get_by_role("alert")).to_contain_text("too long")
    await expect(page.get_by_role("status")).to_have_text("Offline")
    await page.clock.run_for(60_000)
    await expect(page.get_by_role("status")).to_have_text("Offline")
    assert not room(client).users
    await enter(page)


async def test_the_pauses_between_tries_grow_to_10_seconds_at_most(page, client):
    await page.add_init_script(
        """pauses = []; const set = setTimeout;
        setTimeout = (f, pause) => { pauses.push(pause); return set(f, 0); }"""
    )
    await page.reload()
    await enter(page)
    await page.route("**/ws?*", lambda route: route.abort())
    await page.route_web_socket(re.compile("/ws"), lambda ws: ws.close(code=1011))
    room(client).users["Jack"].transport.abort()
    pauses: list[float] = []
    async with asyncio.timeout(LIMIT):
        while len(pauses) < 10:
            pauses = await page.evaluate("pauses.slice(0, 10)")
    assert pauses[0] <= 500 and 5000 <= pauses[-1] <= 10_000
    assert len(set(pauses)) == 10  # jitter


async def test_the_title_counts_what_came_while_the_tab_was_hidden(page, client):
    await enter(page)
    jill = await login(client, "Jill")
    look = """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    await jill.send_str("seen")
    await expect(messages(page)).to_have_count(1)
    await expect(page).to_have_title("Chat")
    await page.evaluate(look, True)
    await jill.send_str("one")
    await jill.send_str("two")
    await expect(page).to_have_title("(2) Chat")
    await page.evaluate(look, False)
    await expect(page).to_have_title("Chat")


async def test_the_name_is_remembered_on_this_browser(page):
    await enter(page)
    await page.reload()
    await expect(name_box(page)).to_have_value("Jack")


async def test_the_list_shows_the_users_and_their_number(page, client):
    await enter(page)
    jill = await login(client, "Jill")
    options = page.get_by_role("listbox", name="Users").get_by_role("option")
    await expect(options).to_have_text(["Jack", "Jill"])
    await expect(page.get_by_role("heading", name="Users")).to_have_text("Users 2")
    await jill.close()
    await expect(options).to_have_text(["Jack"])


async def test_the_lists_are_never_asked_for_twice_at_once(page):
    asked: list[Any] = []
    await page.route("**/?getUsers2=1", lambda route: asked.append(route))
    refresh = page.get_by_role("button", name="Refresh users")
    for _ in range(5):
        await refresh.click()
    assert len(asked) == 1
    await asked[0].fulfill(body="Jack")
    await expect(page.get_by_role("option")).to_have_text(["Jack"])
    await until(lambda: len(asked) == 2)  # one more after the last press
    await asked[1].fulfill(body="Jack\r\nJill")
    await expect(page.get_by_role("option")).to_have_text(["Jack", "Jill"])
    assert len(asked) == 2


async def test_the_message_box_takes_no_more_than_the_server_would(page, client):
    await enter(page)
    await message_box(page).fill("é" * (2**19 + 1))
    await expect(message_box(page)).to_have_value("é" * 2**19)
    await expect(page.get_by_role("alert")).to_contain_text("1 MiB")
    await message_box(page).press("Enter")
    await expect(messages(page)).to_have_count(1)
    await expect(page.get_by_role("alert")).to_be_empty()
    assert list(room(client).users) == ["Jack"]


async def test_the_page_works_by_keyboard_alone(page, client):
    await page.keyboard.type("Jack")
    await page.keyboard.press("Enter")
    await expect(message_box(page)).to_be_focused()
    await page.keyboard.type("hello")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Space")  # on Send
    await expect(messages(page)).to_have_count(1)
    for role, name in [
        ("log", "Messages"), ("listbox", "Users"), ("button", "Refresh users"),
        ("button", "Log off"),
    ]:  # fmt: skip
        await page.keyboard.press("Shift+Tab")
        await expect(page.get_by_role(role, name=name)).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("status")).to_have_text("Offline")
    await expect(name_box(page)).to_be_focused()
    assert not room(client).users


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "width, height", [(320, 568), (667, 375), (1100, 700), (2560, 1440)]
)
async def test_it_fits_the_screen_and_axe_finds_no_violation(
    page, client, scheme, width, height
):
    await page.emulate_media(color_scheme=scheme)
    await page.set_viewport_size({"width": width, "height": height})

    async def check() -> None:
        violations = (await Axe().run(page)).response["violations"]
        assert [violation["help"] for violation in violations] == []
        over = "[scrollX, scrollY, e.scrollWidth - innerWidth, e.scrollHeight - innerHeight]"
        assert await page.evaluate(f"e = document.documentElement, {over}") == [
            0,
            0,
            0,
            0,
        ]
        for locator in message_box(page), page.get_by_role("button", name="Send"):
            await expect(locator).to_be_in_viewport(ratio=1)
        assert (await page.get_by_role("log").bounding_box())["height"] > 100

    await check()
    others = [await login(client, f"{'W' * 28} {i}") for i in range(40)]
    await enter(page)
    for ws in others:
        await ws.send_str("some words " * 20 + "\nand" + "x" * 200)
    await message_box(page).fill("hello")
    await message_box(page).press("Enter")
    await expect(messages(page)).to_have_count(41)
    await name_box(page).evaluate("e => e.blur()")
    await check()


async def test_the_colours_follow_the_system(page):
    back = "getComputedStyle(document.documentElement).backgroundColor"
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(back)
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate(back) != light


async def test_nothing_is_loaded_from_elsewhere_and_nothing_could_be(browser, client):
    page = await browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(str(client.make_url("/")))
    await enter(page)
    here = str(client.make_url("/"))
    assert asked and all(url.startswith((here, "data:")) for url in asked)
    fetch = "fetch('http://localhost:9/').then(() => '', error => error.message)"
    violated = "new Promise(f => document.onsecuritypolicyviolation = e => f(e.violatedDirective))"
    policy = await page.evaluate(
        f"() => {{ const v = {violated}; {fetch}; return v; }}"
    )
    assert policy == "connect-src"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
