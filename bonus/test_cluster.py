# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "redis[hiredis]", "pytest", "pytest-aiohttp", "psutil",
# ]
# ///
"""The chat in several processes: real ones, with a real Redis, over real sockets.

Needs redis-server, nginx and openssl. What is missing is said in the reason for skipping, or
for failing where the environment variable CI is set.
"""

import asyncio
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import pytest_asyncio
from redis import Redis, RedisError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import cluster
import test_page

import test_chat
from test_chat import LONGEST, NOTICE, UPGRADE, Peer, serving, users

pytestmark = pytest.mark.asyncio
STREAM = "a room"
number = itertools.count()  # for streams and logs

for program in "redis-server", "nginx", "openssl":
    if not shutil.which(program):
        if os.environ.get("CI"):
            pytest.fail(f"there is no {program}", pytrace=False)
        pytest.skip(f"there is no {program}: install it", allow_module_level=True)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Server:
    """A redis-server with its files in `folder`; what it has answered, it keeps."""

    def __init__(self, folder, *options):
        self.folder, self.options, self.port = folder, options, free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.redis = Redis.from_url(self.url)
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        command += self.options
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.signal = self.process.send_signal
        for _ in range(1000):
            with suppress(RedisError):
                return self.redis.ping()
            time.sleep(0.02)
        raise TimeoutError

    def kill(self):
        self.process.kill()
        self.process.wait()

    def said(self):
        return [fields[b"said"] for _, fields in self.redis.xrange(STREAM)]


