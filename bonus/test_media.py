# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "pytest", "pytest-aiohttp", "playwright", "psutil",
#     "axe-playwright-python",
# ]
# ///
"""Files, notifications and the signalling of calls: each test is one sentence of them.

What is seen is the wire, the disk, and a real Chromium. The calls are in test_call.py.
"""

import asyncio
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import wave
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import media
import psutil
import pytest
import pytest_asyncio
from aiohttp import ClientSession, ClientWSTimeout, TCPConnector, WSMsgType, web
from aiohttp.test_utils import TestClient, TestServer
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, expect
from yarl import URL

from test_chat import chromium, program

pytestmark = pytest.mark.asyncio(loop_scope="session")  # a browser starts slowly
on_page = pytest.mark.page
fixture = pytest_asyncio.fixture(loop_scope="session")
HERE = Path(__file__).parent
LIMIT = 30  # seconds after which whatever is awaited is not going to happen
MEBIBYTE = 2**20
UPLOAD = "POST /files?user=Jack&key=k&name=a\nContent-Length: 50000"
UPGRADE = (
    "GET /call/call/ws?key=jill\nUpgrade: websocket\nConnection: Upgrade\n"
    "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
)
Chat = TestClient[web.Request, web.Application]
expect.set_options(timeout=LIMIT * 1000)


class Server(TestServer):
    """A test server that runs as chat.serve does."""

    async def _make_runner(self, **options: Any) -> web.AppRunner:
        return web.AppRunner(self.app, shutdown_timeout=1, auto_decompress=False)


@asynccontextmanager
async def serve(
    folder: Path, file: int, total: int, *ice: str
) -> AsyncIterator[TestClient]:
    """Serve a chat in which Jack is, with so many bytes a file and in all."""
    servers = [media.calls.ice_server(text) for text in ice]
    app = media.chat.make_app()
    media.add_to(app, media.files.Files(folder, file, total), servers)
    async with TestClient(Server(app), connector=TCPConnector(limit=0)) as client:
        await client.ws_connect("/ws?user=Jack&key=k.1")
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@fixture
async def client(folder):
    async with serve(folder, 100_000, 250_000) as client:
        yield client


async def attach(
    client: Chat, body: Any, name: str = "cat.png", user: str = "Jack", **options: Any
) -> str:
    """Upload as `user`; return the path, or the status and the reason of a refusal."""
    query = {"user": user, "key": "k", "name": name}
    response = await client.post("/files", params=query, data=body, **options)
    text = await response.text()
    assert response.content_type == "text/plain"
    return text if response.status == 201 else f"{response.status} {text}"


async def get(client: Chat, path: str | URL) -> tuple[int, bytes]:
    response = await client.get(path)
    return response.status, await response.read()


