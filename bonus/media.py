# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4,<4"]
# ///
"""The chat with files, notifications and calls: `python bonus/media.py`.

A file or a call is a link said in the room, so chat.py and its protocol stay as they are.
A file goes up to /files and comes down from /files/ID/NAME; /call/ID is the page of a call,
whose members meet over /call/ID/ws; media.js adds all that to the page of the chat.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import mimetypes
import os
import re
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from aiohttp import StreamReader, WSMsgType, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler
from aiohttp.web_request import BaseRequest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import chat

# asyncio reads 256 KiB at once: 200 uploads at once cost 100 MiB, and with this 35.
asyncio.selector_events._SelectorSocketTransport.max_size = 2**16  # type: ignore[attr-defined]
COST = 2**14  # bytes a file counts on top of its own, so that empty ones are not free
PATIENCE, SLOWEST = 30, 2**15  # seconds for a transfer, and bytes that give it one more
SHOWN = re.compile(r"image/(?!svg)|audio/|video/|text/plain")  # all else is downloaded
MAX_MEMBERS = 6  # of a call, in which everyone sends to everyone
MAX_BEHIND = 2**20  # bytes not written to a member; above, the member is let go

mimetypes.add_type("audio/flac", ".flac")  # not in the table of every Python
mimetypes.add_type("audio/mp4", ".m4a")
mimetypes.add_type("audio/ogg", ".ogg")


class Files:
    """The files in `folder`, named by ID; at most so many bytes each, and in all."""

    def __init__(self, folder: Path, max_file: int, max_total: int) -> None:
        self.folder, self.max_file, self.max_total = folder, max_file, max_total
        self.held: Counter[str] = Counter()  # how many write or read a file
        old = [p for p in folder.iterdir() if re.fullmatch(r"[\w-]{22}", p.name)]
        old.sort(key=os.path.getmtime)
        self.sizes = {path.name: COST + path.stat().st_size for path in old}
        self.total = sum(self.sizes.values())

    async def receive(self, body: StreamReader, transport: asyncio.Transport) -> str:
        """Write `body` to the disk as it comes; return its ID. If it fails, nothing stays."""
        id = secrets.token_urlsafe(16)
        self.held[id] += 1
        try:
            self.grow(id, COST)
            with (self.folder / id).open("xb") as disk:
                async for chunk in body.iter_any():
                    self.grow(id, len(chunk))
                    transport.pause_reading()  # else, on a slow disk, 200 MiB more
                    await asyncio.to_thread(disk.write, chunk)  # a disk may be slow
                    transport.resume_reading()
        except BaseException:
            self.delete(id)
            raise
        self.held[id] -= 1
        return id

    def grow(self, id: str, size: int) -> None:
        """Count `size` bytes more; for them, the oldest files that nobody holds go."""
        while self.total + size > self.max_total:
            oldest = next((id for id in self.sizes if not self.held[id]), None)
            if oldest is None:
                raise web.HTTPInsufficientStorage(text="The disk quota is used up")
            self.delete(oldest)
        self.sizes[id] = self.sizes.get(id, 0) + size
        self.total += size

    def delete(self, id: str) -> None:
        """Delete a file, of which there may not be a byte yet."""
        (self.folder / id).unlink(missing_ok=True)
        self.total -= self.sizes.pop(id, 0)
        del self.held[id]


FILES = web.AppKey("files", Files)


async def upload(request: web.Request) -> web.Response:
    """Take a file of a user who is here; answer with its path."""
    files, transport = request.app[FILES], request.transport
    user, name = (request.query.get(key, "").strip() for key in ("user", "name"))
    if transport is None or chat.is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not attach files")
    if user not in request.app[chat.ROOM].names():
        raise web.HTTPForbidden(text="Log in first: files are for who is in the room")
    if (size := request.content_length) is None:
        raise web.HTTPLengthRequired(text="The size of the file is missing")
    if size > min(files.max_file, files.max_total):
        text = f"The file is too large: {files.max_file / 2**20:g} MiB at most"
        raise web.HTTPRequestEntityTooLarge(files.max_file, text=text)
    try:
        async with asyncio.timeout(PATIENCE + size / SLOWEST):
            id = await files.receive(request.content, transport)
    except (TimeoutError, ConnectionError, HttpProcessingError):
        text = "The upload was too slow, or ended early"
        raise web.HTTPRequestTimeout(text=text) from None
    # The disk never sees the name, its link does. Persian and emoji need U+200C and U+200D.
    kept = (c for c in name if c.isprintable() or c in "\u200c\u200d")
    name = re.split(r"[/\\]", "".join(kept))[-1].strip(". ")[-100:] or "file"
    return web.Response(status=201, text=f"/files/{id}/{quote(name)}")


class Download(web.FileResponse):
    """A file on its way: not deleted meanwhile, and not on its way for ever."""

    files: Files
    id: str

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Send the file, or the range of it that is asked for."""
        self.files.held[self.id] += 1
        try:
            async with asyncio.timeout(PATIENCE + self.files.sizes[self.id] / SLOWEST):
                return await super().prepare(request)
        except TimeoutError:
            raise ConnectionResetError from None
        finally:
            self.files.held[self.id] -= 1


