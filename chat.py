# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14,<4"]
# ///
"""The smallest real chat: one room, one process, WebSockets (RFC 6455).

`python chat.py` serves the page, chat.html, at / and the room at /ws?user=NAME. Everyone
in the room hears everything said in it, in the same order. A message is the same bytes
for everyone, so it is encoded once; and all that is said in one iteration of the event
loop leaves in one write to each user. There are no passwords, and nothing is stored.
"""

import argparse
import asyncio
import html
import logging
import re
import struct
import sys
import time
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.http import HttpProcessingError

PAGE = Path(__file__).with_name("chat.html")
MAX_NAME = 32  # characters in a user's name
MAX_MESSAGE = 2**20  # bytes in a message; a longer one closes its sender with 1009
MAX_BATCH = 2**18  # bytes said but not yet sent; above, whoever has more to say waits
MAX_BEHIND = 2**22  # bytes sent to a user but not yet taken; above, the user is let go
BURST = 2**20  # bytes a user may say at once: the size of the token bucket
RATE = 2**18  # bytes a second a user may say then: its refill
OVERHEAD = 64  # bytes a message costs on top of its own, so that tiny ones are not free
NAP = 0.1  # seconds between looks at whether a user who must wait is still connected
NOTICE_DELAY = 0.1  # seconds; changes of the user list within it share one notice
HEARTBEAT = 25  # seconds of silence before a ping; the pong has half of that
CLOSE_TIMEOUT = 2  # seconds for a user who leaves to take what was sent, then abort

log = logging.getLogger("chat")


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a whole frame, unmasked, as a server sends it (RFC 6455, section 5.2)."""
    first, size = 0x80 | opcode, len(payload)  # 0x80: no fragments follow
    if size < 126:
        return struct.pack("!BB", first, size) + payload
    if size < 2**16:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


# Nobody else's: what users say begins with "NAME: ".
REFRESH_USERS = frame(WSMsgType.TEXT, b"{{RefreshUsers}}")


class User(web.WebSocketResponse):
    """The WebSocket of one user."""

    transport: asyncio.Transport  # that of the request, once it is about to be prepared

    def __init__(self, name: str) -> None:
        super().__init__(
            timeout=CLOSE_TIMEOUT,
            heartbeat=HEARTBEAT,
            autoping=False,  # else aiohttp answers a flood of pings unseen, for free
            compress=False,  # what is compressed is not the same bytes for everyone
            max_msg_size=MAX_MESSAGE + 1,  # in aiohttp, the first size that is too big
        )
        self.name = name
        self.paid_until = 0.0  # time.monotonic() at which all that was said is paid

    async def pay(self, size: int) -> None:
        """Charge a message of `size` bytes to the token bucket; wait while overdrawn.

        Nobody reads the socket meanwhile: its buffers fill, and TCP slows the user down.
        """
        start = max(self.paid_until, time.monotonic() - BURST / RATE)
        self.paid_until = start + (size + OVERHEAD) / RATE
        while (debt := self.paid_until - time.monotonic()) > 0:
            if self.transport.is_closing():
                break  # and what is left in aiohttp's queue is heard
            await asyncio.sleep(min(debt, NAP))

    async def close(
        self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = False
    ) -> bool:
        """Close as aiohttp does, which calls this too, but wait for no stalled peer."""
        if not self.prepared:  # the peer was gone before
            return False
        return await super().close(code=code, message=message, drain=False)


class Room:
    """Who is logged in, and what has been said but not sent yet."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by name, in order of login
        self.batch: list[bytes] = []  # whole frames
        self.batch_size = 0  # bytes
        self.notice: asyncio.TimerHandle | None = None

    def enter(self, user: User) -> None:
        """Log `user` in. That the name is free, the caller has just seen."""
        self.users[user.name] = user
        log.info("%s logged in, %d here", user.name, len(self.users))
        self.users_changed()

    def leave(self, user: User, why: str) -> None:
        """Log `user` off, unless that was done before, and free the name at once."""
        if self.users.get(user.name) is user:
            del self.users[user.name]
            log.info("%s %s, %d left", user.name, why, len(self.users))
            self.users_changed()
            # transport.close() waits for its buffer to drain: if the peer stalls, for ever.
            loop = asyncio.get_running_loop()
            loop.call_later(CLOSE_TIMEOUT, user.transport.abort)

    def users_changed(self) -> None:
        """Schedule one notice for all changes of the next NOTICE_DELAY seconds."""
        if self.notice is None:
            loop = asyncio.get_running_loop()
            self.notice = loop.call_later(NOTICE_DELAY, self.announce)

    def announce(self) -> None:
        """Tell everyone to ask for the list of users again."""
        self.notice = None
        self.say(REFRESH_USERS)

    def say(self, frame: bytes) -> None:
        """Add `frame` to the batch, which leaves on the event loop's next iteration."""
        if not self.batch:
            asyncio.get_running_loop().call_soon(self.flush)
        self.batch.append(frame)
        self.batch_size += len(frame)

    def flush(self) -> None:
        """Deliver the batch, and begin the next."""
        batch = b"".join(self.batch)
        self.batch.clear()
        self.batch_size = 0
        self.deliver(batch)

    def deliver(self, batch: bytes) -> None:
        """Write `batch`, whole frames, to everyone."""
        for user in list(self.users.values()):
            self.write(user, batch)

    def write(self, user: User, frames: bytes) -> None:
        """Write `frames` to `user`, without waiting; let go a user too far behind."""
        if user.prepared and not user.transport.is_closing():
            user.transport.write(frames)
            if user.transport.get_write_buffer_size() > MAX_BEHIND:
                self.leave(user, "was let go: too far behind")
                user.transport.abort()

    async def close(self, code: int, reason: str) -> None:
        """Log everyone off; takes CLOSE_TIMEOUT at most, even if nobody answers."""
        closing = []
        for user in list(self.users.values()):
            self.leave(user, f"was let go: {reason}")
            closing.append(user.close(code=code, message=reason.encode()))
        await asyncio.gather(*closing, return_exceptions=True)


