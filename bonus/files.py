"""Files for the chat: they go up to /files, and come down from /files/ID/NAME.

The folder is all there is to know, so that several processes may share it, and its quota.
A file in it is called ID.chat-file, or ID.chat-part while it comes; ID ends with a hash of
its owner's name. Whatever is called otherwise is somebody else's, and left alone.
"""

import asyncio
import base64
import errno
import mimetypes
import re
import secrets
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError

import chat

COST = 2**14  # bytes a file counts on top of its own, so that empty ones are not free
PATIENCE, SLOWEST = 30, 2**15  # seconds for a transfer, and bytes that give it one more
OWN = re.compile(r"[\w-]{24}\.chat-(file|part)", re.ASCII)
SHOWN = re.compile(r"image/(?!svg)|audio/|video/|text/plain")  # all else is downloaded
KINDS = {"image/jpeg": ".jfif", "audio/flac": ".flac", "audio/mp4": ".m4a"}
KINDS |= {"audio/ogg": ".oga .ogg .opus", "video/mp4": ".m4v", "video/ogg": ".ogv"}
for kind, suffixes in KINDS.items():  # which are not in every Python's table
    for suffix in suffixes.split():
        mimetypes.add_type(kind, suffix)


def is_own(path: Path) -> bool:
    """Tell whether this is a file of ours; a link or a folder may be called like one."""
    return bool(OWN.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


def hold(path: Path, mode: str) -> FileIO:
    """Open a file, and lock it for one writer or many readers; or raise OSError."""
    file = FileIO(path, mode)
    if sys.platform != "win32":  # where nobody can delete what somebody has open
        import fcntl

        how = fcntl.LOCK_SH if mode == "r" else fcntl.LOCK_EX
        fcntl.flock(file, how | fcntl.LOCK_NB)  # for all processes, until it is closed
    return file


def delete(path: Path) -> bool:
    """Delete a file, unless somebody holds it; tell whether it is gone."""
    with suppress(OSError):
        hold(path, "r+").close()
        path.unlink()
    return not path.exists()


class Files:
    """The files in `folder`; at most so many bytes each, and in all."""

    def __init__(self, folder: Path, max_file: int, max_total: int) -> None:
        self.folder, self.max_total = folder, max_total
        self.max_file = min(max_file, max_total)
        self.lock = asyncio.Lock()  # of what follows, and of the disk
        self.total = 0  # bytes of all files, those that come included, and their COST
        # COST and size of complete ones: by owner, and by path, the oldest first.
        self.stored: dict[str, OrderedDict[Path, int]] = defaultdict(OrderedDict)
        for path in filter(is_own, folder.glob("*.chat-part")):
            delete(path)  # left by a process that died, or it is held
        self.survey()

    async def receive(self, body: StreamReader, size: int, user: str) -> str:
        """Write `body` to the disk as it comes; return its ID. If it fails, nothing stays."""
        now = asyncio.get_running_loop().time
        end = now() + PATIENCE + size / SLOWEST
        owner = base64.urlsafe_b64encode(sha256(user.encode()).digest()[:6]).decode()
        path = self.folder / f"{secrets.token_urlsafe(12)}{owner}.chat-part"
        part = await self.in_turn(self.begin, path, owner)
        try:
            with part:
                # No more at once: meanwhile, as much again comes into aiohttp's buffer.
                while chunk := await asyncio.wait_for(body.read(2**16), end - now()):
                    await self.in_turn(self.append, part, chunk, owner)
            await self.in_turn(self.complete, path, owner)
        except BaseException:
            await self.in_turn(self.give_up, path)
            raise
        return path.stem

    async def in_turn(self, act: Callable[..., Any], *args: Any) -> Any:
        """Do something with the disk, which may be slow, in a thread; one at a time."""
        async with self.lock:
            return await asyncio.to_thread(act, *args)

    def begin(self, path: Path, owner: str) -> FileIO:
        """Return a new file, open and held."""
        self.folder.mkdir(0o700, exist_ok=True)  # somebody may have cleaned up
        self.make_room(COST, owner)
        part = hold(path, "x")
        self.total += COST
        return part

    def append(self, part: FileIO, chunk: bytes, owner: str) -> None:
        """Write the next bytes of a file that comes; on a full disk files go, if that helps."""
        self.make_room(len(chunk), owner)
        least = self.total - 2**20  # if that does not help, no more will
        while chunk:
            try:
                written = part.write(chunk)
                self.total += written
                chunk = chunk[written:]
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not full or self.total < least or not self.stored:
                    raise
                self.make_room(self.max_total - self.total + 1, owner)  # one file goes

    def give_up(self, path: Path) -> None:
        """Delete what came."""
        with suppress(FileNotFoundError):
            self.total -= COST + path.stat().st_size
            path.unlink()

    def complete(self, path: Path, owner: str) -> None:
        """Have a file that came found by its ID."""
        path = path.rename(path.with_suffix(".chat-file"))
        self.stored[owner][path] = COST + path.stat().st_size

    def make_room(self, size: int, owner: str) -> None:
        """See to it that `size` bytes more are within the quota; or raise a 507.

        The oldest files of `owner` go, then those of who has the most: none of who has few.
        """
        if time.monotonic() > self.next_survey:
            self.survey()
        while self.total + size > self.max_total:
            if not self.stored:
                raise web.HTTPInsufficientStorage(text="The disk quota is used up")
            if (who := owner) not in self.stored:
                who = max(self.stored, key=lambda who: sum(self.stored[who].values()))
            path, freed = self.stored[who].popitem(last=False)
            if not self.stored[who]:
                del self.stored[who]
            if delete(path):  # else it is being read, and goes on counting
                self.total -= freed

    def survey(self) -> None:
        """Look what is there: other processes add files, or somebody deletes some."""
        found = []
        for path in filter(is_own, self.folder.iterdir()):
            with suppress(FileNotFoundError):  # just now
                status = path.stat()
                found.append((status.st_mtime, COST + status.st_size, path))
        self.total = sum(size for _, size, _ in found)
        self.stored.clear()
        for _, size, path in sorted(found):
            if path.suffix == ".chat-file":
                self.stored[path.stem[-8:]][path] = size
        # The more there is, the longer it takes, and the rarer it is done.
        self.next_survey = time.monotonic() + 1 + len(found) / 10_000

    def open(self, id: str) -> FileIO:
        """Return the file with this ID, which nobody deletes meanwhile; or raise a 404."""
        path = self.folder / f"{id}.chat-file"
        with suppress(OSError):
            if is_own(path):
                return hold(path, "r")
        raise web.HTTPNotFound(text="There is no such file, or no longer")


FILES = web.AppKey("files", Files)
ROUTES = web.RouteTableDef()


@ROUTES.post("/files")
async def upload(request: web.Request) -> web.Response:
    """Take a file of a user who is here, which the user's key proves; answer its path."""
    files, query = request.app[FILES], request.query
    user, name = (query.get(key, "").strip() for key in ("user", "name"))
    if chat.is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not attach files")
    if not request.app[chat.ROOM].is_key_of(user, query.get("key", "")):
        raise web.HTTPForbidden(text="Log in first: files are for who is in the room")
    if (size := request.content_length) is None:
        raise web.HTTPLengthRequired(text="The size of the file is missing")
    if size > files.max_file:
        text = f"The file is too large: {files.max_file / 2**20:g} MiB at most"
        raise web.HTTPRequestEntityTooLarge(files.max_file, text=text)
    try:
        id = await files.receive(request.content, size, user)
    except (TimeoutError, ConnectionError, HttpProcessingError):
        text = "The upload was too slow, or ended early"
        raise web.HTTPRequestTimeout(text=text) from None
    except OSError as error:
        chat.log.error("A file cannot be stored: %s", error)
        text = "The server cannot store the file: its disk is full, or fails"
        raise web.HTTPInsufficientStorage(text=text) from None
    # The disk never sees the name, its link does. Persian and emoji need U+200C and U+200D.
    kept = (c for c in name if c.isprintable() or c in "\u200c\u200d")
    name = re.split(r"[/\\]", "".join(kept))[-1].strip(". ")[-100:] or "file"
    return web.Response(status=201, text=f"/files/{id}/{quote(name)}")


class Download(web.FileResponse):
    """A file on its way: not deleted meanwhile, and not on its way for ever."""

    file: FileIO

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the file, or the range of it that is asked for."""
        with self.file:
            size = self.file.seek(0, SEEK_END)
            try:
                async with asyncio.timeout(PATIENCE + size / SLOWEST):
                    return await super().prepare(request)
            except TimeoutError:
                raise ConnectionResetError from None


@ROUTES.get(r"/files/{id:[\w-]+}/{name}")
async def download(request: web.Request) -> web.FileResponse:
    """Answer with a file, of which nothing can run, as what its name says it is."""
    file = await asyncio.to_thread(request.app[FILES].open, request.match_info["id"])
    path = "./" + request.match_info["name"]  # a name alone might be taken for a URL
    kind, encoding = mimetypes.guess_type(path, strict=False)
    headers = {
        "Content-Security-Policy": "sandbox",
        "X-Content-Type-Options": "nosniff",
        # Even the film in a tab of its own comes from another origin than the tab has.
        "Access-Control-Allow-Origin": "*",
    }
    if kind and not encoding and SHOWN.match(kind):
        headers["Content-Type"] = kind + "; charset=utf-8" * (kind == "text/plain")
    else:  # aiohttp itself says application/octet-stream of ID.chat-file
        headers["Content-Disposition"] = "attachment"
    response = Download(file.name, headers=headers)
    response.file = file
    return response