class Process:
    """A process of the cluster; `log` is the file that it logs to."""

    everyone: ClassVar[list] = []

    @classmethod
    async def start(cls, server, *options, url=""):
        process = cls()
        process.log = server.folder / f"{next(number)}.log"
        command = [sys.executable, str(HERE / "cluster.py"), "--host", "127.0.0.1"]
        command += ["--redis", url or server.url, "--name", STREAM, "--port", "0"]
        with process.log.open("wb") as log:
            process.child = await asyncio.create_subprocess_exec(
                *[*command, *options],
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        cls.everyone.append(process)
        process.signal = process.child.send_signal
        async with asyncio.timeout(30):
            while line := await process.child.stdout.readline():
                if address := re.search(rb"Running on http://.*:(\d+)", line):
                    process.port = int(address[1])
                    return process
            await process.child.wait()  # could not start
        return process


async def start(server, count):
    return await asyncio.gather(*(Process.start(server) for _ in range(count)))


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest_asyncio.fixture(autouse=True)
async def nothing_is_left():
    yield
    Peer.abort_all()
    while Process.everyone:
        child = Process.everyone.pop().child
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def come(port, *names):
    return [await Peer.login(port, name) for name in names]


async def come_back(port, name):
    """Log in as a page does that was logged in: as often as that needs."""
    async with asyncio.timeout(30):
        while True:
            peer = await Peer.ask(port, f"GET /ws?user={name}", UPGRADE)
            if peer.status == 101:
                return peer
            assert peer.status in (409, 503)
            await asyncio.sleep(0.2)


async def listed(processes, *names, within=10):
    """Wait until all `processes` list `names`, or the same at least; return the list."""
    async with asyncio.timeout(within):
        while True:
            lists = [await users(process.port) for process in processes]
            if lists == [list(names) or lists[0]] * len(lists):
                return lists[0]
            await asyncio.sleep(0.1)


# One process of a cluster is a chat.py


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest_asyncio.fixture
async def port(shared_server, caplog):
    """The port of a process with a room of its own, for the tests of chat.py."""
    app = cluster.make_app(shared_server.url, f"room {next(number)}", alive=0.05)
    async with serving(app) as port:
        yield port
    records = caplog.get_records("call") + caplog.records
    assert not [record for record in records if record.levelname == "ERROR"]


class TestProtocol(test_chat.TestProtocol):
    # It takes 40 seconds, and is about what a cluster does not touch.
    test_who_is_dead_is_gone_within_45_seconds_but_no_talker = None


class TestTalkers(test_page.TestTalkers):
    """Their connections die here, too."""


# One room


async def test_of_200_logins_for_one_name_at_three_processes_one_gets_in(server):
    processes = await start(server, 3)
    for name in "Jack", "Jill", "Joe":
        ports = [process.port for process in processes] * 67
        logins = [Peer.ask(port, f"GET /ws?user={name}", UPGRADE) for port in ports]
        answers = [(peer.status, peer.body) for peer in await asyncio.gather(*logins)]
        refusal = (409, f"User {name} already logged in")
        assert sorted(answers) == [(101, "")] + 200 * [refusal]
    await listed(processes, "Jack", "Jill", "Joe")


async def test_all_processes_list_all_users_in_order_of_login(server):
    processes = await start(server, 3)
    names = [f"user{i}" for i in range(12)]
    ports = [process.port for process in processes] * 4
    peers = [await Peer.login(*who) for who in zip(ports, names, strict=True)]
    await listed(processes, *names)
    peers[3].vanish()
    peers[4].send(test_chat.CLOSE)
    await listed(processes, *names[:3], *names[5:])
    await Peer.login(processes[0].port, "user4")
    await listed(processes, *names[:3], *names[5:], "user4")


async def test_who_logs_in_misses_nothing_that_is_said_from_then_on(server):
    here, there = await start(server, 2)
    jill = await Peer.login(there.port, "Jill")
    for i in range(0, 2000, 100):
        jill.say(*map(str, range(i, i + 50)))
        jack = await Peer.login(here.port, "Jack")
        jill.say(*map(str, range(i + 50, i + 100)))
        heard = []
        while heard[-1:] != [f"Jill: {i + 99}"]:
            heard += await jack.hear()
        assert heard == [f"Jill: {n}" for n in range(i, i + 100)][-len(heard) :]
        jack.send(test_chat.CLOSE)
        await jack.closed()


async def test_the_list_costs_no_command_and_many_messages_or_changes_few(server):
    here, there = await start(server, 2)
    jill = await Peer.login(there.port, "Jill")
    before = server.redis.info("stats")["total_commands_processed"]
    for _ in range(300):
        assert await users(there.port) == ["Jill"]
    assert server.redis.info("stats")["total_commands_processed"] < before + 100
    names = [f"user{i}" for i in range(100)]
    peers = await come(here.port, *names)
    await jill.told("Jill", *names)
    entries = server.redis.xlen(STREAM)
    for peer in peers:
        peer.say(*map(str, range(50)))
    await jill.hear(5000)
    for peer in peers:
        peer.vanish()
    await listed([there], "Jill")
    assert server.redis.xlen(STREAM) < entries + 500
    assert await jill.receive() == NOTICE
    jill.say("end")
    notices = 1
    while await jill.receive() == NOTICE:
        notices += 1
    assert notices < 50


async def test_the_operator_of_any_process_resets_the_users_of_all(server):
    here, there = await start(server, 2)
    for process in here, there:
        peers = [*await come(here.port, "Jack", "Jill"), *await come(there.port, "Joe")]
        answer = await Peer.ask(process.port, "GET /?resetUsers=1")
        assert (answer.status, answer.body) == (200, "Users reseted")
        for peer in peers:
            assert await peer.closed() == (1000, "the users were reset")
        await listed([here, there], "")
    jack = await Peer.login(here.port, "Jack")
    server.signal(signal.SIGSTOP)
    answer = await Peer.ask(there.port, "GET /?resetUsers=1")
    assert (answer.status, answer.body) == (503, "The reset waits for Redis")
    server.signal(signal.SIGCONT)
    assert await jack.closed() == (1000, "the users were reset")


# Faults


async def test_all_hear_all_once_in_one_order_whatever_befalls_redis(server):
    processes = await start(server, 2)
    names = [f"user{i}" for i in range(20)]
    ports = [process.port for process in processes] * 10
    peers = [await Peer.login(*who) for who in zip(ports, names, strict=True)]

    async def talk(peer):
        for i in range(50):
            peer.say(str(i))
            await asyncio.sleep(0.16)

    async def break_redis():
        await asyncio.sleep(1)
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(3)
        server.signal(signal.SIGCONT)
        await asyncio.sleep(1)
        server.kill()
        await asyncio.sleep(1)
        server.start()

    hearing = asyncio.gather(*(peer.hear(1000) for peer in peers))
    *_, heard = await asyncio.gather(*map(talk, peers), break_redis(), hearing)
    assert heard == [heard[0]] * 20
    for name in names:
        spoken = [text for text in heard[0] if text.startswith(f"{name}: ")]
        assert spoken == [f"{name}: {i}" for i in range(50)]
    peers[0].say("end")
    assert [await peer.hear() for peer in peers] == [["user0: end"]] * 20
    await listed(processes, *names)


async def test_without_redis_a_login_is_503_and_leaves_no_trace(server):
    processes = await start(server, 2)
    server.signal(signal.SIGSTOP)
    started = time.monotonic()
    logins = [
        Peer.ask(process.port, f"GET /ws?user={name}", UPGRADE)
        for process in processes
        for name in ("Jack", "Jack", "Joe")
    ]
    for peer in await asyncio.gather(*logins):
        assert (peer.status, peer.body) == (503, "The room cannot be reached just now")
    assert 2 < time.monotonic() - started < 10
    server.signal(signal.SIGCONT)
    await come_back(processes[0].port, "Jack")
    await listed(processes, "Jack")
    await Peer.login(processes[1].port, "Joe")


async def test_without_redis_who_speaks_has_to_wait_and_nothing_is_lost(server):
    here, there = await start(server, 2)
    jill = await Peer.login(there.port, "Jill")
    speakers = await come(here.port, *(f"user{i}" for i in range(20)))
    memory = psutil.Process(here.child.pid).memory_info
    before = memory().rss
    server.signal(signal.SIGSTOP)
    for speaker in speakers:
        speaker.say(*[LONGEST] * 128)  # 40 MiB in all
    await asyncio.sleep(2)
    soon = memory().rss
    await asyncio.sleep(2)
    assert memory().rss < soon + 2**20 < before + 2**24
    server.signal(signal.SIGCONT)
    heard = []
    while len(set(heard)) < 20:
        heard += await jill.hear()
    assert len(heard) >= 100  # since each may say eight at once
    assert 2**15 < max(map(len, server.said())) < 2**17


async def test_who_stops_lets_its_users_go_and_all_others_know_at_once(server):
    here, there = await Process.start(server), await Process.start(server)
    jack, jill = *await come(here.port, "Jack"), *await come(there.port, "Jill")
    server.signal(signal.SIGSTOP)
    jack.say("bye")
    await jack.ping()
    here.signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    server.signal(signal.SIGCONT)
    assert await jill.hear() == await jack.hear() == ["Jack: bye"]
    await listed([there], "Jill", within=2)
    assert await jack.closed() == (1001, "the server stops")
    async with asyncio.timeout(10):
        assert await here.child.wait() == 0
        await Process.start(server)  # does not wait for the one that stopped
    await Peer.login(there.port, "Jack")
    server.signal(signal.SIGSTOP)  # and without Redis:
    there.signal(signal.SIGTERM)
    assert await jill.closed() == (1001, "the server stops")
    async with asyncio.timeout(10):
        assert await there.child.wait() == 0
    assert "Traceback" not in here.log.read_text() + there.log.read_text()


# Starting


async def test_who_starts_has_the_right_list_before_it_answers(server):
    first = await Process.start(server)
    names = [f"user{i}" for i in range(30)]
    peers = await come(first.port, *names)
    peers[7].vanish()
    del names[7]
    await listed([first], *names)
    server.redis.xtrim(STREAM, maxlen=1, approximate=False)
    processes = await start(server, 3)
    for process in processes:
        assert await users(process.port) == names
        refused = await Peer.ask(process.port, "GET /ws?user=user3", UPGRADE)
        assert refused.status == 409
    await Peer.login(processes[2].port, "user7")
    await listed([first, *processes], *names, "user7")


async def test_a_name_chooses_the_room_and_the_url_has_user_password_and_tls(tmp_path):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", key, "-out", certificate]
    assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", certificate, "--tls-key-file", key]
    server = Server(tmp_path, *options)
    try:
        rights = ["on", ">top secret", "~*", "+@all"]
        server.redis.execute_command("ACL", "SETUSER", "chatter", *rights)
        address = f"chatter:top%20secret@localhost:{port}"
        url = f"rediss://{address}?ssl_ca_certs={certificate}"
        here = await Process.start(server, url=url)
        there = await Process.start(server, "--name", "another")
        same = await Process.start(server)
        await Peer.login(here.port, "Jack")
        await Peer.login(there.port, "Jack")
        await listed([here, same], "Jack")
        refused = await Process.start(server, url=url.replace("top", "no"))
        assert refused.child.returncode == 1
        [line] = refused.log.read_text().splitlines()
        assert "Redis" in line and "secret" not in line
    finally:
        server.kill()


@pytest.mark.parametrize(
    "url, status", [("redis://127.0.0.1:1", 1), ("http://127.0.0.1", 2)]
)
async def test_without_redis_at_the_start_one_line_says_so(server, url, status):
    process = await Process.start(server, url=url)
    assert process.child.returncode == status
    *usage, line = process.log.read_text().splitlines()
    assert "Redis" in line
    assert not usage or status == 2


NGINX = """
daemon off; pid nginx.pid; error_log stderr; events {{}}
http {{
    access_log off;
    client_body_temp_path 1; proxy_temp_path 2; fastcgi_temp_path 3; uwsgi_temp_path 4;
    scgi_temp_path 5;
    upstream chat {{ {servers} }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://chat;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection upgrade;
        }}
    }}
}}
"""


async def test_nginx_spreads_users_over_the_processes_of_one_room(server):
    processes, port = await start(server, 2), free_port()
    servers = " ".join(f"server 127.0.0.1:{process.port};" for process in processes)
    configuration = server.folder / "nginx.conf"
    configuration.write_text(NGINX.format(servers=servers, port=port))
    command = ["nginx", "-p", str(server.folder), "-c", str(configuration)]
    proxy = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(10):
            while True:
                with suppress(OSError):
                    await users(port)
                    break
                await asyncio.sleep(0.1)
        names = [f"user{i}" for i in range(10)]
        peers = await come(port, *names)
        await listed(processes, *names)
        for peer in peers:
            peer.say("hello")
        heard = await asyncio.gather(*(peer.hear(10) for peer in peers))
        assert heard == [heard[0]] * 10
        assert (await Peer.ask(port, "GET /?resetUsers=1")).status == 403
        processes[0].signal(signal.SIGKILL)
        lost = 0
        for peer in peers:
            peer.say("still here")
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                await peer.hear()
                continue
            lost += 1
        assert lost == 5  # who come back through the proxy:
        await Peer.login(port, "Joe")
    finally:
        proxy.terminate()
        await proxy.wait()
