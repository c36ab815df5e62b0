# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4,<4"]
# ///
"""The smallest real chat: one room over WebSockets (RFC 6455), at http://localhost:8080.

Each message gets a number and is kept for a while; a user is a place among the numbers.
Who reads slowly, or lost the connection and comes back, goes on from there.

Read from the top: chapters 1 and 2 are a whole chat. Each chapter after them answers one
thing that goes wrong in a simple one: 3 who reads slowly, 4 who comes back, 5 who talks
too much, 6 who may what. 7 serves it. No passwords, and nothing is stored on a disk.
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
    """Log a user in, pass on what is said, log the user off: one task for each user."""
    room, user = request.app[ROOM], admit(request)
    await room.enter(user)
    try:
        await user.prepare(request)  # shakes hands: from here on it is a WebSocket
        room.begin(user)
        async for kind, payload in user.read():
            if kind is WSMsgType.TEXT:
                await room.say(user, payload)
            else:
                room.answer(user)  # a binary frame asks: have I heard everything?
    finally:
        room.leave(user)
        # A peer that does not answer the close frame would keep its socket for ever.
        asyncio.get_running_loop().call_later(2, user.cut_off)
    return user


# 2. The room: who is here, and what was said

MAX_BATCH = 80 * KIB  # bytes that are said before they leave at once
MAX_KEPT = 4 * MIB  # bytes of messages that are kept


def frame(kind: WSMsgType, payload: bytes) -> bytes:
    """Return a frame of under 64 KiB as a server sends it (RFC 6455, section 5.2).

    aiohttp would make one for each user. But a server's frames are not masked, and these
    are not compressed, so the same bytes do for everyone: they are made once.
    """
    size = len(payload)
    length = [size] if size < 126 else [126, *size.to_bytes(2, "big")]
    return bytes([0x80 | kind, *length]) + payload  # 0x80: no fragment follows


NOTICE = frame(WSMsgType.TEXT, b"{{RefreshUsers}}")  # ask for the list of users


class Room:
    """Who is logged in, and the last messages."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by name, in order of login
        self.messages: dict[int, bytes] = {}  # those that are kept: frames by number
        self.size = 0  # bytes in them, and 64 for each, about what Python adds
        # The clock gives the first number: no number comes again after a restart.
        self.last = time.time_ns() // 1000  # number of the last message
        self.flushed = self.last  # number of the last message that flush() has seen
        self.batch = bytearray()  # the messages after that one
        self.gathering = self.announcing = False  # their next call is on its way

    def names(self) -> list[str]:
        """Return the names of all who are logged in, in order of login."""
        return list(self.users)

    async def enter(self, user: User) -> None:
        """Log `user` in, or raise HTTPConflict.

        Nothing in here suspends, so nobody comes between looking a name up and taking
        it. (Only in bonus/cluster.py do this and say() wait, for the other processes.)
        """
        if not self.is_free_for(user):
            raise web.HTTPConflict(text=f"User {user.name} already logged in")
        before = self.users.get(user.name)
        self.users[user.name] = user
        if before:
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
        """Have everyone hear the name of `user` and `text`, UTF-8, if it is still here."""
        if self.users.get(user.name) is user:
            self.add(frame(WSMsgType.TEXT, user.name.encode() + b": " + text))

    def add(self, message: bytes) -> None:
        """Give a message, a frame, the next number; it leaves with the batch."""
        self.last += 1
        self.messages[self.last] = message
        self.size += 64 + len(message)
        while self.size > MAX_KEPT:
            self.size -= 64 + len(self.messages.pop(self.lost + 1))
        self.batch += message
        if len(self.batch) > MAX_BATCH:
            self.flush()
        elif not self.gathering:
            self.gathering = True
            asyncio.get_running_loop().call_soon(self.gather, self.last)

    def gather(self, last: int) -> None:
        """Flush in the first iteration of the event loop that brought nothing new.

        Nothing costs as much as a write to a socket, and one takes many messages: so wait
        for those that are under way, but for no timer. The busier, the fewer writes.
        """
        self.gathering = self.last > last
        if self.gathering:
            asyncio.get_running_loop().call_soon(self.gather, self.last)
        else:
            self.flush()

    def flush(self) -> None:
        """Write the batch, once to each user; who lacks what came before it catches up."""
        batch, self.batch = bytes(self.batch), bytearray()
        for user in list(self.users.values()):
            if user.place == self.flushed and user.is_ready():
                user.transport.write(batch)
                user.place = self.last
            elif not user.behind:
                user.behind = True
                self.catch_up(user)
        self.flushed = self.last

    def changed(self, name: str, how: str) -> None:
        """Log who came or went; the larger the room, the rarer it is told: all will ask."""
        log.info("%s %s, %d here", name, how, len(self.users))
        if not self.announcing:
            self.announcing = True
            pause = max(0.1, len(self.users) / 1000)  # seconds
            asyncio.get_running_loop().call_later(pause, self.announce)

    def announce(self) -> None:
        """Tell everyone, once for all changes of late, to ask for the list of users."""
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
    # To wait until somebody has read would stop everyone else. Not to wait fills the
    # memory, for a transport keeps what the peer does not take. So a transport that still
    # keeps something is given nothing more: a message is kept once, in the room, for all.

    @property
    def lost(self) -> int:
        """The number of the last message that is no longer kept."""
        return self.last - len(self.messages)

    def catch_up(self, user: User) -> None:
        """Write the next 16 KiB of what `user` lacks, if it is ready; then let others in."""
        loop, misses = asyncio.get_running_loop(), user.place < self.lost
        if self.users.get(user.name) is not user:
            return
        if misses and user.after is None:  # this client could not know what it missed
            self.leave(user, "was let go: too far behind")
            user.cut_off()
        elif not user.is_ready():  # look again: a transport does not tell
            user.behind = True
            loop.call_later(0.05, self.catch_up, user)
        else:
            piece = bytearray()
            if misses:  # go on with the newer half: the oldest would soon be lost, too
                user.place = self.last - len(self.messages) // 2
            if misses or user.place >= user.asked:
                piece += frame(WSMsgType.TEXT, b"{{Here %d}}" % user.place)
            if user.place >= user.asked:
                user.asked = math.inf
            while user.place < self.last and len(piece) < 16 * KIB:
                user.place += 1
                piece += self.messages[user.place]
            if user.behind and user.place == self.last:  # it may lack a notice, too
                piece += NOTICE
            user.transport.write(piece)
            user.behind = user.place < self.last or user.asked < math.inf
            if user.behind:
                loop.call_soon(self.catch_up, user)

    # 4. Who comes back
    #
    # A phone changes its network: the old connection is dead, which nobody notices before
    # a ping is not answered. A page notices when it asks and no answer comes. It opens a
    # new connection, with the key that only it knows, and says what number it has heard.

    def is_free_for(self, user: User) -> bool:
        """Tell whether the name is nobody's, or the same user's of no later turn."""
        before = self.users.get(user.name)
        if before is None:
            return True
        return before.key == user.key != "" and before.turn <= user.turn

    def begin(self, user: User) -> None:
        """Give `user` its place: the end, or the one it comes back to."""
        user.place = self.last
        if user.after is not None:
            number = user.after if user.after >= 0 else self.last + user.after
            user.place = user.asked = min(max(number, self.lost), self.last)
            self.catch_up(user)

    def answer(self, user: User) -> None:
        """Tell `user` where it is, as soon as it has all that was said until now."""
        user.asked = self.last
        if not user.behind:
            self.catch_up(user)


