# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4,<4"]
# ///
"""The smallest real chat: one room over WebSockets (RFC 6455), at http://localhost:8080.

A message is the same bytes for everyone, so it is encoded once; and all that is said in one
iteration of the event loop leaves in one write to each user.
"""

import argparse
import asyncio
import html
import logging
from collections import deque
from contextlib import suppress
from pathlib import Path

from aiohttp import WSMsgType, web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler

MAX_BATCH = 5 * 2**14  # bytes said but not sent; above, whoever has more to say waits
MAX_BEHIND = 2**22  # bytes sent but not written to somebody; above, the user is let go
BURST, RATE = 2**17, 2**15  # of a user's token bucket: its bytes, and bytes a second
log = logging.getLogger("chat")


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a frame of under 64 KiB as a server sends it (RFC 6455, section 5.2)."""
    size = len(payload)
    length = [size] if size < 126 else [126, *size.to_bytes(2)]
    return bytes([0x80 | opcode, *length]) + payload  # 0x80: no fragments follow


class User(web.WebSocketResponse):
    """The WebSocket of one user; what is said is written, in frames, to its `transport`."""

    def __init__(self, name: str, transport: asyncio.Transport) -> None:
        super().__init__(
            heartbeat=25,  # seconds of silence before a ping; the pong has half of that
            timeout=2,  # seconds for the answer to a close frame
            autoping=False,  # else a flood of pings is answered for free
            compress=False,  # what is compressed is not the same bytes for everyone
            max_msg_size=2**14 + 1,  # bytes: the least that closes with 1009
        )
        self.name, self.transport = name, transport
        self.behind = 0  # batches sent, but not yet written to the transport
        self.paid_until = 0.0  # the loop's time at which all that was said is paid for

    async def pay(self, size: int) -> None:
        """Take `size` bytes out of the token bucket, and wait while it is overdrawn."""
        now = asyncio.get_running_loop().time()
        self.paid_until = max(self.paid_until, now - BURST / RATE) + size / RATE
        if self.paid_until > now and not self.transport.is_closing():
            await asyncio.sleep(self.paid_until - now)

    def is_ready(self) -> bool:
        """Tell whether this is open, and its peer has taken all that was written."""
        transport = self.transport
        return not (transport.is_closing() or transport.get_write_buffer_size())

    def cut_off(self) -> None:
        """End this, unless it has ended; to close would wait for what its peer has to take."""
        if self.transport.get_write_buffer_size() or not self.transport.is_closing():
            self.transport.abort()


class Room:
    """Who is logged in, and what is said: from `batch` to `sent`, and to all transports."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by name, in order of login
        self.batch = bytearray()  # whole frames, said but not sent
        self.flushed = asyncio.Event()  # set for a moment when the batch is sent
        self.sent = deque[bytes]()  # the last batches, kept for who is behind
        self.size = 0  # bytes in them, and 64 for each, which is about what Python adds
        self.changes = 0  # of who is here, since the last notice

    def names(self) -> list[str]:
        """Return the names of all who are logged in, in order of login."""
        return list(self.users)

    async def enter(self, user: User) -> None:
        """Log `user` in, or raise HTTPConflict; atomic, since nothing in here suspends."""
        if user.name in self.users:
            raise web.HTTPConflict(text=f"User {user.name} already logged in")
        self.users[user.name] = user
        self.changed(user.name, "logged in")

    def leave(self, user: User, how: str = "left") -> None:
        """Log `user` off, unless that was done before; the name is free at once."""
        if self.users.get(user.name) is user:
            del self.users[user.name]
            user.behind = 0  # nothing follows
            self.changed(user.name, how)

    def changed(self, name: str, how: str) -> None:
        """Log who came or went, and have all told: together, they ask 1,000 times a second."""
        log.info("%s %s, %d here", name, how, len(self.users))
        if not self.changes:
            pause = max(0.1, len(self.users) / 1000)  # seconds
            asyncio.get_running_loop().call_later(pause, self.announce)
        self.changes += 1

    def announce(self) -> None:
        """Tell everyone, once for all changes of late, to ask for the list of users."""
        self.changes = 0
        self.deliver(frame(WSMsgType.TEXT, b"{{RefreshUsers}}"))

    async def say(self, user: User, text: bytes) -> None:
        """Add `text`, UTF-8, to the batch, which leaves on the loop's next iteration."""
        while len(self.batch) > MAX_BATCH:
            await self.flushed.wait()
        if self.users.get(user.name) is user:  # not let go meanwhile
            if not self.batch:
                asyncio.get_running_loop().call_soon(self.flush)
            self.batch += frame(WSMsgType.TEXT, user.name.encode() + b": " + text)

    def flush(self) -> None:
        """Deliver the batch, and begin the next."""
        batch, self.batch = bytes(self.batch), bytearray()
        self.flushed.set()
        self.flushed.clear()
        self.deliver(batch)

    def deliver(self, frames: bytes) -> None:
        """Send `frames`, whole ones, to the users of this process."""
        self.sent.append(frames)
        self.size += 64 + len(frames)
        while self.size > MAX_BEHIND:
            self.size -= 64 + len(self.sent.popleft())
        for user in list(self.users.values()):
            if not user.behind and user.is_ready():
                user.transport.write(frames)
            elif user.behind >= len(self.sent):  # the next it needs is no longer kept
                self.leave(user, "was let go: too far behind")
                user.cut_off()
            else:
                user.behind += 1
                if user.behind == 1:
                    self.catch_up(user)

    def catch_up(self, user: User) -> None:
        """Write the next 16 KiB that `user` is behind, if ready; go on, but let others in."""
        pause = 0.05  # seconds to the next look, since a transport does not tell
        if user.is_ready():
            piece, pause = bytearray(), 0
            while user.behind and len(piece) < 2**14:
                piece += self.sent[-user.behind]
                user.behind -= 1
            user.transport.write(piece)
        if user.behind:
            asyncio.get_running_loop().call_later(pause, self.catch_up, user)

    async def close(self, code: int, reason: bytes) -> None:
        """Log everyone off; takes 2 s at most, even if nobody answers."""
        self.flush()
        for user in (users := list(self.users.values())):
            self.leave(user, "was let go: " + reason.decode())
        await asyncio.gather(*(u.close(code=code, message=reason) for u in users))