async def download(request: web.Request) -> web.FileResponse:
    """Answer with a file, of which nothing can run, as what its name says it is."""
    files, id = request.app[FILES], request.match_info["id"]
    if id not in files.sizes:
        raise web.HTTPNotFound(text="There is no such file, or no longer")
    kind, encoding = mimetypes.guess_type(request.match_info["name"], strict=False)
    headers = {
        "Content-Security-Policy": "sandbox",
        "X-Content-Type-Options": "nosniff",
        # Even the film in a tab of its own comes from another origin than the tab has.
        "Access-Control-Allow-Origin": "*",
    }
    if kind and not encoding and SHOWN.match(kind):
        headers["Content-Type"] = kind + "; charset=utf-8" * (kind == "text/plain")
    else:
        headers["Content-Type"] = "application/octet-stream"
        headers["Content-Disposition"] = "attachment"
    response = Download(files.folder / id, headers=headers)
    response.files, response.id = files, id
    return response


# Calls: the server introduces the members to one another, all else goes from page to page

CALLS = web.AppKey("calls", dict[str, dict[str, chat.User]])  # members by path and ID
ICE = web.AppKey("ice", list[tuple[str, str]])  # URLs and secrets


def ice_server(text: str) -> tuple[str, str]:
    """Return the URL and the secret in `stun:HOST` or `turn:HOST?secret=SECRET`."""
    url, secret = [*re.split(r"[?&]secret=", text, maxsplit=1), ""][:2]
    if not re.fullmatch(r"turns?:\S+" if secret else r"stuns?:\S+", url):
        raise argparse.ArgumentTypeError(
            "expected stun:HOST or turn:HOST?secret=SECRET"
        )
    return url, secret


def with_credentials(url: str, secret: str) -> dict[str, str]:
    """Return an RTCIceServer as coturn's use-auth-secret wants it, for a day from now."""
    if not secret:
        return {"urls": url}
    user = str(int(time.time()) + 86_400)
    digest = base64.b64encode(hmac.digest(secret.encode(), user.encode(), "sha1"))
    return {"urls": url, "username": user, "credential": digest.decode()}


def tell(member: chat.User, said: object) -> None:
    """Send `said`, as JSON, and wait for nobody."""
    if member.transport.get_write_buffer_size() > MAX_BEHIND:
        member.transport.abort()
    if not (member.closed or member.transport.is_closing()):
        text = json.dumps(said).encode()
        member.transport.write(chat.frame(WSMsgType.TEXT, text))


def introduce(request: web.Request, call: dict[str, chat.User]) -> None:
    """Tell the members of `call` who they are."""
    ice = [with_credentials(*server) for server in request.app[ICE]]
    names = {id: member.name for id, member in call.items()}
    for id, member in call.items():
        tell(member, {"id": id, "members": names, "ice": ice})