ROOM = web.AppKey("room", Room)

# 5. Who talks too much

MAX_MESSAGE = 16 * KIB  # bytes of UTF-8
BURST = 128 * KIB  # bytes that a user may say at once, ...
RATE = 32 * KIB  # ... and bytes a second after that


class User(web.WebSocketResponse):
    """The WebSocket of somebody who is logged in, and its place in what is said."""

    def __init__(self, name: str, transport: asyncio.Transport) -> None:
        super().__init__(
            heartbeat=25,  # seconds of silence before a ping; the pong has half of that
            timeout=2,  # seconds for the answer to a close frame
            autoping=False,  # else a flood of pings is answered for free
            compress=False,  # what is compressed is not the same bytes for everyone
            max_msg_size=MAX_MESSAGE + 1,  # the least that is too long: 1009
        )
        self.name, self.transport = name, transport
        self.key, self.turn = (
            "",
            0,
        )  # who has this key is this user, back in a later turn
        self.after: int | None = None  # the number that a client asked to go on after
        self.place = 0  # number of the last message written to the transport
        self.behind = False  # catch_up() has more to write
        self.asked = math.inf  # the place from which on to tell it where it is
        self.credit, self.paid_at = float(BURST), time.monotonic()

    async def read(self) -> AsyncIterator[tuple[WSMsgType, bytes]]:
        """Yield what the user sends: the kind, text or binary, and the bytes.

        Until one is paid for, the next is not read: buffers fill, and TCP slows the
        sender down. Nothing is dropped, and nobody else waits.
        """
        async for kind, data, _ in self:
            if kind is WSMsgType.TEXT:
                payload = data.encode()
                yield kind, payload
                await self.pay(64 + len(payload))  # so that tiny ones are not free
            elif kind is not WSMsgType.ERROR:  # after which the loop ends
                if kind is WSMsgType.BINARY:
                    yield kind, data
                elif kind is WSMsgType.PING and self.is_ready():
                    self.transport.write(frame(WSMsgType.PONG, data))
                await self.pay(4 * KIB + len(data))  # each may cost an answer

    async def pay(self, size: int) -> None:
        """Take `size` out of a token bucket; wait while it is overdrawn."""
        now = time.monotonic()
        self.credit = min(BURST, self.credit + RATE * (now - self.paid_at)) - size
        self.paid_at = now
        if self.credit < 0 and not self.transport.is_closing():
            await asyncio.sleep(-self.credit / RATE)

    def replace(self, before: User) -> None:
        """Close the older connection of this user, which is to say nothing more."""
        self.credit, self.paid_at = before.credit, before.paid_at  # no new burst
        reason = b"logged in again elsewhere"
        self.closing = asyncio.create_task(before.close(code=1000, message=reason))

    def is_ready(self) -> bool:
        """Tell whether this is open, and the peer has taken all that was written."""
        transport = self.transport
        return not (transport.get_write_buffer_size() or transport.is_closing())

    def cut_off(self) -> None:
        """End the connection now; to close it would wait for the peer to take the rest.

        When a transport that closes has given all away, asyncio ends it; after that,
        abort() raises AttributeError.
        """
        if self.transport.get_write_buffer_size() or not self.transport.is_closing():
            self.transport.abort()


