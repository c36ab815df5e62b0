"""The smallest real chat: one room over WebSockets (RFC 6455), at http://localhost:8080.

Messages have numbers and are kept for a while; a user is a place among the numbers. Who
reads slowly, or has lost the connection and comes back, goes on from there.

Read from the top. Chapters 1 and 2 are a whole chat; each chapter after them answers what
goes wrong in a simple one: 3 who reads slowly, 4 who comes back, 5 who talks too much,
6 who may what. 7 serves it. There are no passwords, and nothing is stored on a disk.
"""

from __future__ import annotations  # a chapter may name what comes later

import argparse
import asyncio
import html
import logging
import math
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from aiohttp import WSMsgType, web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler

KIB, MIB = 2**10, 2**20  # bytes
log = logging.getLogger("chat")

# 1. A connection, from its beginning to its end


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """Log a user in, pass on what is said, log the user off: a task for each connection."""
    room, user = request.app[ROOM], admit(request)
    await room.enter(user)
    try:
        await user.prepare(request)  # answers the handshake: now it is a WebSocket
        room.begin(user)
        async for kind, payload in user.read():
            if kind is WSMsgType.TEXT:
                await room.say(user, payload)
            else:  # a binary frame asks: have I heard everything?
                room.answer(user)
    finally:
        room.leave(user)
        # Who does not answer the close frame would keep the connection for ever.
        asyncio.get_running_loop().call_later(2, user.cut_off)
    return user


# 2. The room: who is here, and what was said

MAX_BATCH = 80 * KIB  # bytes to be written; above, they are written at once
MAX_KEPT = 4 * MIB  # bytes of messages that are kept


def frame(kind: WSMsgType, payload: bytes) -> bytes:
    """Return a frame of under 64 KiB as a server sends it (RFC 6455, section 5.2).

    aiohttp would make one for each user. But a server masks nothing, and this one does not
    compress, so the bytes are the same for everyone, and made once.
    """
    size = len(payload)
    length = [size] if size < 126 else [126, *size.to_bytes(2, "big")]
    return bytes([0x80 | kind, *length]) + payload  # 0x80: no fragment follows


NOTICE = frame(WSMsgType.TEXT, b"{{RefreshUsers}}")  # to ask for the list of users


