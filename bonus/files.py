"""Files for the chat: they go up to /files, and come down from /files/ID/NAME.

The folder is all there is to know, so that several processes may share it, and its quota.
A file in it is called ID.chat-file, or ID.chat-part while it comes; ID ends with a hash of
its owner's name. Whatever is called otherwise is somebody else's, and left alone.
"""

import asyncio
import base64
import errno
import hashlib
import mimetypes
import os
import re
import secrets
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError
from aiohttp.web_request import BaseRequest

import chat

COST = 2**14  # bytes a file counts on top of its own, so that empty ones are not free
PATIENCE, SLOWEST = 30, 2**15  # seconds for a transfer, and bytes that give it one more
OWN = re.compile(r"[\w-]{16}([\w-]{8})\.chat-(file|part)", re.ASCII)
SHOWN = re.compile(r"image/(?!svg)|audio/|video/|text/plain")  # all else is downloaded

mimetypes.add_type("image/jpeg", ".jfif")  # these are not in every Python's table
mimetypes.add_type("audio/flac", ".flac")
mimetypes.add_type("audio/mp4", ".m4a")
mimetypes.add_type("audio/ogg", ".oga")
mimetypes.add_type("audio/ogg", ".ogg")
mimetypes.add_type("audio/ogg", ".opus")
mimetypes.add_type("video/mp4", ".m4v")
mimetypes.add_type("video/ogg", ".ogv")


def hold(file: FileIO, alone: bool = True) -> None:
    """Lock an open file for all processes, until it is closed; else raise OSError."""
    if sys.platform != "win32":  # where nobody can delete what somebody has open
        import fcntl

        how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        fcntl.flock(file, how | fcntl.LOCK_NB)


def delete(path: Path) -> bool:
    """Delete a file, unless somebody holds it; tell whether it is gone."""
    try:
        with FileIO(path, "r+") as file:
            hold(file)
        path.unlink()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return True