ROOM = web.AppKey("room", Room)


def is_cross_origin(request: web.Request) -> bool:
    """Tell whether a page of another host sent `request` (RFC 6455, section 10.2)."""
    # scheme://host:port, or null; the scheme may differ, if a proxy does the TLS
    origin = request.headers.get("Origin")
    host = request.host.lower()
    return origin is not None and origin.partition("://")[2].lower() != host


def from_operator(request: web.Request) -> bool:
    """Tell whether somebody on this machine, not a page of another site, sent `request`."""
    headers = request.headers
    return (
        ip_address(request.remote or "::").is_loopback
        and not any(h in headers for h in ("Forwarded", "X-Forwarded-For", "Via"))
        and headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        and not is_cross_origin(request)
        # Under another name than this, the page may be another site's (DNS rebinding).
        and bool(re.fullmatch(r"(localhost|127[.\d]+|\[::1])(:\d+)?", request.host))
    )


async def page(request: web.Request) -> web.Response:
    """Answer with the page, or with what the query asks for, in the article's words."""
    room = request.app[ROOM]
    content_type = "text/html"
    if request.query.get("getUsers") == "1":
        names = map(html.escape, room.users)
        text = "\r\n".join(f'<option value="{name}">{name}</option>' for name in names)
    elif request.query.get("getUsers2") == "1":
        text, content_type = "\r\n".join(room.users), "text/plain"
    # HEAD comes here with GET, but must not change anything (RFC 9110, section 9.2.1).
    elif request.query.get("resetUsers") == "1" and request.method != "HEAD":
        if not from_operator(request):
            raise web.HTTPForbidden(
                text="Only the operator may reset the users: from the server's machine, "
                "as localhost, through no proxy and from no other site"
            )
        await room.close(WSCloseCode.OK, "the users were reset")
        text, content_type = "Users reseted", "text/plain"
    else:
        text = PAGE.read_text("utf-8")
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(text=text, content_type=content_type, headers=headers)


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """Log a user in, and pass on what the user says until the user leaves.

    Raises HTTPForbidden, HTTPBadRequest, HTTPConflict or HTTPUpgradeRequired, with the
    reason as its text.
    """
    room = request.app[ROOM]
    name = request.query.get("user", "").strip()
    if is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not log in")
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or ":" in name:
        rule = f"1 to {MAX_NAME} printable characters, no colon"
        raise web.HTTPBadRequest(text=f"This is not a user name: {rule}")
    if (namesake := room.users.get(name)) and namesake.transport.is_closing():
        room.leave(namesake, "lost the connection")  # but has data left to take
    if name in room.users:
        raise web.HTTPConflict(text=f"User {name} already logged in")
    user = User(name)
    key = request.headers.get("Sec-WebSocket-Key", "")
    if not (key.isascii() and user.can_prepare(request) and request.transport):
        raise web.HTTPUpgradeRequired(
            text="Connect to this address with a WebSocket",
            headers={"Upgrade": "websocket", "Sec-WebSocket-Version": "13"},
        )
    user.transport = request.transport
    room.enter(user)  # no await since the name was looked up: it is still free
    why = "lost the connection"
    try:
        await user.prepare(request)
        async for message in user:
            if message.type is WSMsgType.ERROR:  # and aiohttp has closed the WebSocket
                why = f"was let go: {message.data}"
                break
            said = message.data  # of a binary message, a ping or a pong
            if message.type is WSMsgType.TEXT:
                while room.batch_size > MAX_BATCH:
                    await asyncio.sleep(0)
                if room.users.get(name) is not user:
                    break  # let go, with messages left in aiohttp's queue
                said = frame(WSMsgType.TEXT, f"{name}: {message.data}".encode())
                room.say(said)
            elif message.type is WSMsgType.PING:
                room.write(user, frame(WSMsgType.PONG, said))
            await user.pay(len(said))
        else:
            if user.close_code != WSCloseCode.ABNORMAL_CLOSURE:
                why = "logged off"
    except ConnectionError:
        pass
    finally:
        room.leave(user, why)
    return user