class Room:
    """Who is logged in, and the last messages."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by name, in order of login
        self.messages: dict[int, bytes] = {}  # that are kept: frames, by number
        self.size = 0  # bytes in them, and 64 for each, about what Python adds
        # The first number is of the clock, so that none comes again after a restart.
        self.last = time.time_ns() // 1000  # number of the last message
        self.lost = self.last  # number of the last message that is no longer kept
        self.flushed = self.last  # number of the last message that was flushed
        self.batch = bytearray()  # those after it, to be written
        self.gathering = self.announcing = False  # the next call is under way

    def names(self) -> list[str]:
        """Return the names of all who are logged in, in order of login."""
        return list(self.users)

    async def enter(self, user: User) -> None:
        """Log `user` in, or raise HTTPConflict.

        Nothing suspends between looking a name up and taking it, so nobody comes between.
        (This and say() are coroutines for bonus/cluster.py, which asks other processes.)
        """
        if not self.is_free_for(user):
            raise web.HTTPConflict(text=f"User {user.name} already logged in")
        before = self.users.get(user.name)
        self.users[user.name] = user
        if before is not None:
            user.replace(before)
            log.info("%s came back, %d here", user.name, len(self.users))
        else:
            self.changed(user.name, "logged in")

    def leave(self, user: User, how: str = "left") -> None:
        """Log `user` off, unless that was done before; the name is free at once."""
        if self.users.get(user.name) is user:
            del self.users[user.name]
            self.changed(user.name, how)

    async def say(self, user: User, text: bytes) -> None:
        """Have everyone hear `text`, UTF-8, from `user`, unless that one is logged off."""
        if self.users.get(user.name) is user:
            self.add(frame(WSMsgType.TEXT, user.name.encode() + b": " + text))

    def add(self, message: bytes) -> None:
        """Number a message, a frame, and keep it; it is written with the next batch."""
        self.last += 1
        self.messages[self.last] = message
        self.size += 64 + len(message)
        while self.size > MAX_KEPT:
            self.lost += 1
            self.size -= 64 + len(self.messages.pop(self.lost))
        self.batch += message
        if len(self.batch) > MAX_BATCH:
            self.flush()
        elif not self.gathering:
            self.gather(self.flushed)

    def gather(self, last: int) -> None:
        """Flush in the first iteration of the event loop in which nothing is said.

        A write to a socket costs the most, and takes many messages as well as one. So wait
        for all that are under way, but for no timer: the busier, the fewer the writes.
        """
        self.gathering = self.last != last
        if self.gathering:
            asyncio.get_running_loop().call_soon(self.gather, self.last)
        else:
            self.flush()

    def flush(self) -> None:
        """Write the batch, once to each user; who lacks what came before it catches up."""
        batch, before = bytes(self.batch), self.flushed
        self.batch, self.flushed = bytearray(), self.last
        for user in list(self.users.values()):
            if user.place == before and user.is_ready():
                user.transport.write(batch)
                user.place = self.last
            elif not user.behind:
                user.behind = True
                self.catch_up(user)

    def changed(self, name: str, how: str) -> None:
        """Log who came or went. All will ask for the list: the more, the rarer it is told."""
        log.info("%s %s, %d here", name, how, len(self.users))
        if not self.announcing:
            self.announcing = True
            pause = max(0.1, len(self.users) / 1000)  # seconds
            asyncio.get_running_loop().call_later(pause, self.announce)

    def announce(self) -> None:
        """Tell everyone, once for all changes of late, that the list has changed."""
        self.announcing = False
        self.batch += NOTICE
        self.flush()

    async def close(self, code: int, reason: str) -> None:
        """Log everyone off; takes 2 s at most, even if nobody answers."""
        self.flush()
        for user in (users := list(self.users.values())):
            self.leave(user, "was let go: " + reason)
        closing = (u.close(code=code, message=reason.encode()) for u in users)
        await asyncio.gather(*closing)

    # 3. Who reads slowly
    #
    # To wait until somebody has read would hold everyone up, and not to wait fills the
    # memory: a transport holds what its peer does not take. So nothing is written to one
    # that holds something; what is said meanwhile is kept here, once for all.

    def catch_up(self, user: User) -> None:
        """Write the next 16 KiB that `user` lacks, if it is ready; then let others in."""
        loop, missing = asyncio.get_running_loop(), user.place < self.lost
        if self.users.get(user.name) is not user:
            return
        if missing and user.after is None:  # and this client could not know it
            self.leave(user, "was let go: too far behind")
            user.cut_off()
        elif not user.is_ready():  # a transport does not tell when it is: look again
            user.behind = True
            loop.call_later(0.05, self.catch_up, user)
        else:
            piece = bytearray()
            if missing:  # go on with the newer half: the rest would soon be lost, too
                user.place = self.last - len(self.messages) // 2
            if missing or user.place >= user.asked:
                piece += user.here()
            if user.place >= user.asked:
                user.asked = math.inf
            while user.place < self.last and len(piece) < 16 * KIB:
                user.place += 1
                piece += self.messages[user.place]
            if user.behind and user.place == self.last:
                piece += NOTICE  # it may lack one, too
            user.transport.write(piece)
            user.behind = user.place < self.last or user.asked < math.inf
            if user.behind:
                loop.call_soon(self.catch_up, user)

    # 4. Who comes back
    #
    # A phone changes its network, and its connection is dead, which the server does not
    # notice for 40 s. Its page asks, and gets no answer: so it connects anew, and tells
    # the key that it alone has, and the number of the last message that it heard.

    def is_free_for(self, user: User) -> bool:
        """Tell whether the name is nobody's, or this user's with no later turn."""
        before = self.users.get(user.name)
        if before is None:
            return True
        return before.key == user.key != "" and before.turn <= user.turn

    def begin(self, user: User) -> None:
        """Give `user` its place: the end, or where it wants to go on."""
        user.place = self.last
        if user.after is not None:
            number = user.after if user.after >= 0 else self.last + user.after
            user.place = min(max(number, self.lost), self.last)
            user.transport.write(user.here())
            self.catch_up(user)

    def answer(self, user: User) -> None:
        """Tell `user` where it is, once it has all that was said until now."""
        user.asked = self.last
        if not user.behind:
            self.catch_up(user)


ROOM = web.AppKey("room", Room)

# 5. Who talks too much

MAX_MESSAGE = 16 * KIB  # bytes of UTF-8
BURST, RATE = 128 * KIB, 32 * KIB  # bytes that a user may say at once; then, a second


class User(web.WebSocketResponse):
    """A connection of somebody who is logged in, and its place among the messages."""

    def __init__(self, name: str, transport: asyncio.Transport) -> None:
        super().__init__(
            heartbeat=25,  # seconds of silence before a ping; the pong has half of that
            timeout=2,  # seconds for the answer to a close frame
            autoping=False,  # read() answers pings, at a price
            compress=False,  # or the same message would not be the same bytes
            max_msg_size=MAX_MESSAGE + 1,  # the least that is too long: close code 1009
        )
        self.name, self.transport = name, transport
        self.key, self.turn = "", 0  # who has the key is the same user, in a later turn
        self.after: int | None = None  # number after which the client wants to go on
        self.place = 0  # number of the last message written
        self.asked = math.inf  # number at which it is told its place
        self.behind = False  # catch_up() is under way
        self.credit, self.paid_at = float(BURST), time.monotonic()

    async def read(self) -> AsyncIterator[tuple[WSMsgType, bytes]]:
        """Yield the kind, text or binary, and the bytes of what the user sends.

        What was sent has to be paid for before the next is read. So buffers fill, and TCP
        slows the sender down: nothing is dropped, and nobody else waits.
        """
        async for kind, data, _ in self:
            if kind is WSMsgType.TEXT:
                text = data.encode()
                yield kind, text
                await self.pay(64 + len(text))  # so that tiny ones are not free
            elif kind is not WSMsgType.ERROR:  # which is the last
                if kind is WSMsgType.BINARY:
                    yield kind, data
                elif kind is WSMsgType.PING and self.is_ready():
                    self.transport.write(frame(WSMsgType.PONG, data))
                await self.pay(4 * KIB + len(data))  # each is a write of its own

    async def pay(self, size: int) -> None:
        """Take `size` out of a token bucket, and wait while it is overdrawn."""
        now = time.monotonic()
        self.credit = min(BURST, self.credit + RATE * (now - self.paid_at)) - size
        self.paid_at = now
        if self.credit < 0 and not self.transport.is_closing():
            await asyncio.sleep(-self.credit / RATE)

    def here(self) -> bytes:
        """Return the frame that tells the place."""
        return frame(WSMsgType.TEXT, b"{{Here %d}}" % self.place)

    def replace(self, before: User) -> None:
        """Close the older connection of this user, without a new burst for this one."""
        self.credit, self.paid_at = before.credit, before.paid_at
        reason = b"logged in again elsewhere"
        self.closing = asyncio.create_task(before.close(code=1000, message=reason))

    def is_ready(self) -> bool:
        """Tell whether this is open, and the peer has taken all that was written."""
        transport = self.transport
        return not (transport.get_write_buffer_size() or transport.is_closing())

    def cut_off(self) -> None:
        """End the connection now, as close() would wait for the peer to take the rest.

        A transport that is closing, and has given everything away, is gone: asyncio's
        abort() raises AttributeError then.
        """
        if self.transport.get_write_buffer_size() or not self.transport.is_closing():
            self.transport.abort()


# 6. Who may what

# Between others, a name may have a wide space, and what joins letters, or emoji, to one.
INNER = re.compile(
    "(?<=[^\u3000\u200c\u200d])[\u3000\u200c\u200d](?=[^\u3000\u200c\u200d])"
)
KEY = re.compile(r"(.+?)(?:\.(-?\d{1,15}))?", re.DOTALL)  # and its turn


def admit(request: web.Request) -> User:
    """Return who wants in, or raise the refusal, with its reason as plain text."""
    query, transport, ready = request.query, request.transport, False
    name = query.get("user", "").strip()
    if transport is None or transport.is_closing() or is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not log in")
    if not 1 <= len(name) <= 32 or not INNER.sub("", name).isprintable() or ":" in name:
        raise web.HTTPBadRequest(text="A name: 1 to 32 printable characters, no colon")
    user = User(name, transport)
    if key := KEY.fullmatch(query.get("key", "")):
        user.key, user.turn = key[1], int(key[2] or 0)
    with suppress(ValueError):  # not an integer: as if it were not there
        user.after = int(query.get("after", ""))
    with suppress(ValueError):  # which aiohttp raises for a header that is not ASCII
        ready = user.can_prepare(request).ok
    # prepare() would refuse it, too, but only after enter(), which may throw somebody out.
    if not ready and request.app[ROOM].is_free_for(user):
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        headers["Sec-WebSocket-Version"] = "13"
        raise web.HTTPUpgradeRequired(headers=headers, text="Connect with a WebSocket")
    # If a transport holds more than this, aiohttp's close() waits, without its timeout. It
    # never does: the most is a batch and some control frames.
    transport.set_write_buffer_limits(MIB)
    return user


def is_cross_origin(request: web.Request) -> bool:
    """Tell whether a page of another host sent `request` (RFC 6455, section 10.2)."""
    # Where it is missing, request.host asks for this machine's name: a slow name server.
    host = request.headers.get("Host", "")
    origin = request.headers.get("Origin", "://" + host)
    return origin.partition("://")[2].lower() != host.lower()


def from_operator(request: web.Request) -> bool:
    """Tell whether somebody on this machine, and no page, sent `request`."""
    headers = request.headers
    proxied = any(name in headers for name in ("Forwarded", "X-Forwarded-For", "Via"))
    # Browsers tell whose page caused it, also this one's, by a link that somebody said.
    meant = headers.get("Sec-Fetch-Site", "none") == "none"
    # Under another name, this server may look like another site's: DNS rebinding.
    names = {request.remote, headers.get("Host", "").rsplit(":", 1)[0]}
    local = names <= {"127.0.0.1", "::1", "[::1]", "localhost"}
    return local and meant and not proxied and not is_cross_origin(request)


# 7. Serving


async def page(request: web.Request) -> web.Response:
    """Answer with the page, or with what the query asks for, in the article's words."""
    room, kind = request.app[ROOM], "text/plain"
    match dict(request.query):
        case {"getUsers": "1"}:
            kind, names = "text/html", map(html.escape, room.names())
            text = "\r\n".join(f'<option value="{n}">{n}</option>' for n in names)
        case {"getUsers2": "1"}:
            text = "\r\n".join(room.names())
        case {"resetUsers": "1"} if request.method != "HEAD":  # which changes nothing
            if not from_operator(request):
                raise web.HTTPForbidden(text="Only the operator may reset the users")
            await room.close(1000, "the users were reset")
            text = "Users reseted"
        case _:
            kind, path = "text/html", Path(__file__).resolve().with_name("chat.html")
            text = path.read_text("utf-8")
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(text=text, content_type=kind, headers=headers)


