"""The smallest real chat: one room over WebSockets (RFC 6455), at http://localhost:8080.

Messages have numbers, which are not sent: pages count, too. The last messages are kept. Each
user has a place: the number of the last message written to its connection. A slow reader goes
on from its place; a user who comes back, from the last message that its page has heard.

Read from the top. Chapters 1 to 3 are the chat. Chapters 4 and 5 handle what goes wrong in a
simple one: a user reads slowly, or loses the connection. Chapters 6 and 7 can wait: who may
come in, and how it is served. There are no passwords, and nothing is stored on a disk.
"""

import argparse
import asyncio
import html
import logging
import re
import signal
import socket
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
    room = request.app[ROOM]
    user = admit(request)  # a WebSocketResponse, or raises an HTTP error
    await room.enter(user)  # never suspends: the name is still as admit() saw it
    try:
        await user.prepare(request)  # answers the handshake: now it is a WebSocket
        room.begin(user)
        async for kind, payload in user.read():
            if kind is WSMsgType.TEXT:
                await room.say(user, payload)
            else:  # binary, a question: have I heard everything? (chapter 5)
                room.answer(user)
    finally:
        room.leave(user)
        # On return, aiohttp closes the transport. If the peer reads nothing, that never ends.
        asyncio.get_running_loop().call_later(2, cut_off, user.transport)
    return user


# 2. A user, who may not talk too much
#
# Everyone hears all that is said, so a user who floods the room floods everyone's line. What a
# user says has to be paid for before more is read from its connection. So aiohttp's buffer
# fills, then the kernel's, and TCP slows the user down: nothing is dropped, nobody else waits.

MAX_MESSAGE = 16 * KIB  # bytes of UTF-8
BURST = 128 * KIB  # bytes that a user may say at once, ...
RATE = 32 * KIB  # ... and bytes a second after that


class User(web.WebSocketResponse):
    """One connection of somebody who is logged in, and its place among the messages."""

    def __init__(self, name: str, transport: asyncio.Transport) -> None:
        super().__init__(
            heartbeat=25,  # seconds of silence before a ping; the pong has half of that
            timeout=2,  # seconds that a peer has to answer a close frame
            autoping=False,  # read() answers pings, which have a price
            compress=False,  # the same message is the same bytes for everyone
            max_msg_size=MAX_MESSAGE + 1,  # aiohttp closes at this size, with code 1009
        )
        self.name, self.transport = name, transport
        self.credit, self.paid_at = float(BURST), time.monotonic()  # in bytes, seconds
        self.place = 0  # the number of the last message written to it; 0 before begin()
        self.has_old_list = False  # the list of users has changed, and it was not told
        self.catching_up: asyncio.Task[None] | None = None  # chapter 4
        # For chapter 5:
        self.key, self.turn = "", 0  # the page's secret, and a count of its logins
        self.after: int | None = None  # what it heard last; None: it keeps no count
        self.answer_at = 0  # the place at which to answer its question; 0: it has none
        # Let the kernel hold little: a ping behind megabytes gets no pong in time.
        with suppress(AttributeError, OSError):  # Windows has no such option
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 16 * KIB)

    async def read(self) -> AsyncIterator[tuple[WSMsgType, bytes]]:
        """Yield the kind and the bytes of each text and binary message; answer pings."""
        await self.pay(0)  # the debt of the connection that this replaced, if it did
        async for kind, data, _ in self:
            if kind is WSMsgType.ERROR:
                return  # a broken frame, or no pong: aiohttp has closed the connection
            price = 4 * KIB  # a question or a ping has a write of its own
            if kind is WSMsgType.TEXT:
                data, price = data.encode(), 64  # even an empty text is work
                yield kind, data
            elif kind is WSMsgType.BINARY:
                yield kind, data
            elif kind is WSMsgType.PING and self.is_ready():
                self.transport.write(frame(WSMsgType.PONG, data))
            await self.pay(price + len(data))

    async def pay(self, size: int) -> None:
        """Take `size` bytes out of a token bucket, and wait while that is overdrawn."""
        now = time.monotonic()
        self.credit = min(BURST, self.credit + RATE * (now - self.paid_at)) - size
        self.paid_at = now
        if self.credit < 0:
            await asyncio.sleep(-self.credit / RATE)

    def replace(self, old: "User") -> None:
        """Close `old`, which had the name, and take over its token bucket."""
        self.credit, self.paid_at = old.credit, old.paid_at
        closing = old.close(code=1000, message=b"logged in again elsewhere")
        self.closing = asyncio.create_task(closing)  # asyncio does not keep it

    def is_ready(self) -> bool:
        """Tell whether this is open, and the kernel has taken all that was written."""
        transport = self.transport
        return not (transport.get_write_buffer_size() or transport.is_closing())

    def here(self) -> bytes:
        """Return a frame, not counted itself, that tells the place: pages count on from it."""
        return frame(WSMsgType.TEXT, b"{{Here %d}}" % self.place)