async def signalling(request: web.Request) -> web.WebSocketResponse:
    """Let a member into a call; pass on [TO, KIND, CONTENT] as [FROM, KIND, CONTENT].

    Only who has the same key comes back as the same member: the ID is what it hashes to.
    """
    calls, path, transport = request.app[CALLS], request.path, request.transport
    user, key = (request.query.get(key, "") for key in ("user", "key"))
    name = "".join(filter(str.isprintable, user)).strip()[:32] or "Nobody"
    id = hashlib.sha256(key.encode()).hexdigest()[:16]
    if transport is None or chat.is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not join")
    member = chat.User(name, transport)
    with suppress(ValueError):  # aiohttp's, of a header that is not ASCII
        await member.prepare(request)
    if not member.prepared:
        raise web.HTTPBadRequest
    call = calls.setdefault(path, {})
    if before := call.pop(id, None):  # over a connection that is lost
        before.cut_off()
        introduce(request, call)
    if len(call) == MAX_MEMBERS:
        await member.close(code=4000, message=b"the call is full, it has 6 members")
        return member
    call[id] = member
    try:
        introduce(request, call)
        async for message in member:
            if message.type is WSMsgType.TEXT:
                with suppress(ValueError, TypeError, RecursionError):  # of nonsense
                    to, kind, content = json.loads(message.data)
                    if to in call and kind in ("description", "candidate"):
                        tell(call[to], [id, kind, content])
            elif message.type is WSMsgType.PING and member.is_ready():
                transport.write(chat.frame(WSMsgType.PONG, message.data))
            if message.type is not WSMsgType.ERROR:  # with which aiohttp ends it
                await member.pay(256 + len(message.data))
    finally:
        if call.get(id) is member:
            del call[id]
            introduce(request, call)
        if not calls.get(path):
            calls.pop(path, None)
        asyncio.get_running_loop().call_later(2, member.cut_off)  # seconds
    return member


# The chat with all that


def with_script(page: str) -> str:
    """Return chat.html with media.js, and with the policy that this needs."""
    for old, new in (
        ("script-src ", "script-src 'self' "),
        ("img-src ", "media-src 'self'; img-src 'self' "),
        ("</body>", '<script type="module" src="media.js"></script>\n</body>'),
    ):
        if page.count(old) != 1:
            raise ValueError(f"chat.html has not one place for {old}")
        page = page.replace(old, new)
    return page


@web.middleware
async def add_script(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Add media.js to the page; the lists of users have the same address."""
    response = await handler(request)
    if isinstance(response, web.Response) and request.path == "/":
        text = response.text or ""
        response.text = with_script(text) if text.startswith("<!DOCTYPE") else text
    return response


async def asset(request: web.Request) -> web.FileResponse:
    """Answer with one of the two files beside this one."""
    name = "media.js" if request.path == "/media.js" else "call.html"
    return web.FileResponse(HERE / name, headers={"Cache-Control": "no-cache"})


def make_app(files: Files, ice: list[tuple[str, str]]) -> web.Application:
    """Return the chat with `files`, and with calls over `ice`; or raise ValueError."""
    with_script((HERE.parent / "chat.html").read_text("utf-8"))
    app = chat.make_app()
    app[FILES], app[CALLS], app[ICE] = files, {}, ice
    app.middlewares.append(add_script)
    app.router.add_get("/media.js", asset)
    app.router.add_post("/files", upload)
    app.router.add_get("/files/{id}/{name}", download)
    app.router.add_get("/call/{id}", asset)
    app.router.add_get("/call/{id}/ws", signalling, allow_head=False)
    return app


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = chat.options("The chat with files, notifications and calls")
    add = parser.add_argument
    add("--max-file", default=25, type=int, help="MiB; default: %(default)s")
    add("--max-total", default=1024, type=int, help="MiB; default: %(default)s")
    add("--files", help="a folder; default: one that goes when the server does")
    servers = "stun:HOST or turn:HOST?secret=SECRET; may be repeated"
    add("--ice", default=[], type=ice_server, action="append", help=servers)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chat-") as temporary:
        try:
            folder = Path(args.files or temporary)
            files = Files(folder, args.max_file * 2**20, args.max_total * 2**20)
            app = make_app(files, args.ice)
        except (OSError, ValueError) as error:
            sys.exit(f"media.py: {error}")
        chat.serve(app, args.host, args.port)


if __name__ == "__main__":
    main()