async def until(condition: Callable[[], Any]) -> None:
    """Let everything run until `condition` holds."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.005)


async def connect(
    port: int | None, head: str, body: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send the head of a request and the beginning of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first, *rest = head.splitlines()
    lines = [f"{first} HTTP/1.1", f"Host: 127.0.0.1:{port}", *rest, "\r\n"]
    writer.write("\r\n".join(lines).encode() + body)
    return reader, writer


async def line(reader: asyncio.StreamReader) -> str:
    async with asyncio.timeout(LIMIT):
        return (await reader.readline()).decode()


def stored(folder: Path) -> list[int]:
    """Return the sizes of the files in `folder`."""
    return sorted(path.stat().st_size for path in folder.iterdir())


# The page


async def test_the_page_is_the_chats_with_a_script_and_a_policy_for_it(client):
    text = (await get(client, "/"))[1].decode()
    for part in (
        '<script type="module" src="media.js" data-max="100000"></script>',
        "script-src 'self' 'unsafe-inline';",
        "img-src 'self' data:; media-src 'self';",
        "default-src 'none';",
        "require-trusted-types-for 'script'",
    ):
        assert text.count(part) == 1
    for script in "/media.js", "/call.js":
        assert "javascript" in (await client.get(script)).content_type


@pytest.mark.parametrize("name", ["<!DOCTYPE", "<!-- scripts -->", "<!-- policy -->"])
async def test_the_lists_of_users_stay_as_they_are(client, name):
    await client.ws_connect(URL("/ws").with_query(user=name))
    assert await get(client, "/?getUsers2=1") == (200, f"Jack\r\n{name}".encode())
    status, options = await get(client, "/?getUsers=1")
    assert (status, options.count(b"<script"), options.count(b"&lt;")) == (200, 0, 2)


async def test_the_page_of_a_call_has_the_colours_of_the_chats(client):
    chat, call = [(await get(client, path))[1].decode() for path in ("/", "/call/a")]
    colours = re.search(r":root \{.*?\n\}", chat, re.DOTALL)[0]
    assert (
        "--accent: #3558c8" in colours and "--accent: #9db4ff" in colours
    )  # both schemes
    assert call.count(colours) == 1


async def test_a_page_with_no_place_for_the_script_ends_the_start(tmp_path):
    (tmp_path / "bonus").mkdir()
    for name in "media.py", "files.py", "calls.py":
        shutil.copy(HERE / name, tmp_path / "bonus")
    shutil.copy(HERE.parent / "chat.py", tmp_path)
    page = (
        (HERE.parent / "chat.html").read_text("utf-8").replace("<!-- scripts -->", "")
    )
    (tmp_path / "chat.html").write_text(page, "utf-8")
    error = "media.py: chat.html has not one place for <!-- scripts -->"
    assert await failure("--port", "0", cwd=tmp_path / "bonus") == (1, error)


# Files


async def test_an_attached_file_can_be_fetched_as_it_was(client):
    path = await attach(client, bytes(range(256)))
    assert re.fullmatch(r"/files/[\w-]{24}/cat\.png", path)
    response = await client.get(path)
    assert await response.read() == bytes(range(256))
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "sandbox"
    assert (await get(client, "/files/" + "a" * 24 + "/cat.png"))[0] == 404


async def test_a_range_of_a_file_can_be_fetched(client):
    path = await attach(client, b"0123456789", "film.mp4")
    response = await client.get(path, headers={"Range": "bytes=2-4"})
    assert (response.status, await response.text()) == (206, "234")
    assert response.headers["Content-Range"] == "bytes 2-4/10"


@pytest.mark.parametrize(
    ("suffix", "content_type"),
    [
        *(("jfif", "image/jpeg"), ("webp", "image/webp"), ("mp3", "audio/mpeg")),
        *(("ogg", "audio/ogg"), ("m4a", "audio/mp4"), ("webm", "video/webm")),
        ("TXT", "text/plain; charset=utf-8"),
        *((kind, None) for kind in ["svg", "html", "js", "pdf", "svgz", "txt.gz", "x"]),
    ],
)
async def test_pictures_sound_films_and_plain_text_are_shown_all_else_is_downloaded(
    client, suffix, content_type
):
    response = await client.get(await attach(client, b"<script>", f"a.{suffix}"))
    expected = content_type or "application/octet-stream"
    assert response.headers["Content-Type"] == expected
    disposition = response.headers.get("Content-Disposition")
    assert disposition == (None if content_type else "attachment")


@pytest.mark.parametrize(
    "name",
    ["data:image%2FSVG%2Bxml,", "data:image%2Fx%00,", "%2F%2F%5B", "x:%2F%2F%5B"],
)
async def test_a_link_with_a_url_for_a_name_is_downloaded(client, name):
    folder, _, _ = (await attach(client, b"<svg>", "a.png")).rpartition("/")
    response = await client.get(URL(f"{folder}/{name}", encoded=True))
    assert (response.status, response.content_type) == (200, "application/octet-stream")
    assert response.headers["Content-Disposition"] == "attachment"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../x", "x"),
        ("C:\\cats\\cat.png", "cat.png"),
        ("/", "file"),
        ("..", "file"),
        ("a\0b\r\n\u202e.txt", "ab.txt"),
        ("żółw 猫 نمی‌خواهم.png", "żółw 猫 نمی‌خواهم.png"),
        ("100%2Fa#b&c?.png", "100%2Fa#b&c?.png"),
        ("猫" * 255 + ".png", "猫" * 96 + ".png"),
    ],
)
async def test_a_name_keeps_its_script_and_loses_its_path(client, folder, name, kept):
    path = await attach(client, b"1", name)
    assert path.isascii()
    assert unquote(path.split("/", 3)[3]) == kept
    assert await get(client, URL(path, encoded=True)) == (200, b"1")
    assert stored(folder) == [1]
    assert list(folder.parent.iterdir()) == [folder]


async def test_only_who_is_in_the_room_may_attach_and_no_page_of_another_site(
    client, folder
):
    for user in "Jill", "", "jack":
        response = await client.post(f"/files?user={user}&name=a", data=b"1")
        text = "Log in first: files are for who is in the room"
        assert (response.status, await response.text()) == (403, text)
    for origin in "https://example.com", "null":
        answer = await attach(client, b"1", headers={"Origin": origin})
        assert answer == "403 The pages of other sites may not attach files"
    for key in "l", "", "k.1":
        response = await client.post(f"/files?user=Jack&key={key}&name=a", data=b"1")
        assert response.status == 403
    await client.ws_connect("/ws?user=Joe")  # who has no key cannot prove a thing
    assert (await attach(client, b"1", user="Joe"))[:4] == "403 "
    response = await client.post("/files?user=Joe&key=&name=a", data=b"1")
    assert response.status == 403
    assert stored(folder) == []
    own = {"Origin": f"http://127.0.0.1:{client.port}"}
    assert (await attach(client, b"1", headers=own)).startswith("/files/")


async def test_a_file_too_large_or_of_unknown_size_is_refused_before_it_comes(client):
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1000)

    assert (await attach(client, bytes(100_001)))[:25] == "413 The file is too large"
    assert await attach(client, endless()) == "411 The size of the file is missing"
    assert (await attach(client, bytes(100_000))).startswith("/files/")


async def test_the_oldest_files_go_when_the_quota_is_used_up(client, folder):
    sizes = 100_000, 90_000, 80_000
    paths = [await attach(client, bytes(size)) for size in sizes]
    assert [(await get(client, path))[0] for path in paths] == [404, 200, 200]
    assert stored(folder) == [80_000, 90_000]


async def test_an_uploader_pushes_out_its_own_files_and_none_of_who_has_less(
    client, folder
):
    for user in "Jill", "Joe":
        await client.ws_connect(f"/ws?user={user}&key=k")
    jacks = await attach(client, bytes(100_000))
    jills = [
        await attach(client, bytes(size), user="Jill") for size in (40_000, 70_000)
    ]
    assert [(await get(client, path))[0] for path in (jacks, *jills)] == [200, 404, 200]
    for _ in range(20):
        await attach(client, b"", user="Jill")
    assert stored(folder) == [0] * 8 + [100_000]
    joes = await attach(client, b"1", user="Joe")  # who has none to go; most has Jill
    for path in jacks, joes:
        assert (await get(client, path))[0] == 200
    assert stored(folder) == [0] * 7 + [1, 100_000]


async def test_even_empty_files_use_up_the_quota(client, folder):
    for _ in range(20):
        assert (await attach(client, b"")).startswith("/files/")
    assert stored(folder) == [0] * 15  # each counts 16 KiB


async def test_a_file_that_is_being_uploaded_counts_and_stays(client, folder):
    begun = [await connect(client.port, UPLOAD, bytes(49_999)) for _ in range(3)]
    await until(lambda: stored(folder) == [49_999] * 3)
    assert await attach(client, bytes(90_000)) == "507 The disk quota is used up"
    for reader, writer in begun:
        writer.write(b"1")
        assert "201" in await line(reader)
    assert stored(folder) == [50_000] * 3


async def test_a_file_that_is_being_read_stays(folder):
    async with serve(folder, 32 * MEBIBYTE, 40 * MEBIBYTE) as client:
        path = await attach(client, bytes(32 * MEBIBYTE), "film.mp4")
        reader, writer = await connect(client.port, f"GET {path}")
        assert "200" in await line(reader)  # and the rest is not read
        for _ in range(2):
            answer = await attach(client, bytes(9 * MEBIBYTE))
            assert answer == "507 The disk quota is used up"
        assert stored(folder) == [32 * MEBIBYTE]
        writer.transport.abort()
        async with asyncio.timeout(LIMIT):
            while not (await attach(client, bytes(9 * MEBIBYTE))).startswith("/files/"):
                pass
        assert stored(folder) == [9 * MEBIBYTE]


async def test_an_upload_that_ends_early_leaves_nothing(client, folder):
    _, writer = await connect(client.port, UPLOAD, bytes(40_000))
    await until(lambda: stored(folder) == [40_000])
    writer.close()
    await until(lambda: not any(folder.iterdir()))
    for size in 100_000, 100_000:  # for which there is room again
        assert (await attach(client, bytes(size))).startswith("/files/")
    assert stored(folder) == [100_000, 100_000]


async def test_an_upload_that_stalls_is_ended(client, folder, monkeypatch):
    reader, writer = await connect(client.port, UPLOAD, bytes(49_999))
    await until(lambda: stored(folder) == [49_999])
    pass_a_while(monkeypatch)
    assert "408" in await line(reader)
    assert stored(folder) == []
    writer.close()


async def test_a_download_that_stalls_is_ended(folder, monkeypatch):
    async with serve(folder, 32 * MEBIBYTE, 40 * MEBIBYTE) as client:
        path = await attach(client, bytes(32 * MEBIBYTE))
        reader, writer = await connect(client.port, f"GET {path}")
        assert "200" in await line(reader)
        pass_a_while(monkeypatch)
        async with asyncio.timeout(LIMIT):
            while not (await attach(client, bytes(9 * MEBIBYTE))).startswith("/files/"):
                await asyncio.sleep(0.05)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(32 * MEBIBYTE)
        writer.close()


class SmallDisk(FileIO):
    """A file on a disk that holds `left` bytes more, or fails."""

    left, error = 0, errno.ENOSPC

    def write(self, chunk: Any) -> int:
        part = chunk[: SmallDisk.left]
        SmallDisk.left -= len(part)
        if not part:
            raise OSError(SmallDisk.error, os.strerror(SmallDisk.error))
        return super().write(part)


@pytest.fixture
def small_disk(monkeypatch):
    monkeypatch.setattr(media.files, "FileIO", SmallDisk)
    delete = media.files.delete

    def deletes(path: Path) -> bool:
        SmallDisk.left += path.stat().st_size
        return delete(path)

    monkeypatch.setattr(media.files, "delete", deletes)


async def test_on_a_full_disk_the_oldest_files_go(client, folder, small_disk):
    SmallDisk.left, SmallDisk.error = 100_000, errno.ENOSPC
    paths = [await attach(client, os.urandom(30_000)) for _ in range(3)]
    body = os.urandom(40_000)
    last = await attach(client, body)
    assert [(await get(client, path))[0] for path in paths] == [404, 200, 200]
    assert await get(client, last) == (200, body)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
async def test_a_disk_that_takes_nothing_is_said_and_costs_no_traceback(
    client, folder, small_disk, error, caplog
):
    SmallDisk.left, SmallDisk.error = 60_000, error
    path = await attach(client, bytes(20_000)) if error != errno.ENOSPC else None
    text = "507 The server cannot store the file: its disk is full, or fails"
    assert await attach(client, bytes(90_000)) == text
    assert stored(folder) == [20_000] * bool(path)  # of others, none goes for nothing
    assert "Traceback" not in caplog.text
    SmallDisk.left = 90_000
    assert (await attach(client, bytes(90_000))).startswith("/files/")


async def test_a_folder_that_was_cleaned_away_is_made_again(client, folder):
    path = await attach(client, b"1")
    shutil.rmtree(folder)
    assert (await get(client, path))[0] == 404
    path = await attach(client, b"2")
    assert await get(client, path) == (200, b"2")


async def test_what_is_not_its_own_in_the_folder_is_left_alone(folder):
    secret = folder.parent / "secret"
    secret.write_bytes(b"secret")
    id = "a" * 24
    for suffix in ".chat-file", ".chat-part":
        (folder / f"{'l' * 24}{suffix}").symlink_to(secret)
        (folder / f"{'d' * 24}{suffix}").mkdir()
        (folder / f"{'f' * 23}{suffix}").write_bytes(bytes(300_000))
        os.mkfifo(folder / f"{'p' * 24}{suffix}")
    (folder / ("f" * 22)).write_bytes(bytes(300_000))
    (folder.parent / f"{id}.chat-file").write_bytes(b"another chat's")
    (folder / f"{id}.chat-part").write_bytes(bytes(300_000))  # of a crash
    (folder / f"{id}.chat-file").write_bytes(b"own")
    before = sorted(folder.iterdir())
    before.remove(folder / f"{id}.chat-part")
    async with serve(folder, 100_000, 250_000) as client:
        assert sorted(folder.iterdir()) == before
        foreign = (
            "l" * 24,
            "d" * 24,
            "f" * 23,
            "p" * 24,
            "f" * 22,
            "%2e%2e",
            f"..%2F{id}",
        )
        for name in foreign:
            assert (await get(client, URL(f"/files/{name}/a", encoded=True)))[0] == 404
        assert await get(client, f"/files/{id}/a") == (200, b"own")
        for _ in range(4):
            assert (await attach(client, bytes(90_000))).startswith("/files/")
        before.remove(folder / f"{id}.chat-file")
        assert set(folder.iterdir()) > set(before)
    assert secret.read_bytes() == b"secret"


async def test_two_servers_share_a_folder_and_its_quota(folder):
    async with (
        serve(folder, 100_000, 250_000) as first,
        serve(folder, 100_000, 250_000) as second,
    ):
        paths = [await attach(first, bytes(90_000)), await attach(second, b"2")]
        assert await get(first, paths[1]) == (200, b"2")
        begun = await connect(first.port, UPLOAD, bytes(49_999))
        await until(lambda: stored(folder) == [1, 49_999, 90_000])
        await asyncio.sleep(1.1)  # a server looks what others did once a second
        # What one of them reads or writes, no other deletes, even as it starts.
        media.files.Files(folder, 1, 1)
        paths.append(await attach(second, bytes(90_000)))
        assert [(await get(second, path))[0] for path in paths] == [404, 200, 200]
        begun[1].write(b"1")
        assert "201" in await line(begun[0])
        assert stored(folder) == [1, 50_000, 90_000]


def pass_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the clock of the event loop forward by more than 32 MiB at 32 KiB/s."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + 1100)


# The server as a process


async def start(*options: str, cwd: Path = HERE, **environment: str) -> Process:
    command = [sys.executable, str(cwd / "media.py"), "--host", "127.0.0.1", *options]
    return await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=PIPE, env=os.environ | environment
    )


async def failure(*options: str, cwd: Path = HERE) -> tuple[int | None, str]:
    """Return the status, and the last line on stderr, of a start that fails."""
    process = await start(*options, cwd=cwd)
    _, said = await asyncio.wait_for(process.communicate(), LIMIT)
    return process.returncode, said.decode().splitlines()[-1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def running(port: int, *options: str) -> AsyncIterator[Process]:
    """Run media.py at `port` until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:  # who is killed leaves its own behind
        process = await start("--port", str(port), *options, TMPDIR=folder)
        try:
            assert process.stdout
            assert b"Running on" in await process.stdout.readline()
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