ROOM = web.AppKey("room", Room)


def is_cross_origin(request: web.Request) -> bool:
    """Tell whether a page of another host sent `request` (RFC 6455, section 10.2)."""
    host = request.headers.get("Host", "")  # request.host may wait for a name server
    origin = request.headers.get("Origin", "://" + host)
    return origin.partition("://")[2].lower() != host.lower()


def from_operator(request: web.Request) -> bool:
    """Tell whether somebody on this machine, not a page of another site, sent `request`."""
    headers = request.headers
    proxied = any(name in headers for name in ("Forwarded", "X-Forwarded-For", "Via"))
    own_page = headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
    # Under another name, this host's page may be another site's: DNS rebinding.
    names = {request.remote, headers.get("Host", "").rsplit(":", 1)[0]}
    local = names <= {"127.0.0.1", "::1", "[::1]", "localhost"}
    return local and own_page and not proxied and not is_cross_origin(request)


async def page(request: web.Request) -> web.Response:
    """Answer with the page, or with what the query asks for, in the article's words."""
    room, query, content_type = request.app[ROOM], request.query, "text/html"
    if query.get("getUsers") == "1":
        names = map(html.escape, room.names())
        text = "\r\n".join(f'<option value="{name}">{name}</option>' for name in names)
    elif query.get("getUsers2") == "1":
        text, content_type = "\r\n".join(room.names()), "text/plain"
    elif (
        query.get("resetUsers") == "1" and request.method != "HEAD"
    ):  # HEAD changes nothing
        if not from_operator(request):
            raise web.HTTPForbidden(text="Only the operator may reset the users")
        await room.close(1000, b"the users were reset")
        text, content_type = "Users reseted", "text/plain"
    else:
        text = Path(__file__).with_name("chat.html").read_text("utf-8")
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(text=text, content_type=content_type, headers=headers)


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """Log a user in, and pass on what is said; a refusal has its reason as its text."""
    room, transport = request.app[ROOM], request.transport
    name = request.query.get("user", "").strip()
    if transport is None or transport.is_closing() or is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not log in")
    if not 1 <= len(name) <= 32 or not name.isprintable() or ":" in name:
        raise web.HTTPBadRequest(text="A name: 1 to 32 printable characters, no colon")
    user, ready = User(name, transport), False
    with suppress(ValueError):  # raised for a header that is not ASCII
        ready = user.can_prepare(request).ok
    if not ready and name not in room.names():  # else enter() says what is wrong
        headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
        headers["Sec-WebSocket-Version"] = "13"
        raise web.HTTPUpgradeRequired(headers=headers, text="Connect with a WebSocket")
    await room.enter(user)
    try:
        transport.set_write_buffer_limits(
            2 * MAX_BEHIND
        )  # aiohttp's own writes never wait
        await user.prepare(request)
        async for message in user:
            if message.type is WSMsgType.TEXT:
                text = message.data.encode()
                await room.say(user, text)
                await user.pay(64 + len(text))  # so that tiny ones are not free
            elif message.type is not WSMsgType.ERROR:  # after which the loop ends
                if message.type is WSMsgType.PING and user.is_ready():
                    transport.write(frame(WSMsgType.PONG, message.data))
                await user.pay(4096 + len(message.data))
    finally:
        room.leave(user)
        asyncio.get_running_loop().call_later(2, user.cut_off)  # if not closed then
    return user


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
    app.on_shutdown.append(lambda _: room.close(1001, b"the server stops"))
    return app


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser of the command line that has --host and --port."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="localhost", help="default: %(default)s")
    parser.add_argument("--port", default=8080, type=int, help="default: %(default)s")
    return parser


def serve(app: web.Application, host: str, port: int) -> None:
    """Serve `app` until Ctrl-C or SIGTERM; if that cannot be, say why and exit."""
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("aiohttp.server").addFilter(  # not of clients' broken HTTP
        lambda r: not (r.exc_info and isinstance(r.exc_info[1], HttpProcessingError))
    )
    with suppress(ImportError, OSError, ValueError):  # not on every system
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit  # a page takes two

        setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    try:
        web.run_app(
            app,
            host=host,
            port=port,
            backlog=1024,  # after a restart, everyone comes back at once
            shutdown_timeout=1,
            auto_decompress=False,  # nobody reads a body
        )
    except (OSError, OverflowError) as error:
        raise SystemExit(f"Cannot serve {host}:{port}: {error}") from None


if __name__ == "__main__":
    args = options("The smallest real chat").parse_args()
    serve(make_app(), args.host, args.port)