def cut_off(transport: asyncio.Transport) -> None:
    """End a connection now, and drop what the peer has not taken."""
    with suppress(AttributeError):  # asyncio raises this if the connection has ended
        transport.abort()


# 3. The room: who is here, and what was said

# Bytes; a larger batch is written right away. It is still below 64 KiB with its last message:
# above that, asyncio pauses writers, and aiohttp's close() may hang.
FULL_BATCH = 44 * KIB
MAX_WAIT = 0.02  # seconds that a batch waits for more
MAX_KEPT = 4 * MIB  # bytes of messages that are kept


def frame(kind: WSMsgType, payload: bytes) -> bytes:
    """Return a frame of under 64 KiB as a server sends it (RFC 6455, section 5.2).

    It is not masked or compressed, so it is the same for everyone: made once, and written past
    aiohttp, which would make it for each user.
    """
    size = len(payload)
    length = [size] if size < 126 else [126, *size.to_bytes(2, "big")]
    return bytes([0x80 | kind, *length]) + payload  # 0x80: no fragment follows


class Room:
    """Who is logged in, and the last messages."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by name, in order of login
        self.messages: dict[int, bytes] = {}  # frames by number: those that are kept
        self.size = 0  # bytes in them, and 64 more for each, since Python adds some
        # From the clock, in microseconds, so that no number comes again after a restart.
        self.last = time.time_ns() // 1000  # the number of the last message
        # Messages up to `forgotten` are gone. Those after `flushed` are the batch: kept, too,
        # but written to nobody before the next flush.
        self.forgotten = self.flushed = self.last
        self.batch = bytearray()
        self.flushing: asyncio.Task[None] | None = None  # it waits for more
        self.announcing: asyncio.Task[None] | None = None

    def names(self) -> list[str]:
        """Return the names of all who are logged in, in order of login."""
        return list(self.users)

    async def enter(self, user: User) -> None:
        """Log `user` in. This never suspends; it is async, as say() is, for bonus/cluster.py."""
        old = self.users.get(user.name)
        self.users[user.name] = user
        if old is None:
            self.changed(user.name, "logged in")
        else:
            user.replace(old)
            log.info("%s came back, %d here", user.name, len(self.users))

    def leave(self, user: User, how: str = "left") -> None:
        """Log `user` off, unless another connection has its name by now."""
        if self.users.get(user.name) is user:
            del self.users[user.name]
            self.changed(user.name, how)

    async def say(self, user: User, text: bytes) -> None:
        """Have everyone hear `text`, UTF-8, if `user` still has its name."""
        if self.users.get(user.name) is user:
            self.add(frame(WSMsgType.TEXT, user.name.encode() + b": " + text))

    def add(self, message: bytes) -> None:
        """Give a message, a frame, its number, keep it, and have it written soon."""
        self.last += 1
        self.messages[self.last] = message
        self.size += 64 + len(message)
        while self.size > MAX_KEPT:
            self.forgotten += 1
            self.size -= 64 + len(self.messages.pop(self.forgotten))
        self.batch += message
        if len(self.batch) > FULL_BATCH:
            self.flush()
        elif not self.flushing:
            self.flushing = asyncio.create_task(self.flush_soon())

    async def flush_soon(self) -> None:
        """Flush as soon as an iteration of the event loop brings no more, or after 20 ms.

        A write to a socket costs the same for one message as for fifty. In a quiet room, the
        next iteration brings none; in a busy one, many messages share a write.
        """
        seen, until = 0, time.monotonic() + MAX_WAIT
        while seen < self.last and time.monotonic() < until:
            seen = self.last
            await asyncio.sleep(0)  # that is one iteration
        self.flushing = None
        self.flush()

    def flush(self) -> None:
        """Write the batch to all who are up to date and ready; the others catch up."""
        batch, start = bytes(self.batch), self.flushed
        self.batch, self.flushed = bytearray(), self.last
        for user in self.users.values():
            if user.place == start and user.is_ready() and not user.answer_at:
                user.transport.write(batch)
                user.place = self.last
            else:  # behind, owed an answer, or logged in while the batch gathered
                self.catch_up(user)

    def changed(self, name: str, how: str) -> None:
        """Log who came or went, and have it announced soon, once for several changes."""
        log.info("%s %s, %d here", name, how, len(self.users))
        if not self.announcing:
            self.announcing = asyncio.create_task(self.announce_soon())

    async def announce_soon(self) -> None:
        """Tell everyone that the list of users has changed; they ask for it then."""
        await asyncio.sleep(max(0.1, len(self.users) / 1000))  # rarer in a large room
        self.announcing = None
        for user in self.users.values():
            user.has_old_list = True
            self.catch_up(user)

    async def close(self, code: int, reason: str) -> None:
        """Log everyone off; takes 2 s at most, the `timeout` of a user."""
        self.flush()
        closing = []
        for user in list(self.users.values()):
            self.leave(user, "was let go: " + reason)
            closing.append(user.close(code=code, message=reason.encode()))
        await asyncio.gather(*closing)

    # 4. Who reads slowly
    #
    # If the room waited until a slow user has read, all would wait. If it did not wait, the
    # memory would fill, since asyncio's transport holds what the kernel does not take. So
    # nothing is written to a transport that holds something. Its user falls behind, and costs
    # no more than its place: the messages are kept in the room, once for all.

    def catch_up(self, user: User) -> None:
        """Start a task that writes what `user` lacks, unless it has one, or no place yet."""
        if user.place and not user.catching_up:
            user.catching_up = asyncio.create_task(self.write_rest(user))

    async def write_rest(self, user: User) -> None:
        """Write what `user` lacks, a piece whenever it is ready, until it lacks nothing."""
        try:
            while self.users.get(user.name) is user:
                if user.place < self.forgotten and user.after is None:
                    # It keeps no count, so it would not notice what it has missed.
                    self.leave(user, "was let go: too far behind")
                    cut_off(user.transport)
                elif not user.is_ready():
                    # asyncio tells only aiohttp when, so poll: 10,000 times a second in all.
                    await asyncio.sleep(max(0.01, len(self.users) / 10_000))
                elif piece := self.take_piece(user):
                    user.transport.write(piece)
                    await asyncio.sleep(0)  # others run in between
                else:
                    return
        finally:
            user.catching_up = None

    def take_piece(self, user: User) -> bytearray:
        """Return what `user` lacks, 16 KiB or so at a time, and move its place.

        The batch waits for the next flush, which writes it or calls catch_up() again.
        """
        piece = bytearray()
        if user.has_old_list:
            user.has_old_list = False
            piece += frame(WSMsgType.TEXT, b"{{RefreshUsers}}")
        if user.place < self.forgotten:
            # Go on with the newer half: the oldest would soon be forgotten, too.
            user.place = self.last - len(self.messages) // 2
            piece += user.here()
        while user.place < self.flushed and len(piece) < 16 * KIB:
            user.place += 1
            piece += self.messages[user.place]
        if 0 < user.answer_at <= user.place:
            user.answer_at = 0
            piece += user.here()
        return piece

    # 5. Who comes back
    #
    # A phone changes its network, and its connection is dead. How is all that its user says
    # still heard exactly once?
    # 1. The page keeps each text until it is echoed. After some silence it sends a question,
    #    a binary frame. If no answer comes, the connection is dead.
    # 2. It opens another one, with `after`, the number that it has counted to, and with `key`,
    #    a secret of its own. With that, the new connection takes the name over.
    # 3. From then on, say() drops what is read from the old connection. What was read before
    #    has a number.
    # 4. The page asks again, and says nothing until the answer. That comes after all that had
    #    a number when it asked. So a text that was not echoed by then has none: the page
    #    sends it again.
    # 5. But if a {{Here N}}, such as the answer, is not what the page has counted to, messages
    #    are missing, and its texts may be among them. The page leaves them to its user.

    def is_free_for(self, user: User) -> bool:
        """Tell whether nobody has the name, or the same user has it, with no higher turn.

        A login that was held up in the network must not throw out the page's next one.
        """
        old = self.users.get(user.name)
        return old is None or (
            old.turn <= user.turn and self.is_key_of(user.name, user.key)
        )

    def is_key_of(self, name: str, key: str) -> bool:
        """Tell whether the user of that name has this key; bonus/ asks that, too."""
        return key != "" and name in self.users and self.users[name].key == key

    def begin(self, user: User) -> None:
        """Give `user` its place: the end, or `after`; -50 is 50 before the end."""
        user.place = self.last  # the batch was said before it came
        if user.after is not None:
            number = user.after if user.after >= 0 else self.last + user.after
            user.place = min(max(number, self.forgotten), self.last)
            user.transport.write(user.here())
        self.catch_up(user)

    def answer(self, user: User) -> None:
        """Tell `user` its place as soon as it has all that was said until now."""
        user.answer_at = self.last
        self.catch_up(user)


ROOM = web.AppKey("room", Room)

# 6. Who may come in, and who may reset

# Not printable, but allowed inside a name: the wide space of Japanese, and what joins Persian
# letters, or several emoji to one.
JOINER = re.compile("[\u3000\u200c\u200d]")
KEY = re.compile(r"(.+?)(?:\.(-?\d{1,15}))?", re.DOTALL)  # KEY or KEY.TURN


def admit(request: web.Request) -> User:
    """Return who wants in, or raise the refusal, with its reason as plain text."""
    query, transport = request.query, request.transport
    name = query.get("user", "").strip()
    parts = JOINER.split(name)
    if transport is None or is_cross_origin(request):  # None: nobody is there any more
        raise web.HTTPForbidden(text="The pages of other sites may not log in")
    if len(name) > 32 or ":" in name or not all(p and p.isprintable() for p in parts):
        raise web.HTTPBadRequest(text="A name: 1 to 32 printable characters, no colon")
    user = User(name, transport)
    if not user.is_ready():  # gone, or has not read the answers to earlier requests
        raise web.HTTPBadRequest(text="Read the answers to earlier requests first")
    if key := KEY.fullmatch(query.get("key", "")):
        user.key, user.turn = key[1], int(key[2] or 0)
    with suppress(ValueError):  # not an integer: as if it were not there
        user.after = int(query.get("after", ""))
    # Before the next check: a page asks by plain HTTP why it was refused; browsers do not tell.
    if not request.app[ROOM].is_free_for(user):
        raise web.HTTPConflict(text=f"User {name} already logged in")
    with suppress(ValueError):  # which aiohttp raises for a header that is not ASCII
        if user.can_prepare(request).ok:
            return user
    # It is no WebSocket. prepare() would say so, too, but after enter() replaced somebody.
    headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
    headers["Sec-WebSocket-Version"] = "13"
    raise web.HTTPUpgradeRequired(headers=headers, text="Connect with a WebSocket")


def is_cross_origin(request: web.Request) -> bool:
    """Tell whether a page of another host sent `request` (RFC 6455, section 10.2)."""
    # Not request.host: without the header, that looks up this machine's name, slowly.
    host = request.headers.get("Host", "")
    origin = request.headers.get("Origin", "://" + host)
    return origin.partition("://")[2].lower() != host.lower()


def from_operator(request: web.Request) -> bool:
    """Tell whether somebody on this machine, and no page, sent `request`."""
    headers = request.headers
    # Proxies add these; the last one, a browser that prefetches for a page.
    marks = ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via", "Sec-Purpose"]
    marked = any(mark in headers for mark in marks) or is_cross_origin(request)
    # "none": typed. A link that was said in the chat has "same-origin". curl sends nothing.
    typed = headers.get("Sec-Fetch-Site", "none") == "none"
    # In DNS rebinding, a foreign name leads to this machine; Host has that name then.
    addresses = {request.remote, re.sub(r":\d*$", "", headers.get("Host", ""))}
    local = addresses <= {"127.0.0.1", "::1", "[::1]", "localhost"}
    return local and typed and not marked


# 7. Serving


async def page(request: web.Request) -> web.Response:
    """Answer with the page, or with what the query asks for."""
    room, mime = request.app[ROOM], "text/plain"
    match dict(request.query):
        case {"getUsers": "1"}:
            mime, names = "text/html", map(html.escape, room.names())
            text = "\r\n".join(f'<option value="{n}">{n}</option>' for n in names)
        case {"getUsers2": "1"}:
            text = "\r\n".join(room.names())
        case {"resetUsers": "1"} if request.method != "HEAD":  # HEAD changes nothing
            if not from_operator(request):
                raise web.HTTPForbidden(text="Only the operator may reset the users")
            await room.close(1000, "the users were reset")
            text = "Users reseted"
        case _:
            mime, path = "text/html", Path(__file__).resolve().with_name("chat.html")
            text = path.read_text("utf-8")
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(text=text, content_type=mime, headers=headers)


@web.middleware
async def fairly(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let others run before each request: from Python 3.12 on, thousands run in one go."""
    await asyncio.sleep(0)
    return await handler(request)