class Files:
    """The files in `folder`; at most so many bytes each, and in all."""

    def __init__(self, folder: Path, max_file: int, max_total: int) -> None:
        self.folder, self.max_total = folder, max_total
        self.max_file = min(max_file, max_total)
        self.lock = asyncio.Lock()  # of what follows, and of the disk
        self.total = 0  # bytes of all files, those that come included, and their COST
        # Of complete ones: COST and size, and path; by owner, and the oldest first.
        self.stored: dict[str, deque[tuple[int, Path]]] = {}
        self.next_survey = 0.0  # by time.monotonic()
        for entry in self.own():
            if entry.name.endswith("part"):
                delete(Path(entry))  # left by a process that died, or it is held
        self.survey()

    async def receive(
        self, body: StreamReader, transport: asyncio.Transport, size: int, user: str
    ) -> str:
        """Write `body` to the disk as it comes; return its ID. If it fails, nothing stays."""
        deadline = asyncio.get_running_loop().time() + PATIENCE + size / SLOWEST
        digest = hashlib.sha256(user.encode()).digest()
        owner = base64.urlsafe_b64encode(digest[:6]).decode()
        id = secrets.token_urlsafe(12) + owner
        path = self.folder / f"{id}.chat-part"
        part = await self.in_turn(self.begin, path, owner)
        try:
            with part:
                while True:
                    async with asyncio.timeout_at(deadline):
                        chunk = await body.readany()
                    if not chunk:
                        break
                    # On a slow disk, 200 uploads would take 340 MiB, and not 150.
                    transport.pause_reading()
                    try:
                        await self.in_turn(self.append, part, chunk, owner)
                    finally:
                        transport.resume_reading()
                    del chunk
            await self.in_turn(self.complete, path, owner)
        except BaseException:
            await self.in_turn(self.give_up, path)
            raise
        return id

    async def in_turn(self, act: Callable[..., Any], *args: Any) -> Any:
        """Do something with the disk, which may be slow, in a thread; one at a time."""
        async with self.lock:
            return await asyncio.to_thread(act, *args)

    def begin(self, path: Path, owner: str) -> FileIO:
        """Return a new file, open and held."""
        self.folder.mkdir(0o700, exist_ok=True)  # somebody may have cleaned up
        self.make_room(COST, owner)
        part = FileIO(path, "x")
        hold(part)
        self.total += COST
        return part

    def append(self, part: FileIO, chunk: bytes, owner: str) -> None:
        """Write the next bytes of a file that comes; on a full disk files go, if that helps."""
        self.make_room(len(chunk), owner)
        freed = 0
        while chunk:
            try:
                written = part.write(chunk)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not full or freed > 2**20 or not self.stored:
                    raise
                freed += self.delete_oldest(owner)
            else:
                self.total += written
                chunk = chunk[written:]

    def give_up(self, path: Path) -> None:
        """Delete what came."""
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self.total -= COST + size

    def complete(self, path: Path, owner: str) -> None:
        """Have a file that came found by its ID."""
        path = path.rename(path.with_suffix(".chat-file"))
        self.store(owner, COST + path.stat().st_size, path)

    def store(self, owner: str, size: int, path: Path) -> None:
        """Note the newest file of `owner`."""
        self.stored.setdefault(owner, deque()).append((size, path))

    def make_room(self, size: int, owner: str) -> None:
        """See to it that `size` bytes more are within the quota."""
        if time.monotonic() > self.next_survey:
            self.survey()
        while self.total + size > self.max_total:
            self.delete_oldest(owner)

    def delete_oldest(self, owner: str) -> int:
        """Delete the oldest file of `owner`, else of who has the most; return its bytes.

        So who uploads much pushes out what is its own, and not what is of others.
        """
        while self.stored:
            if owner not in self.stored:
                used = {
                    who: sum(size for size, _ in f) for who, f in self.stored.items()
                }
                owner = max(used, key=used.__getitem__)
            size, path = self.stored[owner].popleft()
            if not self.stored[owner]:
                del self.stored[owner]
            if delete(path):  # else it is being read, and goes on counting
                self.total -= size
                return size
        raise web.HTTPInsufficientStorage(text="The disk quota is used up")

    def survey(self) -> None:
        """Look what is there: other processes add files, or somebody deletes some."""
        self.total, found = 0, []
        for entry in self.own():
            with suppress(FileNotFoundError):  # just now
                status = entry.stat(follow_symlinks=False)
                size = COST + status.st_size
                self.total += size
                if entry.name.endswith("file"):
                    found.append((status.st_mtime, size, Path(entry)))
        self.stored = {}
        for _, size, path in sorted(found):
            self.store(path.stem[-8:], size, path)
        # The more there is, the longer it takes, and the rarer it is done.
        self.next_survey = time.monotonic() + 1 + len(found) / 10_000

    def own(self) -> Iterator[os.DirEntry[str]]:
        """Yield the files that are ours; a link or a folder may be called like one."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if OWN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    yield entry

    def open(self, id: str) -> FileIO:
        """Return the file with this ID, which nobody deletes meanwhile; or raise OSError."""
        path = self.folder / f"{id}.chat-file"
        if not OWN.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
            raise FileNotFoundError
        file = FileIO(path)
        hold(file, alone=False)
        return file


FILES = web.AppKey("files", Files)


async def upload(request: web.Request) -> web.Response:
    """Take a file of a user who is here, which the user's key proves; answer its path."""
    files, query, transport = request.app[FILES], request.query, request.transport
    user, name = (query.get(key, "").strip() for key in ("user", "name"))
    if transport is None or chat.is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not attach files")
    if not request.app[chat.ROOM].is_key_of(user, query.get("key", "")):
        raise web.HTTPForbidden(text="Log in first: files are for who is in the room")
    if (size := request.content_length) is None:
        raise web.HTTPLengthRequired(text="The size of the file is missing")
    if size > files.max_file:
        text = f"The file is too large: {files.max_file / 2**20:g} MiB at most"
        raise web.HTTPRequestEntityTooLarge(files.max_file, text=text)
    try:
        id = await files.receive(request.content, transport, size, user)
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

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Send the file, or the range of it that is asked for."""
        with self.file:
            size = os.fstat(self.file.fileno()).st_size
            try:
                async with asyncio.timeout(PATIENCE + size / SLOWEST):
                    return await super().prepare(request)
            except TimeoutError:
                raise ConnectionResetError from None


async def download(request: web.Request) -> web.FileResponse:
    """Answer with a file, of which nothing can run, as what its name says it is."""
    files, id = request.app[FILES], request.match_info["id"]
    try:
        file = await asyncio.to_thread(files.open, id)
    except OSError:
        text = "There is no such file, or no longer"
        raise web.HTTPNotFound(text=text) from None
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
    response = Download(file.name, headers=headers)
    response.file = file
    return response


def add_to(app: web.Application, files: Files) -> None:
    """Give the application of a chat its files."""
    app[FILES] = files
    app.router.add_post("/files", upload)
    app.router.add_get("/files/{id}/{name}", download)