async def on_shutdown(app: web.Application) -> None:
    await app[ROOM].close(WSCloseCode.GOING_AWAY, "the server stops")


def make_app() -> web.Application:
    """Return the chat as an application with a room of its own, app[ROOM]."""
    app = web.Application()
    app[ROOM] = Room()
    app.router.add_get("/", page)
    app.router.add_post("/", page)
    app.router.add_get("/ws", websocket, allow_head=False)
    app.on_shutdown.append(on_shutdown)
    return app


def is_news(record: logging.LogRecord) -> bool:
    """Keep off the log what strangers could fill it with: no error of this program."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (HttpProcessingError, OSError)):  # a bad request, a peer gone
        return False
    return record.name != "aiohttp.websocket"  # which warns of odd subprotocols


def main() -> None:
    """Serve the chat until Ctrl-C or SIGTERM; if that cannot be, say why and exit."""
    parser = argparse.ArgumentParser(description="The smallest real chat")
    parser.add_argument("--host", default="localhost", help="default: %(default)s")
    parser.add_argument("--port", default=8080, type=int, help="default: %(default)s")
    args = parser.parse_args()
    if not 0 <= args.port < 2**16:  # aiohttp would wrap it around
        sys.exit(f"chat.py: there is no port {args.port}, the highest is 65535")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().handlers[0].addFilter(is_news)
    try:
        web.run_app(
            make_app(),
            host=args.host,
            port=args.port,
            print=partial(print, flush=True),
            access_log=None,
            backlog=1024,  # after a restart, everyone comes back at once
            shutdown_timeout=1,
            auto_decompress=False,  # nobody reads a body, nor inflates it then
        )
    except OSError as error:
        sys.exit(f"chat.py: cannot serve {args.host}:{args.port}: {error.strerror}")


if __name__ == "__main__":
    main()