@web.middleware
async def in_turn(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let others in before each request: a client may send thousands in one go."""
    await asyncio.sleep(0)
    return await handler(request)


def make_app(room: Room | None = None) -> web.Application:
    """Return the chat as an application; app[ROOM] is `room`, or one of its own."""
    app = web.Application(middlewares=[in_turn])
    app[ROOM] = room = room or Room()
    app.add_routes([web.get("/", page), web.post("/", page)])
    app.add_routes([web.get("/ws", websocket, allow_head=False)])
    app.on_shutdown.append(lambda _: room.close(1001, "the server stops"))
    return app


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser of the command line that has --host and --port."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", default=8080, type=int, help="default: %(default)s")
    return parser


def serve(app: web.Application, host: str, port: int) -> None:
    """Serve `app` until Ctrl-C, SIGTERM or SIGHUP; if that cannot be, say why and exit."""
    if not host or not 0 <= port < 2**16:  # "" is every address, and 65536 is 0
        raise SystemExit(f"Cannot serve {host}:{port}: no such address")
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("aiohttp.server").addFilter(  # not of clients' broken HTTP
        lambda r: not (r.exc_info and isinstance(r.exc_info[1], HttpProcessingError))
    )
    with suppress(AttributeError):  # Windows has no SIGHUP, and nohup ignores it
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with suppress(ImportError, OSError, ValueError):  # not on every system
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit

        # A page takes two descriptors, of 1,024 that one may open unless one asks.
        setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    try:
        web.run_app(
            app,
            host=host,
            port=port,
            backlog=1024,  # after a restart, everyone comes back at once
            shutdown_timeout=1,
            auto_decompress=False,  # nobody reads a body
            print=lambda text: print(text, flush=True),  # to a pipe, too
        )
    except OSError as error:
        raise SystemExit(f"Cannot serve {host}:{port}: {error}") from None


if __name__ == "__main__":
    args = options("The smallest real chat").parse_args()
    serve(make_app(), args.host, args.port)