async def test_files_in_a_folder_of_ones_own_outlive_the_server(folder):
    (folder / "my holiday.jpg").write_bytes(b"1")  # is none of this
    os.utime(folder / "my holiday.jpg", (0, 0))
    options = ("--files", str(folder), "--max-file", "1", "--max-total", "4")
    port, body = free_port(), bytes(1_000_000)
    url = f"http://127.0.0.1:{port}"

    async def upload() -> str:
        async with http.ws_connect(f"{url}/ws?user=Jack&key=k"):
            response = await http.post(f"{url}/files?user=Jack&key=k", data=body)
            return await response.text()

    async with ClientSession() as http:
        async with running(port, *options):
            paths = [await upload() for _ in range(4)]
        for age, path in enumerate(paths):  # the last one becomes the oldest
            name = f"{path.split('/')[2]}.chat-file"
            os.utime(folder / name, (9 - age, 9 - age))
        async with running(port, *options):
            await upload()
            answers = [await http.get(url + path) for path in paths]
            assert [answer.status for answer in answers] == [200, 200, 200, 404]
            assert await answers[0].read() == body
    assert (folder / "my holiday.jpg").read_bytes() == b"1"


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGHUP])
async def test_without_a_folder_of_ones_own_the_files_go_with_the_server(
    tmp_path, monkeypatch, signal_
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    port = free_port()
    async with running(port) as process, ClientSession() as http:
        url = f"http://127.0.0.1:{port}"
        _jack = await http.ws_connect(f"{url}/ws?user=Jack&key=k")
        _member = await http.ws_connect(f"{url}/call/a/ws?user=Jack")
        await http.post(f"{url}/files?user=Jack&key=k", data=b"1")
        _, _writer = await connect(port, UPLOAD, bytes(9))
        await until(lambda: len([*tmp_path.rglob("chat-*/*")]) == 2)
        process.send_signal(signal_)
        await asyncio.wait_for(process.wait(), LIMIT)
        (place,) = tmp_path.iterdir()  # where it had its folder
        assert list(place.iterdir()) == []
        assert process.returncode == 0
        assert process.stderr
        assert b"Traceback" not in await process.stderr.read()


async def test_200_uploads_at_once_cost_under_200_mebibytes_even_on_a_slow_disk(
    folder, monkeypatch
):
    (folder.parent / "sitecustomize.py").write_text(
        "import asyncio, time\n"
        "thread = asyncio.to_thread\n"
        "slow = lambda act, *args: (time.sleep(0.005), act(*args))[1]\n"
        "asyncio.to_thread = lambda *args: thread(slow, *args)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    options = ("--files", str(folder), "--max-total", "8000")
    port, loop, size = free_port(), asyncio.get_running_loop(), 20 * MEBIBYTE
    head = f"POST /files?user=Jack&key=k HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n"
    sent = memoryview(head.encode() + bytes(size))

    async def upload() -> None:
        with socket.socket() as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", port))
            await loop.sock_sendall(connection, sent)

    async with running(port, *options) as process, ClientSession() as http:
        _jack = await http.ws_connect(f"http://127.0.0.1:{port}/ws?user=Jack&key=k")
        server = psutil.Process(process.pid)
        before = most = server.memory_info().rss
        begun = [asyncio.create_task(upload()) for _ in range(200)]
        async with asyncio.timeout(2 * LIMIT):
            # None ends: all are cut off when each has a part of its 20 MiB on the disk.
            while len(sizes := stored(folder)) < 200 or sizes[0] < MEBIBYTE / 3:
                await asyncio.sleep(0.02)
                most = max(most, server.memory_info().rss)
        for task in begun:
            task.cancel()
        assert most - before < 200 * MEBIBYTE


@pytest.mark.parametrize(
    "option",
    ["--ice=stun", "--ice=http://a", "--ice=turn:a", "--ice=stun:a?secret=b"],
)
async def test_a_bad_option_is_an_error_of_one_line(option):
    error = "argument --ice: expected stun:HOST or turn:HOST?secret=SECRET"
    assert await failure(option) == (2, f"media.py: error: {error}")


# Signalling


async def join(client: Chat, name: str, key: str, call: str = "call") -> Any:
    path = f"/call/{call}/ws?user={name}&key={key}"
    return await client.ws_connect(path, timeout=ClientWSTimeout(ws_close=0.1))


async def told(ws: Any, what: type = dict) -> Any:
    """Return the next news of the members, or the next signal, which is a list."""
    async with asyncio.timeout(LIMIT):
        while not isinstance(said := json.loads(await ws.receive_str()), what):
            pass
        return said


async def meet(client: Chat, *keys: str, call: str = "call") -> list[Any]:
    """Return the members of a call, all introduced, each with its key as its name."""
    members = [await join(client, key.title(), key, call) for key in keys]
    for member in members:
        while len((await told(member))["members"]) < len(keys):
            pass
    return members


# The first 16 digits of the SHA-256 of "jack", and of "jill".
JACK, JILL = "31611159e7e6ff78", "8cf37351b60f0008"


async def test_the_members_are_told_who_comes_and_goes(client):
    jack = await join(client, "Jack", "jack")
    assert await told(jack) == {"id": JACK, "members": {JACK: "Jack"}, "ice": []}
    jill = await join(client, " Jill ", "jill")
    both = {JACK: "Jack", JILL: "Jill"}
    assert (await told(jack))["members"] == both
    assert await told(jill) == {"id": JILL, "members": both, "ice": []}
    await jill.close()
    assert (await told(jack))["members"] == {JACK: "Jack"}


async def test_of_700_who_come_and_go_at_once_few_are_ever_introduced(client):
    jack, jill = await meet(client, "jack", "jill")

    async def flood() -> None:
        for number in range(700):
            await (await join(client, "Mallory", str(number))).close()

    began, flooding = time.monotonic(), asyncio.create_task(flood())
    seen = set[str]()
    while not flooding.done():
        with suppress(TimeoutError):
            seen |= json.loads(await jack.receive_str(timeout=0.1))["members"].keys()
    await flooding
    assert len(seen - {JACK, JILL}) <= 1 + 2 * (time.monotonic() - began)
    await jill.send_json([JACK, "candidate", {}])
    assert await told(jack, list) == [JILL, "candidate", {}]


async def test_who_comes_anew_again_and_again_may_say_no_more_than_who_stays(client):
    jack, _ = await meet(client, "jack", "jill")
    candidate = json.dumps([JACK, "candidate", "x" * 16_000])
    members, heard = dict[str, str](), 0

    async def hear() -> None:
        nonlocal members, heard
        async for message in jack:
            said = json.loads(message.data)
            if isinstance(said, dict):
                members = said["members"]
            else:
                assert said[0] in members
                heard += len(message.data)

    async def talk(seat: int) -> None:
        for turn in range(2):
            path = f"/call/call/ws?user=Mallory&key={seat}-{turn}"
            async with client.ws_connect(path) as mallory:
                await mallory.send_str(candidate)  # before all are told who it is
                await told(mallory)
                for _ in range(7):
                    await mallory.send_str(candidate)
            # Now the server has read all of that, since it has answered the close frame.

    began, hearing = time.monotonic(), asyncio.create_task(hear())
    await asyncio.gather(*(talk(seat) for seat in range(4)))
    await jack.close()
    await hearing
    # A burst for each of the four, and 32 KiB/s for each, and for those who come.
    assert heard <= 4 * 131_072 + 5 * 32_768 * (time.monotonic() - began)
    assert heard >= 2 * 4 * 7 * 16_000


async def test_a_question_is_answered_with_what_all_were_told(client):
    jack, jill = await meet(client, "jack", "jill")
    await jack.send_bytes(b"?")
    both = {JACK: "Jack", JILL: "Jill"}
    assert await told(jack) == {"id": JACK, "members": both, "ice": []}
    with pytest.raises(TimeoutError):
        await jill.receive(timeout=0.1)
    await jill.close()
    await jack.send_bytes(b"?")  # before all are told that Jill has left
    assert (await told(jack))["members"] == {JACK: "Jack"}


async def test_descriptions_and_candidates_reach_one_member_of_the_call(client):
    jack, jill, john = await meet(client, "jack", "jill", "john")
    [other] = await meet(client, "jill", call="another")
    for said in ["description", {"sdp": "ż"}], ["candidate", {"candidate": "a"}]:
        await jack.send_json([JILL, *said])
        assert await told(jill, list) == [JACK, *said]
    await jack.close()
    assert len((await told(john))["members"]) == 2  # and nothing before
    with pytest.raises(TimeoutError):
        await other.receive(timeout=0.1)


async def test_nothing_else_is_passed_on(client):
    jack, jill = await meet(client, "jack", "jill")
    for text in (
        *("", "hello", "[]", "{}", "1", "null", "[" * 16_000, "9" * 16_000),
        f'["{JILL}"]',
        f'["{JILL}", "text", {{}}]',
        f'["{JILL}", ["candidate"], {{}}]',
        f'["{JILL}", "candidate", {{}}, 1]',
        '[[], "candidate", {}]',
        f'["{JACK[::-1]}", "candidate", {{}}]',
        *(f'["{JILL}", "candidate", [{no}]]' for no in ["NaN", "-Infinity", "1e999"]),
        f'["{JILL}", "candidate", "\\ud800"]',
    ):
        await jack.send_str(text)
    await jack.send_bytes(f'["{JILL}", "candidate", {{"candidate": "a"}}]'.encode())
    await jack.send_json([JILL, "candidate", {}])
    assert await told(jill, list) == [JACK, "candidate", {}]


@pytest.mark.parametrize("filler", ["\x7f", "9e15,", "ż"], ids=ascii)
async def test_16_kibibytes_that_grow_on_their_way_arrive(client, filler):
    jack, jill = await meet(client, "jack", "jill")
    text = filler * (16_330 // len(filler.encode()))
    content = f"[{text}0]" if "," in filler else f'"{text}"'
    await jack.send_str(f'["{JILL}", "candidate", {content}]')
    assert await told(jill, list) == [JACK, "candidate", json.loads(content)]


async def test_a_message_of_over_16_kibibytes_closes_its_sender_alone(client):
    jack, jill = await meet(client, "jack", "jill")
    await jack.send_str(f'["{JILL}", "candidate", "'.ljust(2**14 - 2, "a") + '"]')
    assert (await told(jill, list))[1] == "candidate"
    await jack.send_str(" " * (2**14 + 1))
    async with asyncio.timeout(LIMIT):
        async for _ in jack:
            pass
    assert jack.close_code == 1009
    assert len((await told(jill))["members"]) == 1


async def test_who_sends_too_much_is_read_more_slowly_but_loses_nothing(client):
    jack, jill = await meet(client, "jack", "jill")
    began, sdp = time.monotonic(), "a" * 16_000

    async def send() -> None:
        for number in range(12):  # 188 KiB, of which 128 are free, at 32 KiB/s
            await jack.send_json([JILL, "description", {"sdp": sdp, "n": number}])

    sending = asyncio.create_task(send())
    numbers = [(await told(jill, list))[2]["n"] for _ in range(12)]
    assert numbers == list(range(12))
    assert time.monotonic() - began > 1
    await sending


async def test_the_seventh_is_told_that_the_call_is_full_until_one_leaves(client):
    members = [await join(client, "Jack", key) for key in "abcdef"]
    jill = await join(client, "Jill", "jill")
    closed = await jill.receive()
    assert closed.data == 4000
    assert closed.extra == "the call is full, it has 6 members"
    await members[0].close()
    assert (await told(await join(client, "Jill", "jill")))["id"] == JILL


async def test_who_comes_again_with_the_same_key_is_the_same_member(client):
    members = await meet(client, *"abcde", "jack")
    again = await join(client, "Jack", "jack")  # also where the call is full
    said = await told(again)
    assert said["id"] == JACK
    assert len(said["members"]) == 6
    closed = await members[5].receive()
    while closed.type is WSMsgType.TEXT:
        closed = await members[5].receive()
    assert (closed.data, closed.extra) == (1000, "logged in again elsewhere")
    assert len((await told(members[4]))["members"]) == 6  # nobody has gone


async def test_the_pages_of_other_sites_may_not_join(client):
    for headers in {"Origin": "https://example.com"}, {"Origin": "null"}:
        response = await client.get("/call/a/ws", headers=headers)
        assert response.status == 403


async def begin(client: Chat, **query: str) -> str:
    """Return the ID of a new call, or the status and the reason of a refusal."""
    response = await client.post("/calls", params={"user": "Jack", "key": "k"} | query)
    text = await response.text()
    if response.status == 201:
        return text.removeprefix("/call/")
    return f"{response.status} {text}"


async def test_a_call_is_begun_by_who_is_in_the_room(client):
    calls = {await begin(client) for _ in range(2)}
    assert len(calls) == 2
    assert all(re.fullmatch(r"[\w-]{38}", call) for call in calls)
    for query in {"key": "l"}, {"key": ""}, {"user": "Jill"}:
        text = "403 Log in first: calls are for who is in the room"
        assert await begin(client, **query) == text


async def test_turn_credentials_are_those_of_coturns_use_auth_secret(
    folder, monkeypatch
):
    turn = "turns:[::1]:5349?transport=tcp&secret=no&rth+"
    async with serve(folder, 1, 1, "stun:example.com", turn) as client:
        monkeypatch.setattr(time, "time", lambda: 1_700_000_000.9)
        call = await begin(client)
        said = await told(await join(client, "Jack", "jack", call))
        relay = {
            "urls": "turns:[::1]:5349?transport=tcp",
            "username": f"1700003600:{JACK}",
            "credential": "FNBnBuZn7briJnCa1Yuwyto77BA=",
        }
        assert said["ice"] == [{"urls": "stun:example.com"}, relay]


async def test_only_calls_that_were_begun_in_the_room_get_credentials(folder):
    async with serve(folder, 1, 1, "stun:a", "turn:b?secret=north") as client:
        call = await begin(client)
        tampered = ("A" if call[0] != "A" else "B") + call[1:]
        for id in "anything", tampered, call[:-1], "ż" * 38, "0" * 16:
            said = await told(await join(client, "Jack", "jack", id))
            assert said["ice"] == [{"urls": "stun:a"}]
        said = await told(await join(client, "Jack", "jack", call))
        assert len(said["ice"]) == 2


async def test_a_member_who_does_not_read_is_let_go_and_stalls_nobody(
    client, monkeypatch
):
    monkeypatch.setattr(media.chat, "BURST", 2**30)  # else it takes a minute
    jill, writer = await connect(client.port, UPGRADE)
    assert "101" in await line(jill)
    senders = await meet(client, *"abcde")
    signal = json.dumps([JILL, "candidate", "a" * 16_000])

    async def flood(ws: Any) -> None:
        while True:
            await ws.send_str(signal)

    floods = [asyncio.create_task(flood(ws)) for ws in senders[1:]]
    async with asyncio.timeout(20):  # seconds; a heartbeat that fails takes longer
        while JILL in (await told(senders[0]))["members"]:
            pass
    for task in floods:
        task.cancel()
    writer.close()


# In several processes


def readme(marker: str) -> str:
    """Return the indented block of the README that has `marker` in it."""
    text = (HERE / "README.md").read_text("utf-8")
    blocks = re.findall(r"^(?: {4}.*\n|\n(?= {4}))+", text, re.MULTILINE)
    [block] = [block for block in blocks if marker in block]
    return re.sub("^ {4}", "", block, flags=re.MULTILINE)


@asynccontextmanager
async def process(ready: str, *command: str) -> AsyncIterator[None]:
    """Run a program until the end of the block, which begins when it says `ready`."""
    output = {"stdout": PIPE, "stderr": STDOUT}
    running = await asyncio.create_subprocess_exec(*command, **output)
    try:
        assert running.stdout
        async with asyncio.timeout(LIMIT):
            while ready not in (await running.stdout.readline()).decode():
                assert running.returncode is None
        yield
    finally:
        with suppress(ProcessLookupError):
            running.terminate()
        await running.communicate()


NGINX = """
daemon off; pid {folder}/pid; error_log stderr notice; events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/1; proxy_temp_path {folder}/2;
    fastcgi_temp_path {folder}/3; uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
{servers}
}}
"""


async def test_two_processes_behind_nginx_have_one_room_one_folder_and_calls_that_meet(
    folder, tmp_path
):
    pytest.importorskip("redis")
    ports = [free_port() for _ in range(4)]
    first, second, redis, port = map(str, ports)
    inner = readme("client_max_body_size") + readme("location /call/")
    servers = readme("hash $uri") + readme("upstream chat").replace(
        "listen 80;", f"listen 127.0.0.1:{port};" + inner
    )
    servers = servers.replace("8081", first).replace("8082", second)
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(NGINX.format(folder=tmp_path, servers=servers))
    store = [program("redis-server"), "--port", redis, "--save", ""]
    proxy = [program("nginx"), "-c", str(configuration), "-e", "stderr"]
    options = ("--redis", f"redis://127.0.0.1:{redis}", "--files", str(folder))
    url = f"http://127.0.0.1:{port}"
    async with (
        process("Ready to accept", *store),
        running(ports[0], *options),
        running(ports[1], *options),
        process("start worker", *proxy),
        ClientSession() as http,
        http.ws_connect(f"{url}/ws?user=Jack&key=k.1"),
        http.ws_connect(f"{url}/ws?user=Jill&key=l"),
    ):
        body = os.urandom(2 * MEBIBYTE)
        query = "user=Jack&key=k&name=cat.png"
        for _ in range(4):  # at both processes, by turns
            answer = await http.post(f"{url}/files?{query}", data=body)
            assert answer.status == 201
            path = await answer.text()
            for at in ports[:2]:
                got = await http.get(f"http://127.0.0.1:{at}{path}")
                assert await got.read() == body
        assert (
            await http.post(f"{url}/files?{query}x".replace("=k", "=l"))
        ).status == 403
        assert len(stored(folder)) == 4
        for _ in range(6):
            call = url + await (await http.post(f"{url}/calls?{query}")).text()
            members = [
                await http.ws_connect(f"{call}/ws?user={name}&key={name}")
                for name in ("Jack", "Jill", "John")
            ]
            for member in members:
                while len((await told(member))["members"]) < 3:
                    pass


async def test_several_processes_need_a_folder_that_they_share():
    error = "media.py: error: --redis needs --files, a folder that all processes share"
    assert await failure("--redis", "redis://localhost") == (2, error)


# The page, in Chromium


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser():
    async with chromium() as browser:
        yield browser


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def whole():
    """A whole Chromium: what is called its headless shell has no notifications."""
    async with chromium(names=["chromium"]) as browser:
        yield browser


# Records what is shown, and can hide the page, as another tab in front of it would.
SPY = """
window.shown = [];
window.Notification = class extends Notification {
  constructor(title, options) {
    super(title, options);
    shown.push([title, options.body]);
  }
};
let hidden = false;
const frame = window.requestAnimationFrame;
window.requestAnimationFrame = (draw) => hidden ? 0 : frame(draw);
Object.defineProperty(document, "hidden", { get: () => hidden });
window.hide = (now) => {
  hidden = now;
  document.dispatchEvent(new Event("visibilitychange"));
};
"""


@asynccontextmanager
async def entered(
    browser: Browser, folder: Path, **options: Any
) -> AsyncIterator[Page]:
    """The page with John in the room; 1 MiB a file, 3 MiB in all; its errors fail."""
    async with serve(folder, MEBIBYTE, 3 * MEBIBYTE) as client:
        url = str(client.make_url("/"))
        context = await browser.new_context(base_url=url, **options)
        page, errors = await context.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console", lambda m: "Content Security" in m.text and errors.append(m.text)
        )
        await page.add_init_script(SPY)
        await page.goto("/")
        await enter(page)
        yield page
        await context.close()
        assert errors == []


@fixture
async def page(browser, folder):
    async with entered(browser, folder) as page:
        yield page


@fixture
async def tab(whole, folder):
    """The page, which may show notifications."""
    async with entered(whole, folder, permissions=["notifications"]) as page:
        yield page


async def enter(page: Page) -> None:
    await page.get_by_role("textbox", name="User name").fill("John")
    await page.get_by_role("textbox", name="User name").press("Enter")
    await expect(page.locator("#status")).to_have_text("Online")


def log(page: Page) -> Locator:
    return page.get_by_role("log")


def uploads(page: Page) -> Locator:
    return page.get_by_role("list", name="Uploads").get_by_role("listitem")


def notify(page: Page) -> Locator:
    return page.get_by_role("switch", name="Notify")


async def pick(page: Page, *files: tuple[str, bytes]) -> None:
    async with page.expect_file_chooser() as chooser:
        await page.get_by_role("button", name="Attach").click()
    picked = [{"name": name, "mimeType": "", "buffer": body} for name, body in files]
    await (await chooser.value).set_files(picked)


def picture() -> bytes:
    """Return a picture of 64 x 600 pixels, in the simplest format there is."""
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 115_254, 0, 54, 40, 64, 600,
                       1, 24, 0, 115_200, 0, 0, 0, 0)  # fmt: skip
    return head + bytes([200, 120, 60]) * 64 * 600


def sound() -> bytes:
    """Return one second of sound."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as track:
        track.setparams((1, 1, 8000, 0, "NONE", ""))
        track.writeframes(bytes(8000))
    return stream.getvalue()


async def say(page: Page, *texts: str) -> None:
    """Say `texts` as Jill, who need not be in the room before."""
    url = f"{page.url.rstrip('/')}/ws?user=Jill"
    async with ClientSession() as http, http.ws_connect(url) as jill:
        for text in texts:
            await jill.send_str(text)
        async with asyncio.timeout(LIMIT):
            while f"Jill: {texts[-1]}" not in await jill.receive_str():
                pass


@on_page
async def test_picked_files_are_said_in_their_order_and_a_draft_stays(page):
    message = page.get_by_role("textbox", name="Message")
    await message.fill("half a word")
    await pick(page, ("żółw + 100%.bin", b"1"), ("a.bin", b"2"))
    links = log(page).get_by_role("link")
    await expect(links).to_have_text(["żółw + 100%.bin", "a.bin"])
    for number, body in enumerate([b"1", b"2"]):
        href = await links.nth(number).get_attribute("href")
        assert await (await page.request.get(href)).body() == body
    await expect(uploads(page)).to_have_count(0)
    await expect(message).to_have_value("half a word")


@on_page
@pytest.mark.parametrize("event", ["drop", "paste"])
async def test_a_dropped_or_pasted_file_is_attached(page, event):
    await page.get_by_role("textbox", name="Message").evaluate(
        """(tag, event) => {
          const data = new DataTransfer();
          data.items.add(new File(["hello"], "notes.txt"));
          const options = { bubbles: true, cancelable: true };
          tag.dispatchEvent(event === "paste"
            ? new ClipboardEvent(event, { ...options, clipboardData: data })
            : new DragEvent(event, { ...options, dataTransfer: data }));
        }""",
        event,
    )
    link = log(page).get_by_role("link", name="notes.txt")
    answer = await page.request.get(await link.get_attribute("href"))
    assert await answer.body() == b"hello"


@on_page
async def test_a_picture_is_shown_and_the_log_stays_at_its_end(page):
    await pick(page, ("cat.bmp", picture()), ("dog.bmp", picture()))
    for name in "cat.bmp", "dog.bmp":
        image = log(page).get_by_role("img", name=name)
        await page.wait_for_function(
            "i => i.naturalHeight == 600", arg=await image.element_handle()
        )
        assert await image.get_attribute("loading") == "lazy"
        assert (await image.bounding_box())["height"] == 256
    at_end = "e => e.scrollHeight - e.scrollTop - e.clientHeight < 5"
    await page.wait_for_function(at_end, arg=await log(page).element_handle())
    violations = (await Axe().run(page)).response["violations"]
    assert [violation["help"] for violation in violations] == []


@on_page
async def test_sound_and_films_get_their_players(page):
    await pick(page, ("song.wav", sound()), ("film.webm", b""))
    film = log(page).locator("video[controls][aria-label='film.webm']")
    await expect(film).to_be_visible()
    length = """async (audio) => {
      audio.preload = "auto";
      await new Promise((done) => audio.ondurationchange = done);
      return audio.duration;
    }"""
    await expect(film).to_have_attribute("preload", "metadata")  # its first picture
    song = log(page).locator("audio[controls][aria-label='song.wav']")
    assert await song.evaluate(length) == 1
    await page.goto(await song.get_attribute("src"))
    alone = "() => document.querySelector('video, audio').duration === 1"
    await page.wait_for_function(alone)


@on_page
async def test_only_what_is_exactly_a_file_of_this_server_is_shown(page):
    asked, id = [], "a" * 24
    page.on("request", lambda request: asked.append(request.url))
    links = [
        f"http://example.com/files/{id}/cat.png",
        f"{page.url.replace('127.0.0.1', 'localhost')}files/{id}/cat.png",
        f"{page.url}files.png",
        *(
            f"{page.url}files/{rest}"
            for rest in (
                *("../?resetUsers=1#.png", "..%2f?resetUsers=1#.png", "cat.png"),
                *(f"{id}/../../?resetUsers=1#.png", f"{id}/%2e%2e/%2E%2E/?a#.png"),
                *(f"{id}/?a=.png", f"{id}/#.png", f"{id}/a?b=.png", f"{id}/a#.png"),
                *(f"{id}/a/b.png", f"{id}b/cat.png", f"{id[1:]}/cat.png"),
            )
        ),
    ]
    await say(page, *links, "the end")
    await expect(log(page)).to_contain_text("the end")
    await expect(log(page).get_by_role("link")).to_have_text(links)
    await expect(log(page).locator("img")).to_have_count(0)
    await say(page, f"{page.url}files/x/../{id}/cat.png")  # it is, when resolved
    await expect(log(page).locator("img")).to_have_attribute("alt", "cat.png")
    assert [url for url in asked if "getUsers2" not in url] in (
        [],
        [f"{page.url}files/{id}/cat.png"],
    )


@on_page
async def test_a_name_is_shown_as_typed_without_what_turns_it_round(page):
    name = "photo\u202egpj.exe نمی‌خواهم\u2066.jfif"
    await say(page, f"{page.url}files/{'a' * 24}/{quote(name)}")
    shown = "photogpj.exe نمی‌خواهم.jfif"
    await expect(log(page).get_by_role("img")).to_have_attribute("alt", shown)


@on_page
@pytest.mark.parametrize("name", ["a.html", "a.svg"])
async def test_markup_is_downloaded_and_runs_nothing(page, name):
    svg = (
        "<svg xmlns='http://www.w3.org/2000/svg'><script>opener.ran = 1</script></svg>"
    )
    await pick(page, (name, svg.encode()))
    link = log(page).get_by_role("link", name=name)
    async with page.expect_download() as download:
        await link.evaluate("link => { link.removeAttribute('rel'); link.click() }")
    assert (await download.value).suggested_filename == name
    assert await page.evaluate("window.ran") is None


@on_page
async def test_a_refusal_is_said_in_the_servers_words(page):
    asked = []
    page.on("request", lambda it: it.method == "POST" and asked.append(it.url))
    await pick(page, ("film.bin", bytes(MEBIBYTE + 1)))
    alert = uploads(page).get_by_role("alert")
    await expect(alert).to_have_text("film.bin: The file is too large: 1 MiB at most")
    assert asked == []  # it is known before a byte is sent
    await uploads(page).get_by_role("button", name="Dismiss").click()
    await expect(alert).to_have_count(0)
    await page.get_by_role("button", name="Log off").click()
    await pick(page, ("a.bin", b"1"))
    words = "a.bin: Log in first: files are for who is in the room"
    await expect(alert).to_have_text(words)


@on_page
async def test_a_folder_that_is_dropped_is_said_to_be_one(page, tmp_path):
    (tmp_path / "holiday").mkdir()
    session = await page.context.new_cdp_session(page)
    files = [str(tmp_path / "holiday")]
    data = {"items": [], "files": files, "dragOperationsMask": 1}
    for kind in "dragEnter", "dragOver", "drop":
        event = {"type": kind, "x": 200, "y": 200, "data": data}
        await session.send("Input.dispatchDragEvent", event)
    alert = uploads(page).get_by_role("alert")
    said = "holiday: This is a folder, or a file that cannot be read"
    await expect(alert).to_have_text(said)
    await expect(uploads(page)).to_have_count(1)


@on_page
async def test_an_upload_shows_how_far_it_is_and_can_be_cancelled(page, folder):
    session = await page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1}
    await session.send("Network.enable")
    await session.send(
        "Network.emulateNetworkConditions", {**slow, "uploadThroughput": 2**16}
    )
    await pick(page, ("film.bin", bytes(MEBIBYTE)), ("later.bin", b"1"))
    bar = page.get_by_role("progressbar", name="film.bin")
    await page.wait_for_function(
        "b => 0 < b.value && b.value < 1", arg=await bar.element_handle()
    )
    for name in "later.bin", "film.bin":
        row = uploads(page).filter(has_text=name)
        await row.get_by_role("button", name="Cancel").click()
    await expect(uploads(page)).to_have_count(0)
    await until(lambda: not any(folder.iterdir()))
    await expect(log(page).get_by_role("link")).to_have_count(0)


@on_page
async def test_a_call_is_a_link_that_is_said_and_opened(page):
    async with page.context.expect_page() as opened:
        await page.get_by_role("button", name="Call").click()
    link = log(page).get_by_role("link")
    await expect(link).to_have_attribute("href", re.compile(r"/call/[\w-]{38}$"))
    await expect(link).to_have_text("Join the call")
    await expect(await opened.value).to_have_url(await link.get_attribute("href"))
    await expect((await opened.value).get_by_label("User name")).to_have_value("John")
    await page.get_by_role("button", name="Log off").click()
    await page.get_by_role("button", name="Call").click()
    await expect(uploads(page).get_by_role("alert")).to_contain_text("Log in first")


@on_page
async def test_a_burst_while_the_tab_is_hidden_gives_one_notification(tab):
    await notify(tab).click()
    await expect(notify(tab)).to_have_accessible_description("on")
    await say(tab, "you see this one")
    await expect(log(tab)).to_contain_text("you see this one")
    await tab.evaluate("hide(true)")
    await say(tab, *map(str, range(100)))
    await tab.wait_for_function("() => shown.length", polling=50)
    await tab.wait_for_timeout(1000)  # in which another would come
    [(title, text)] = await tab.evaluate("shown")
    assert re.fullmatch(r"Jill and \d+ more", title)
    assert text.isdigit()


@on_page
async def test_each_notification_has_author_and_text_or_the_name_of_a_file(tab):
    await notify(tab).click()
    cat = f"{tab.url}files/{'a' * 24}/my%20cat.png"
    call = f"{tab.url}call/abc"
    for number, text in enumerate(["hello", "are you there?", cat, call]):
        await tab.evaluate("hide(true)")
        await say(tab, text)
        await tab.wait_for_function(f"() => shown.length > {number}", polling=50)
        await tab.evaluate("hide(false)")
    assert await tab.evaluate("shown") == [
        ["Jill", "hello"],
        ["Jill", "are you there?"],
        ["Jill", "my cat.png"],
        ["Jill", "Join the call"],
    ]


@on_page
async def test_what_was_said_before_gives_no_notification(tab):
    await notify(tab).click()
    await say(tab, "long ago")
    await tab.add_init_script("hide(true)")
    await tab.reload()  # as a browser may do with a tab of yesterday
    await expect(tab.locator("#status")).to_have_text("Online")
    await say(tab, "heard")
    await tab.wait_for_function("() => shown.length", polling=50)
    assert await tab.evaluate("shown") == [["Jill", "heard"]]


@on_page
async def test_notify_is_remembered_and_can_be_switched_off(tab):
    await expect(notify(tab)).to_have_accessible_description("off")
    await notify(tab).click()
    await expect(notify(tab)).to_have_accessible_description("on")
    await tab.reload()
    await expect(notify(tab)).to_be_checked()
    await notify(tab).click()
    await expect(notify(tab)).to_have_accessible_description("off")
    await tab.reload()
    await expect(notify(tab)).not_to_be_checked()
    if await tab.get_by_role("textbox", name="User name").is_editable():
        await enter(tab)
    await expect(tab.locator("#status")).to_have_text("Online")
    await tab.evaluate("hide(true)")
    await say(tab, "hello")
    await expect(tab).to_have_title("(1) Chat")
    await tab.wait_for_timeout(1000)  # in which one would come
    assert await tab.evaluate("shown") == []


@on_page
async def test_notifications_that_are_denied_say_so(page):
    # A headless Chromium denies what is not granted.
    await notify(page).click()
    await expect(notify(page)).not_to_be_checked()
    await expect(notify(page)).to_have_accessible_description("denied")


@on_page
async def test_a_browser_without_notifications_says_so(page):
    await page.add_init_script("delete window.Notification")
    await page.reload()
    await expect(notify(page)).to_be_disabled()
    await expect(notify(page)).to_have_accessible_description("unsupported")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