def make_app(room: Room | None = None) -> web.Application:
    """Return the chat as an application; app[ROOM] is `room`, or one of its own."""
    app = web.Application(middlewares=[fairly])
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
    if not host or not 0 <= port < 2**16:  # "" would be all addresses, and 65536 port 0
        raise SystemExit(f"Cannot serve {host}:{port}: no such address")
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    noise = (HttpProcessingError, ConnectionError)  # of clients: no tracebacks of it
    logging.getLogger("aiohttp.server").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], noise))
    )
    with suppress(AttributeError):  # no SIGHUP on Windows; under nohup it is SIG_IGN
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with suppress(ImportError, OSError, ValueError):  # not on every system
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit

        # A page has two connections at times, and the usual soft limit is 1,024.
        setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    try:
        web.run_app(
            app,
            host=host,
            port=port,
            backlog=1024,  # after a restart, everyone comes back at once
            shutdown_timeout=1,
            auto_decompress=False,  # nobody reads a body
            print=lambda text: print(text, flush=True),  # or a pipe would hold it back
        )
    except OSError as error:
        raise SystemExit(f"Cannot serve {host}:{port}: {error}") from None


if __name__ == "__main__":
    args = options("The smallest real chat").parse_args()
    serve(make_app(), args.host, args.port)