# 6. Who may what

# In a name, these may stand between others: a wide space, and what joins letters or emoji.
INNER = re.compile(
    "(?<=[^\u3000\u200c\u200d])[\u3000\u200c\u200d](?=[^\u3000\u200c\u200d])"
)
KEY = re.compile(r"(.+?)(?:\.(-?\d{1,15}))?", re.DOTALL)  # and its turn


def admit(request: web.Request) -> User:
    """Return who wants in; or raise the refusal, with its reason as plain text."""
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
    # prepare() would refuse it too, but only when the name is taken, or taken over.
    if not ready and request.app[ROOM].is_free_for(user):
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        headers["Sec-WebSocket-Version"] = "13"
        raise web.HTTPUpgradeRequired(headers=headers, text="Connect with a WebSocket")
    # aiohttp's close() waits for a transport that holds more than this to give it away,
    # and without its timeout. It never holds more: a batch, a piece, some control frames.
    transport.set_write_buffer_limits(MIB)
    return user


def is_cross_origin(request: web.Request) -> bool:
    """Tell whether a page of another host sent `request` (RFC 6455, section 10.2)."""
    # Without the header, request.host asks the system, which may ask a name server.
    host = request.headers.get("Host", "")
    origin = request.headers.get("Origin", "://" + host)
    return origin.partition("://")[2].lower() != host.lower()


def from_operator(request: web.Request) -> bool:
    """Tell whether somebody on this machine, and no page, sent `request`."""
    headers = request.headers
    proxied = any(name in headers for name in ("Forwarded", "X-Forwarded-For", "Via"))
    # Browsers say whose page caused a request: also this one's, with a link in a message.
    meant = headers.get("Sec-Fetch-Site", "none") == "none"
    # Under another name, this site may be somebody else's: DNS rebinding.
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
            kind, file = "text/html", Path(__file__).resolve().with_name("chat.html")
            text = file.read_text("utf-8")
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
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("aiohttp.server").addFilter(  # not of clients' broken HTTP
        lambda r: not (r.exc_info and isinstance(r.exc_info[1], HttpProcessingError))
    )
    with suppress(AttributeError):  # Windows has no SIGHUP; nohup has it ignored
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with suppress(ImportError, OSError, ValueError):  # not on every system
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit

        # Often 1,024 descriptors are the soft limit, and a page takes two.
        setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    try:
        if not host or not 0 <= port < 2**16:  # "" is all addresses, 65536 is port 0
            raise OSError("no such address")
        web.run_app(
            app,
            host=host,
            port=port,
            backlog=1024,  # after a restart, everyone comes back at once
            shutdown_timeout=1,
            auto_decompress=False,  # nobody reads a body
            print=lambda text: print(text, flush=True),  # a pipe, too, has it at once
        )
    except OSError as error:
        raise SystemExit(f"Cannot serve {host}:{port}: {error}") from None


if __name__ == "__main__":
    args = options("The smallest real chat").parse_args()
    serve(make_app(), args.host, args.port)
