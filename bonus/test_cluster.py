# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.4,<4", "redis[hiredis]>=8", "pytest", "pytest-aiohttp", "psutil",
# ]
# ///
"""The chat in several processes: real ones, with a real Redis, over real sockets.

Needs redis-server; some tests need redis-sentinel, nginx or openssl, too. What is missing is
said in the reason for skipping, or for failing where the environment variable CI is set.

The storm can be longer: SEED=7 FAULTS=60 pytest bonus/test_cluster.py -k storm -n 0 -s -o faulthandler_timeout=0
"""

import asyncio
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlencode

import psutil
import pytest
import pytest_asyncio
from redis import Redis, RedisError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import cluster
import test_page

import test_chat
from test_chat import (
    BINARY,
    CLOSE,
    LONGEST,
    NOTICE,
    TEXT,
    UPGRADE,
    Peer,
    serving,
    users,
)

CI = test_chat.CI
PATH = os.environ["PATH"] + ":/usr/sbin"  # where Debian has nginx
STREAM = "a room"
SEED = int(os.environ.get("SEED", "1"))
FAULTS = int(os.environ.get("FAULTS", "12"))
ALIVE = os.environ.get("ALIVE", "0.3")  # seconds between signs of life
number = itertools.count()  # for streams and logs
pytestmark = pytest.mark.asyncio

if not shutil.which("redis-server"):
    if CI:
        pytest.fail("there is no redis-server", pytrace=False)
    pytest.skip("install redis-server", allow_module_level=True)


def find(program, package):
    """Return the path of `program`; without it, this test is skipped."""
    if path := shutil.which(program, path=PATH):
        return path
    (pytest.fail if CI else pytest.skip)(f"there is no {program}: install {package}")


@pytest.fixture
def nginx():
    return find("nginx", "nginx")


@pytest.fixture
def openssl():
    return find("openssl", "openssl")


@pytest.fixture
def sentinel():
    return find("redis-sentinel", "redis-sentinel")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


async def until(condition, within=10):
    """Wait until `condition()` is true, or fail; return how long that took."""
    started = time.monotonic()
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.02)
    return time.monotonic() - started


class Server:
    """A redis-server with its files in `folder`; what it has answered, it keeps."""

    def __init__(self, folder, *options):
        self.folder, self.options, self.port = folder, options, free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.redis = Redis.from_url(self.url)
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--dir", str(self.folder)]
        # It dies, but the machine does not: so what it has written need not be on the disk.
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "no"]
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

    def stop(self):
        self.signal(signal.SIGSTOP)

    def go_on(self):
        self.signal(signal.SIGCONT)

    def set_clock(self, ahead):
        """Have the next entries be so many seconds ahead of the time."""
        last = f"{int((time.time() + ahead) * 1000)}-0"
        self.redis.execute_command("XSETID", STREAM, last)

    def lose(self):
        """Have a stranger ask what the room is, and say that a part of it is lost."""
        stream = self.redis.xrange(STREAM)
        (founded,) = [at for at, it in stream if b'"founds"' in it[b"words"]]
        word = json.dumps([["lost", founded.decode()]])
        entry = {"author": "x", "number": 1, "seen": "9-9", "said": ""}
        with self.redis.pipeline() as pipe:  # read in one go
            pipe.xadd(STREAM, entry | {"words": ""})
            pipe.xadd(STREAM, entry | {"number": 2, "words": word})
            pipe.execute()

    def said(self):
        return [fields[b"said"] for _, fields in self.redis.xrange(STREAM)]


class Process:
    """A process of the cluster, which logs to a file."""

    everyone: ClassVar[list] = []

    @classmethod
    async def start(cls, server, *options, url="", alive=ALIVE):
        process = cls()
        process.path = server.folder / f"{next(number)}.log"
        command = [sys.executable, str(HERE / "cluster.py"), "--host", "127.0.0.1"]
        command += ["--redis", url or server.url, "--name", STREAM, "--port", "0"]
        with process.path.open("wb") as log:
            process.child = await asyncio.create_subprocess_exec(
                *[*command, "--alive", str(alive), *options],
                # aiohttp reads what is trusted while it is imported, which takes its time.
                env=os.environ | {"SSL_CERT_FILE": os.devnull},
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

    def log(self):
        return self.path.read_text()

    def stop(self):
        self.signal(signal.SIGSTOP)

    def go_on(self):
        self.signal(signal.SIGCONT)

    async def end(self, how=signal.SIGKILL):
        self.signal(how)
        async with asyncio.timeout(10):
            return await self.child.wait()


async def start(server, count, *options, **more):
    starting = (Process.start(server, *options, **more) for _ in range(count))
    return await asyncio.gather(*starting)


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


class Relay:
    """A way to a Redis that can break: what was sent may arrive, and its answer not."""

    def __init__(self):
        self.asks, self.answers = asyncio.Event(), asyncio.Event()  # cleared: held up
        self.holds_after = b"\0"  # this command
        self.cuts, self.commands, self.writers = False, 0, []
        self.appended = asyncio.Event()  # cleared: nothing is read until that
        self.appended.set()

    def hold(self, *ways):
        for way in ways:
            way.clear()

    def release(self):
        self.asks.set()
        self.answers.set()

    def cut(self):
        for writer in self.writers:
            writer.transport.abort()
        self.holds_after = b"\0"
        self.appended.clear()
        self.release()

    async def connect(self, reader, writer):
        answers, asked = await asyncio.open_connection("127.0.0.1", self.to)
        self.writers.append(writer)

        async def ask():
            while command := await reader.read(2**18):
                await self.asks.wait()
                if b"XREAD" in command:
                    await self.appended.wait()
                    await asyncio.sleep(0.2 * self.cuts)  # appended again before
                if self.holds_after in command:
                    self.hold(self.answers)
                asked.write(command)
                self.commands += (adds := b"XADD" in command)
                if adds:
                    await asked.drain()
                    self.appended.set()
                if self.cuts and adds and self.commands % 2:
                    writer.transport.abort()
            asked.close()

        async def answer():
            while answer := await answers.read(2**18):
                await self.answers.wait()
                writer.write(answer)
            writer.close()

        with suppress(OSError):
            await asyncio.gather(ask(), answer())


@asynccontextmanager
async def relayed(server):
    relay = Relay()
    relay.to = server.port
    relay.release()
    listener = await asyncio.start_server(relay.connect, "127.0.0.1", 0)
    relay.url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        relay.release()
        listener.close()


class Page:
    """A user at a process that `choose` returns, who does what a page does.

    It keeps what it said until it is heard back. When its connection is lost or silent, it
    comes back, hears what it missed, asks, and says again what was not heard; but not after a
    hole, since then it may have been said.
    """

    def __init__(self, name, choose, *which):
        self.name, self.choose = name, partial(choose, *which)
        self.turn, self.number, self.holes, self.hole = 0, -50, 0, 0
        self.texts, self.unheard, self.heard, self.times = 0, [], [], {}
        self.back_since = float("inf")  # its last text that was heard, was said then
        self.peer = None  # while it may talk
        self.life = asyncio.create_task(self.live())

    def say(self, size=0):
        text = str(self.texts).ljust(size, "x")
        self.texts += 1
        self.unheard.append(text)
        self.times[text] = time.monotonic()
        if self.peer:
            self.peer.say(text)

    async def live(self):
        while True:
            self.turn += 1
            peer = None
            with suppress(OSError, EOFError, TimeoutError):
                async with asyncio.timeout(4):
                    peer = await self.connect()
                await self.listen(peer)
            self.peer = None
            await asyncio.sleep(0.1)

    async def connect(self):
        key = f"the key of {self.name}.{self.turn}"
        query = urlencode({"user": self.name, "key": key, "after": self.number})
        peer = await Peer.ask(self.choose().port, f"GET /ws?{query}", UPGRADE)
        if peer.status != 101:
            assert peer.status == 503, "else a page stays out"
            raise ConnectionError
        peer.send(BINARY)
        return peer

    async def listen(self, peer):
        for heres in itertools.count():
            while True:
                async with asyncio.timeout(2.5):
                    opcode, payload = await peer.answer()
                if opcode == CLOSE:
                    code = int.from_bytes(payload[:2])
                    assert code in (1001, 1012), "else a page stays out"
                    raise ConnectionError
                if here := re.fullmatch(rb"\{\{Here (\d+)\}\}", payload):
                    break
                self.hear(payload.decode())
            if int(here[1]) != self.number and self.number >= 0:
                self.holes, self.hole = self.holes + 1, len(self.heard)
                self.unheard.clear()
            self.number = int(here[1])
            if heres == 1:
                peer.say(*self.unheard)
                self.peer = peer

    def hear(self, message):
        self.number += 1
        assert message not in self.heard[self.hole :], "doubled without a hole"
        self.heard.append(message)
        name, _, text = message.partition(": ")
        if name == self.name:
            if not self.holes:
                assert self.unheard[0] == text, "lost, doubled or out of order"
            if text in self.unheard:
                self.unheard.remove(text)
            self.back_since = self.times[text]


@asynccontextmanager
async def coming(pages):
    """Have `pages` come, and be ended."""
    try:
        await until(lambda: all(page.peer for page in pages))
        yield pages
    finally:
        for page in pages:
            page.life.cancel()


@asynccontextmanager
async def talking(pages, pause=0.1):
    """Have `pages` come, and talk until the end; then wait until each has heard all."""

    async def talk(page):
        while True:
            page.say()
            await asyncio.sleep(pause)

    async def all_are(condition):
        def met():
            for page in pages:
                if page.life.done():
                    page.life.result()
            return all(map(condition, pages))

        return await until(met, 25)

    async def all_back():
        """Wait until all have heard what they say from now on; return how long it took."""
        now = time.monotonic()
        return await all_are(lambda page: now < page.back_since < float("inf"))

    async with coming(pages):
        talkers = [asyncio.create_task(talk(page)) for page in pages]
        await all_back()
        yield all_back
        for talker in talkers:
            talker.cancel()
        await all_are(lambda page: page.peer and not page.unheard)
        last = max(page.number for page in pages)
        await all_are(lambda page: page.number == last)


def assert_exactly_once(pages):
    """Every text of every user was heard once by everyone, in one order, and no hole."""
    for page in pages:
        assert page.holes == 0
        assert page.heard == pages[0].heard
        heard = [text for text in page.heard if text.startswith(f"{page.name}: ")]
        assert heard == [f"{page.name}: {i}" for i in range(page.texts)]


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
            await asyncio.sleep(0.1)


async def listed(processes, *names, within=10):
    """Wait until all `processes` list `names`, or the same at least; return the list."""
    async with asyncio.timeout(within):
        while True:
            lists = [await users(process.port) for process in processes]
            if lists == [list(names) or lists[0]] * len(lists):
                return lists[0]
            await asyncio.sleep(0.05)


# One process of a cluster is a chat.py


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("redis"), "--appendonly", "no")
    yield server
    server.kill()


@pytest_asyncio.fixture
async def port(shared_server, caplog):
    """The port of a process with a room of its own, for the tests of chat.py."""
    app = cluster.make_app(shared_server.url, f"room {next(number)}", alive=0.03)
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
    peers[4].send(CLOSE)
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
        jack.send(CLOSE)
        await jack.closed()


async def test_the_list_costs_no_command_and_many_messages_or_changes_few(server):
    here, there = await start(server, 2)
    jill = await Peer.login(there.port, "Jill")
    before = server.redis.info("stats")["total_commands_processed"]
    for _ in range(300):
        assert await users(there.port) == ["Jill"]
    assert server.redis.info("stats")["total_commands_processed"] < before + 150
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
    server.stop()
    answer = await Peer.ask(there.port, "GET /?resetUsers=1")
    assert (answer.status, answer.body) == (503, "The reset waits for Redis")
    jack.say("after the reset")
    await jack.ping()
    server.go_on()
    assert await jack.closed() == (1000, "the users were reset")
    joe = await Peer.login(there.port, "Joe", after=-50)
    await joe.here()
    joe.say("hello")  # and nothing was heard between
    assert await joe.hear() == ["Joe: hello"]


async def test_the_log_counts_the_users_of_its_process(server):
    here, there = await start(server, 2)
    peers = [*await come(here.port, "Jack", "Jill"), *await come(there.port, "Joe")]
    await listed([here, there], "Jack", "Jill", "Joe")
    peers[0].send(CLOSE)
    await listed([here, there], "Jill", "Joe")
    for process, counts in (here, [1, 2, 2, 1]), (there, [0, 0, 1, 1]):
        lines = [line.split(" ", 2)[2] for line in process.log().splitlines()]
        assert lines == [
            f"Jack logged in, {counts[0]} here",
            f"Jill logged in, {counts[1]} here",
            f"Joe logged in, {counts[2]} here",
            f"Jack left, {counts[3]} here",
        ]


# Who comes back, at any process


async def test_a_message_has_one_number_also_in_a_process_that_starts_later(server):
    here, there = await start(server, 2)
    jack = await Peer.login(here.port, "Jack", after=-50)
    jill = await Peer.login(there.port, "Jill", after=-50)
    place = await jack.here()
    assert await jill.here() == place
    for i in range(10):
        (jack, jill)[i % 2].say(str(i))
        heard = await jack.hear()
        assert heard == await jill.hear() == [f"{('Jack', 'Jill')[i % 2]}: {i}"]
    later = await Process.start(server)
    for process, name in (here, "Joe"), (there, "Jim"), (later, "Jane"):
        peer = await Peer.login(process.port, name, after=place + 8)
        assert await peer.here() == place + 8
        assert await peer.hear(2) == ["Jack: 8", "Jill: 9"]
        peer.send(BINARY)
        assert await peer.here() == place + 10


@pytest.mark.parametrize("empty", [False, True], ids=["kept", "empty"])
async def test_when_all_have_restarted_no_number_comes_again(server, empty):
    processes = await start(server, 2, "--keep", "86400")
    jack = await Peer.login(processes[0].port, "Jack", after=-50)
    place = await jack.here()
    jack.say(*map(str, range(10)))
    assert len(await jack.hear(10)) == 10
    for process in processes:
        await process.end()
    if empty:
        server.redis.flushall()
    process = await Process.start(server, "--keep", "86400")
    jack = await come_back(process.port, f"Jack&after={place + 5}")
    if empty:
        assert await jack.here() > place + 10  # a hole
    else:  # the stream is the history of the room
        assert await jack.here() == place + 5
        assert await jack.hear(5) == [f"Jack: {i}" for i in range(5, 10)]
        jack.send(BINARY)
        assert await jack.here() == place + 10


@pytest.mark.parametrize("to", [0, 1], ids=["at the same process", "at another"])
async def test_who_has_the_key_takes_over_after_all_that_was_said(server, to):
    processes = await start(server, 2)
    key = 'a key\nand "more" ü'
    old = await Peer.login(processes[0].port, "Jack", key=f"{key}.1", after=-50)
    place = await old.here()
    for turn in range(2, 12):
        old.say(*map(str, range(100)))
        await old.hear()  # the rest is under way
        query = {"key": f"{key}.{turn}", "after": place + 1}
        new = await Peer.login(processes[to].port, "Jack", **query)
        assert await old.closed() == (1000, "logged in again elsewhere")
        assert await new.here() == place + 1
        new.send(BINARY)
        heard = []
        while not re.match("{{Here", (text := (await new.hear())[0])):
            heard.append(text)
        assert heard == [f"Jack: {i}" for i in range(1, len(heard) + 1)]
        place += 1 + len(heard)  # and the rest was never said:
        assert text == f"{{{{Here {place}}}}}"
        assert await listed(processes) == ["Jack"]
        old, processes = new, processes[::-1] if to else processes
    assert not any(
        b"a key" in entry[b"words"] for _, entry in server.redis.xrange(STREAM)
    )
    for query in (
        "user=Jack",
        "user=Jack&key=k.99",
        "user=Jack&key=" + urlencode({"": key})[1:],
    ):
        for process in processes:
            refused = await Peer.ask(process.port, f"GET /ws?{query}", UPGRADE)
            assert (refused.status, refused.body) == (
                409,
                "User Jack already logged in",
            )


async def test_what_the_old_process_appends_later_counts_only_if_said_again(server):
    async with relayed(server) as relay:
        here, there = await start(server, 1, url=relay.url) + await start(server, 1)
        old, jill = (
            await Peer.login(here.port, "Jack", key="k.1"),
            *await come(there.port, "Jill"),
        )
        await listed([here, there], "Jack", "Jill")
        relay.hold(relay.asks, relay.answers)
        old.say("late")
        new = await Peer.login(there.port, "Jack", key="k.2", after=-50)
        await new.where()
        new.say("late")
        assert await jill.hear() == ["Jack: late"]
        relay.release()
        assert await old.closed() == (1000, "logged in again elsewhere")
        await until(lambda: len([*filter(None, server.said())]) == 2)
        for process in here, there:
            (peer,) = await come(process.port, f"after {process.port}")
            peer.say("end")
            assert await jill.hear() == [f"after {process.port}: end"]
        assert "start" not in here.log() + there.log()


async def test_a_name_that_comes_back_brings_no_old_text_with_it(server):
    async with relayed(server) as relay:
        (there,) = await start(server, 1, alive=1)
        (here,) = await start(server, 1, url=relay.url, alive=4)
        one = await Peer.login(here.port, "Jack", key="k.1")
        (jill,) = await come(there.port, "Jill")
        await listed([here, there], "Jack", "Jill")

        def those_with(word):
            stream = [fields for _, fields in server.redis.xrange(STREAM)]
            return [it[b"author"] for it in stream if b'"%b"' % word in it[b"words"]]

        (author,) = those_with(b'enter", "Jack')
        signs = those_with(b"alive").count(author)
        await until(lambda: those_with(b"alive").count(author) > signs)
        await one.where()  # for 4 seconds, it has nothing under way
        relay.hold(relay.answers)  # what it asks arrives, and what is answered does not
        two = await Peer.login(there.port, "Jack", key="k.2")
        two.say("x")  # again, since it was lost
        assert await jill.hear() == ["Jack: x"]
        login = asyncio.create_task(Peer.login(here.port, "Jack", key="k.3"))
        await until(lambda: len(those_with(b'enter", "Jack')) == 3)
        one.say("x")  # it was only late
        await one.ping()
        relay.release()
        (await login).say("end")
        assert await jill.hear() == ["Jack: end"]


async def test_of_many_who_take_a_name_over_at_once_the_latest_turn_stays(server):
    processes = await start(server, 3)
    await Peer.login(processes[0].port, "Jack", key="k.1")
    turns = [*range(2, 32)]
    random.Random(SEED).shuffle(turns)
    logins = [
        Peer.ask(processes[turn % 3].port, f"GET /ws?user=Jack&key=k.{turn}", UPGRADE)
        for turn in turns
    ]
    peers = dict(zip(turns, await asyncio.gather(*logins), strict=True))
    assert {peer.status for peer in peers.values()} <= {101, 409}
    assert await listed(processes) == ["Jack"]
    peers.pop(31).say("I am Jack")
    for peer in peers.values():
        if peer.status == 101:
            assert await peer.closed() == (1000, "logged in again elsewhere")
    jill = await Peer.login(processes[0].port, "Jill", after=-1)
    await jill.here()
    assert await jill.hear() == ["Jack: I am Jack"]


async def test_to_take_ones_name_over_elsewhere_is_no_way_to_say_more(server):
    here, there = await start(server, 2)
    jill = await Peer.login(here.port, "Jill")
    jack = await Peer.login(here.port, "Jack", key="k.1")
    jack.say(*[LONGEST] * 8)
    await jill.hear(8)
    jack = await Peer.login(there.port, "Jack", key="k.2")
    started = time.monotonic()
    jack.say(*[LONGEST] * 3)
    await jill.hear(3)
    assert 0.8 < time.monotonic() - started < 2.5  # 32 KiB a second


async def test_who_gave_up_waiting_leaves_no_trace_and_no_name_taken(server):
    process = await Process.start(server)
    await listed([process], "")
    server.stop()
    peers = [await Peer.connect(process.port) for _ in range(4)]
    for peer, name in zip(peers, ("Jack", "Jack", "Joe", "Jim"), strict=True):
        peer.request(f"GET /ws?user={name}", UPGRADE)
    await users(process.port)
    for peer in peers[0], peers[2], peers[3]:
        peer.vanish()
    await users(process.port)
    server.go_on()
    assert b" 101 " in await peers[1].reader.readuntil(b"\r\n\r\n")
    await listed([process], "Jack")
    peers[1].say("I am Jack")
    assert await peers[1].hear() == ["Jack: I am Jack"]
    await Peer.login(process.port, "Joe")
    peers[1].send(CLOSE)
    await listed([process], "Joe")
    assert "Traceback" not in process.log()


async def test_the_name_of_a_dead_process_goes_to_who_has_the_key(server):
    here, there = await start(server, 2)
    await Peer.login(here.port, "Jack", key="k.1")
    await here.end()
    login = asyncio.create_task(Peer.login(there.port, "Jack", key="k.2"))
    while await users(there.port) == ["Jack"] and not login.done():
        await asyncio.sleep(0.05)
    await asyncio.wait_for(login, 1)  # who waits for the name says so once more
    await listed([there], "Jack")


# Faults


async def test_an_append_whose_answer_is_lost_is_sent_again_but_heard_once(server):
    async with relayed(server) as relay:
        here, there = await start(server, 1, url=relay.url) + await start(server, 1)
        jack, jill = *await come(here.port, "Jack"), *await come(there.port, "Jill")
        relay.cuts = True
        for i in range(10):
            jack.say(str(i))
            assert await jill.hear() == await jack.hear() == [f"Jack: {i}"]
        times = Counter(said for said in server.said() if said)
        assert len(times) == 10 and 15 <= times.total() <= 20
        assert "start" not in here.log() + there.log()


async def test_without_redis_a_login_is_503_and_leaves_no_trace(server):
    processes = await start(server, 2)
    server.stop()
    started = time.monotonic()
    logins = [
        Peer.ask(process.port, f"GET /ws?user={name}", UPGRADE)
        for process in processes
        for name in ("Jack", "Jack", "Joe")
    ]
    for peer in await asyncio.gather(*logins):
        assert (peer.status, peer.body) == (503, "The room cannot be reached just now")
    assert 2 < time.monotonic() - started < 10
    server.go_on()
    await come_back(processes[0].port, "Jack")
    await listed(processes, "Jack")
    await Peer.login(processes[1].port, "Joe")


async def test_a_login_waits_for_6_seconds_though_its_process_starts_over_in_between(
    server,
):
    async with relayed(server) as relay:
        (here,) = await start(server, 1, url=relay.url, alive=1)
        relay.hold(relay.answers)
        server.lose()
        started = time.monotonic()
        login = asyncio.create_task(Peer.ask(here.port, "GET /ws?user=Jack", UPGRADE))
        await asyncio.sleep(3)
        assert not login.done()
        relay.release()
        await until(lambda: "The stream has lost a part" in here.log())
        relay.hold(relay.answers)
        assert (await login).status == 503
        assert 5 < time.monotonic() - started < 8


async def test_without_redis_who_speaks_has_to_wait_and_nothing_is_lost(server):
    here, there = await start(server, 2)
    jill = await Peer.login(there.port, "Jill")
    speakers = await come(here.port, *(f"user{i}" for i in range(20)))
    memory = psutil.Process(here.child.pid).memory_info
    before = memory().rss
    server.stop()
    for speaker in speakers:
        speaker.say(*[LONGEST] * 128)  # 40 MiB in all
    await asyncio.sleep(1)
    soon = memory().rss
    await asyncio.sleep(1)
    assert memory().rss < soon + 2**20 < before + 2**24
    server.go_on()
    heard = []
    while len(set(heard)) < 20:
        heard += await jill.hear()
    assert len(heard) >= 100  # since each may say eight at once
    assert 2**15 < max(map(len, server.said())) < 2**17


async def test_who_has_more_to_say_than_is_read_while_redis_is_away_says_it_all(server):
    here, there = await start(server, 2)
    pages = [Page(f"user{i}", [here, there].__getitem__, i) for i in range(2)]
    async with coming(pages) as (jack, jill):
        server.stop()
        for _ in range(40):
            jack.say(16_000)
        await until(lambda: jack.turn > 2 and jill.turn > 2)  # they came in vain
        assert jack.heard == []
        server.go_on()
        await until(lambda: not jack.unheard, 40)  # 512 KiB at 32 KiB a second
        await until(lambda: jill.heard == jack.heard)
        assert [len(text) for text in jack.heard] == [len("user0: ") + 16_000] * 40
        assert (jack.holes, jill.holes) == (0, 0)


async def test_who_stops_lets_its_users_go_and_all_others_know_at_once(server):
    here, there = await Process.start(server), await Process.start(server)
    jack, jill = *await come(here.port, "Jack"), *await come(there.port, "Jill")
    server.stop()
    jack.say("bye")
    await jack.ping()
    here.signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    server.go_on()
    assert await jill.hear() == await jack.hear() == ["Jack: bye"]
    await listed([there], "Jill", within=2)
    assert await jack.closed() == (1001, "the server stops")
    async with asyncio.timeout(10):
        assert await here.child.wait() == 0
        await Process.start(server)  # does not wait for the one that stopped
    await Peer.login(there.port, "Jack")
    server.stop()  # and without Redis:
    there.signal(signal.SIGTERM)
    assert await jill.closed() == (1001, "the server stops")
    async with asyncio.timeout(10):
        assert await there.child.wait() == 0
    assert "Traceback" not in here.log() + there.log()


async def test_after_8_seconds_the_dead_are_gone_and_the_paused_start_over(server):
    dead, paused, *others = await start(server, 4, alive=1)
    await come(dead.port, "Jack", "Joe")
    jim, jane = await come(paused.port, "Jim", "Jane")
    jill = await Peer.login(others[0].port, "Jill")
    await listed(others, "Jack", "Joe", "Jim", "Jane", "Jill")
    dead.signal(signal.SIGKILL)
    paused.stop()
    started = time.monotonic()
    jim.say("while paused")
    await listed(others, "Jill", within=12)
    assert 3 < time.monotonic() - started < 8
    await jill.told("Jill")
    jack = await Peer.login(others[1].port, "Jack")
    new_jim = await Peer.login(others[1].port, "Jim")
    paused.go_on()
    for peer in jim, jane:
        assert (await peer.closed())[0] == 1012  # after which a client comes back
    jane = await come_back(paused.port, "Jane")
    again = await Peer.ask(paused.port, "GET /ws?user=Jim", UPGRADE)
    assert again.status == 409
    await listed([paused, *others], "Jill", "Jack", "Jim", "Jane")
    for peer in jane, new_jim:
        peer.say("hello")
    heard = [sorted(await peer.hear(2)) for peer in (jill, jack, new_jim, jane)]
    assert heard == [["Jane: hello", "Jim: hello"]] * 4
    assert "This process was taken for dead" in paused.log()


async def test_a_login_that_waits_while_its_process_stops_takes_no_name(server):
    here, there = await start(server, 2)
    server.stop()
    await asyncio.sleep(1)  # signs of life are under way, what follows is in one entry
    jack = await Peer.connect(here.port)
    jack.request("GET /ws?user=Jack", UPGRADE)
    await Peer.ask(here.port, "GET /")  # so it was read
    here.signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    server.go_on()
    async with asyncio.timeout(10):
        assert await here.child.wait() == 0
    entered = [f for _, f in server.redis.xrange(STREAM) if b"Jack" in f[b"words"]]
    assert b"gone" in entered[0][b"words"], "this tries nothing"
    assert await users(there.port) == await users((await Process.start(server)).port)
    assert await users(there.port) == [""]


async def test_numbers_are_higher_than_any_in_the_stream_though_the_clock_is_back(
    server,
):
    ahead = time.time_ns() // 1000 + 10**12  # by eleven days
    entry = {"author": "x", "number": 7, "seen": "0-1", "words": "", "said": ""}
    server.redis.xadd(STREAM, entry | {"last": ahead})
    process = await Process.start(server)
    assert await (await Peer.login(process.port, "Jack", after=0)).here() > ahead


async def test_a_thousand_logins_wait_for_redis_and_the_next_is_refused_at_once(server):
    from resource import RLIMIT_NOFILE, getrlimit, setrlimit

    setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)  # the usual is 1,024
    process = await Process.start(server)
    server.stop()
    await asyncio.sleep(
        1
    )  # a sign of life is under way, and the logins are for the next
    peers = [await Peer.connect(process.port) for _ in range(1001)]
    for i, peer in enumerate(peers):
        peer.request(f"GET /ws?user=user{i}", UPGRADE)

    async def status(peer):
        with suppress(EOFError, ConnectionError):
            return (await peer.reader.readuntil()).split()[1]

    answers = [asyncio.create_task(status(peer)) for peer in peers]
    done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
    assert [answer.result() for answer in done] == [b"503"]
    server.go_on()
    assert (await asyncio.gather(*answers)).count(b"101") == 1000


async def test_who_replays_what_it_has_read_says_nothing_from_the_middle_of_it(server):
    starting = asyncio.create_task(Process.start(server, alive=1))
    await until(lambda: server.redis.xlen(STREAM) >= 2)  # it asked, and gave a sign
    position, fields = server.redis.xrange(STREAM)[0]
    position, author = position.decode(), fields[b"author"].decode()
    entry = {"author": "x", "number": 1, "seen": position, "words": "", "said": ""}
    owners = {"Jack": ["login", "x", "", 0]}
    room = ["room", {author: [1, position]}, owners, 1_000_000, "0-1"]
    with server.redis.pipeline() as pipe:
        pipe.xadd(STREAM, entry)  # which asks,
        pipe.xadd(STREAM, entry)  # and again, as if the answer had been lost
        entry |= {"last": 1_000_000}
        pipe.xadd(STREAM, entry | {"number": 2, "said": b"Jack: hello\xff"})
        pipe.xadd(STREAM, entry | {"number": 3, "words": json.dumps([room])})
        pipe.execute()
    process, length = await starting, server.redis.xlen(STREAM)
    await until(lambda: server.redis.xlen(STREAM) >= length + 2)
    assert "have" not in process.log(), "it has started over"


async def test_who_is_taken_for_dead_before_it_knows_the_room_starts_over(server):
    starting = asyncio.create_task(Process.start(server, alive=1))
    await until(lambda: server.redis.xlen(STREAM))  # it asks what the room is
    ((position, fields),) = server.redis.xrange(STREAM)
    gone = json.dumps([["gone", fields[b"author"].decode(), "is gone"]])
    entry = {"author": "x", "said": "", "last": 1_000_000}
    entry |= {"number": 1, "seen": position, "words": gone}
    position = server.redis.xadd(STREAM, entry).decode()
    room = json.dumps([["room", {"x": [1, position]}, {}, 1_000_000, "0-1"]])
    entry |= {"number": 2, "seen": position, "words": room}
    server.redis.xadd(STREAM, entry)
    process = await starting
    assert "This process was taken for dead" in process.log()
    await Peer.login(process.port, "Jack")


async def test_a_page_of_who_missed_something_hears_nothing_twice_elsewhere(server):
    async with relayed(server) as relay:
        (slow,) = await start(server, 1, url=relay.url, alive=2)
        author, late = await start(server, 2, alive=2)
        at = {0: author, 1: slow, 2: late}
        pages = [Page(f"user{i}", at.__getitem__, i) for i in range(3)]
        async with coming(pages) as (jack, jill, john):
            late.stop()
            jack.say()  # in the answer that Redis owes to who is late
            await until(lambda: jack.heard == jill.heard == ["user0: 0"])
            relay.hold(relay.asks, relay.answers)
            jill.say()
            await asyncio.sleep(0.1)
            jack.say()
            await until(lambda: jack.heard[1:] == ["user0: 1"])
            stream = server.redis.xrange(STREAM)
            (lost,) = [at for at, f in stream if b"user0: 1" in f[b"said"]]
            server.redis.xdel(
                STREAM, *[position for position, _ in stream if position >= lost]
            )
            at[2] = author  # where the page of who is late goes then
            relay.release()
            await until(lambda: any(b"user1: 0" in said for said in server.said()))
            late.go_on()
            await until(lambda: "user1: 0" in john.heard)
            jack.say()
            await until(lambda: john.holes or "user0: 2" in john.heard, 15)
            assert john.holes or john.heard == jack.heard
            await until(lambda: john.peer and jack.peer and john.number == jack.number)
            john.say()
            await until(lambda: john.heard[-1] == jack.heard[-1] == "user2: 0")


async def test_what_a_process_that_is_cut_off_appends_late_is_never_heard(server):
    async with relayed(server) as relay:
        away, there = await start(server, 1, url=relay.url) + await start(server, 1)
        jack, jill = *await come(away.port, "Jack"), *await come(there.port, "Jill")
        await listed([away, there], "Jack", "Jill")
        relay.hold(relay.asks, relay.answers)
        jack.say("too late")
        await listed([there], "Jill")
        new_jack = await Peer.login(there.port, "Jack")
        relay.release()
        assert (await jack.closed())[0] == 1012
        assert any(b"too late" in said for said in server.said())
        new_jack.say("hello")
        assert await new_jack.hear() == await jill.hear() == ["Jack: hello"]


async def test_who_missed_a_part_lets_its_users_go_and_starts_over_twice(server):
    away, there = await start(server, 2, alive=1)
    jack, jill = *await come(away.port, "Jack"), *await come(there.port, "Jill")
    for _ in range(2):
        away.stop()
        for text in "in the answer under way", "missed":
            jill.say(text)
            await jill.hear()
        server.redis.xtrim(STREAM, maxlen=0, approximate=False)
        jill.say("not missed")
        await jill.hear()
        away.go_on()
        while (answer := await jack.answer())[0] == TEXT:
            assert not answer[1].startswith(b"{{"), "it did not ask for {{Here N}}"
        assert (answer[0], int.from_bytes(answer[1][:2])) == (CLOSE, 1012)
        jack = await come_back(away.port, "Jack")
        await listed([away, there], "Jill", "Jack")
        jack.say("hello")
        assert await jill.hear() == await jack.hear() == ["Jack: hello"]
    assert away.log().count("A part of the stream is missing") == 2
    assert "start" not in there.log()


async def test_while_the_room_is_not_known_logins_wait_and_there_is_no_list(server):
    away, there = await start(server, 2, alive=1.2)  # founds a room after 2.4 s
    await Peer.login(away.port, "Jack")
    await listed([away, there], "Jack")
    server.lose()  # the question is heard too late
    there.stop()  # which could say what the room is
    await until(lambda: "The stream has lost a part" in away.log())
    answer = await Peer.ask(away.port, "GET /?getUsers2=1")
    assert (answer.status, answer.body) == (503, "The room is not known just now")
    await Peer.login(away.port, "Joe")
    assert await users(away.port) == ["Joe"]


@pytest.mark.parametrize("ahead", [0, 3600], ids=["right", "an hour ahead"])
async def test_the_stream_keeps_what_was_said_so_long_and_no_longer(server, ahead):
    here = await Process.start(server, "--keep", "6")
    jack = await Peer.login(here.port, "Jack")
    server.set_clock(ahead)
    started = time.monotonic()
    for i in range(300):
        jack.say(str(i))
        await jack.hear()
    assert server.redis.xlen(STREAM) > 300
    said = time.monotonic()
    # Redis drops them a hundred at a time.
    await until(lambda: server.redis.xlen(STREAM) < 200)
    assert started + 5.9 < time.monotonic() < said + 8


@pytest.mark.parametrize("ahead", [0, 1000], ids=["empty", "behind, too"])
async def test_a_redis_that_comes_back_empty_leaves_one_room(server, ahead):
    processes = await start(server, 2, alive=1)
    jack = await Peer.login(processes[0].port, "Jack")
    server.set_clock(ahead)
    jill = await Peer.login(processes[1].port, "Jill")
    jill.say("hello")
    assert await jack.hear() == await jill.hear() == ["Jill: hello"]
    server.kill()
    shutil.rmtree(server.folder / "appendonlydir")
    server.start()
    processes += await start(server, 1, alive=1)
    await listed(processes, *[""] * bool(ahead) or ["Jack", "Jill"])
    if ahead:
        for process in processes[:2]:
            assert "starts over" in process.log() or "fell back" in process.log()
        jack = await come_back(processes[0].port, "Jack")
    joe = await come_back(processes[2].port, "Joe")
    joe.say("hello")
    assert await joe.hear() == await jack.hear() == ["Joe: hello"]


async def test_who_starts_alone_tells_the_room_anew_or_the_last_word_of_it_is_trimmed(
    server,
):
    def told():
        return sum(
            b'"room"' in said[b"words"] for _, said in server.redis.xrange(STREAM)
        )

    first = await Process.start(server, "--keep", "800")  # told each 100 s
    await Peer.login(first.port, "Jack")
    await until(lambda: told() == 1)
    await first.end()
    await Process.start(server, "--keep", "800")
    await until(lambda: told() == 2)


async def test_who_starts_when_the_stream_is_emptied_does_not_found_a_room(server):
    here = await Process.start(server, alive=1)
    await Peer.login(here.port, "Jack")
    here.stop()
    server.redis.flushall()
    starting = asyncio.create_task(Process.start(server, alive=1))
    await until(lambda: server.redis.exists(STREAM))
    await asyncio.sleep(1.5)  # it has given a sign of life, and nobody else has
    here.go_on()
    there = await starting
    assert await users(there.port) == ["Jack"]
    assert "start" not in here.log()


@pytest.mark.parametrize("url", ["", "?protocol=3&decode_responses=True"], ids=str)
async def test_what_is_no_entry_is_logged_once_and_skipped(server, url):
    here, there = await start(server, 2, url=server.url + url)
    jack, jill = *await come(here.port, "Jack"), *await come(there.port, "Jill")
    entry = {"author": "x", "number": 1, "seen": "0-0", "words": "[]", "said": ""}
    for fields in (
        {"foo": "bar"},
        entry | {"number": "one"},
        entry | {"author": b"\xff"},
        entry | {"seen": "now"},
        entry | {"words": "["},
        entry | {"words": "[" * 100_000},
        entry | {"words": '{"a": 1}'},
        entry | {"words": b"[\xff]"},
        entry | {"words": '["gone", ["gone"], ["gone", 1, 2], 5]'},
        entry | {"number": 2, "words": '[["moved", "Jack", "x", ["y"], 1, 2]]'},
        entry | {"number": 3, "words": '[["moved", "Jack", "x", [1, 2, 3, 4], "", 2]]'},
        entry | {"number": 4, "words": '[["enter", "Joe", "x", "y", 1, 2]]'},
        entry | {"number": 5, "words": '[["lost", "1-1"]]'},  # of another room
        entry | {"number": 6, "said": b"\x81"},
        entry | {"number": 6, "said": b"x" * 70_000 + b"\xff"},
        entry | {"number": "9" * 5000},
    ):
        position = server.redis.xadd(STREAM, fields).decode()
        jack.say("hello")
        assert await jill.hear() == await jack.hear() == ["Jack: hello"], fields
        for process in here, there:
            assert process.log().count(position) <= 1
    assert here.log().count("Skipped what is no entry of a chat") >= 8
    later = await Process.start(server, url=server.url + url)
    await listed([here, there, later], "Jack", "Jill")


async def test_if_nothing_can_be_read_the_process_ends_with_status_1(server):
    here, there = await start(server, 2)
    await Peer.login(here.port, "Jack")
    server.redis.delete(STREAM)
    server.redis.set(STREAM, "no stream")
    for process in here, there:
        async with asyncio.timeout(10):
            assert await process.child.wait() == 1
        assert "WRONGTYPE" in process.log().splitlines()[-1]
        assert "Traceback" not in process.log()


async def test_a_redis_whose_memory_is_full_heals_by_itself(tmp_path):
    full = ["--appendonly", "no", "--maxmemory", "3mb"]
    server = Server(tmp_path, *full, "--maxmemory-policy", "noeviction")
    try:
        here = await Process.start(server)
        (jack,) = await come(here.port, "user0")
        hearing = asyncio.create_task(jack.hear(39 * 8))
        for i in range(1, 40):  # who do not read, and are not let go for that
            speaker = await Peer.login(here.port, f"user{i}", after=0)
            speaker.say(*[LONGEST] * 8)
        assert len(await hearing) == 39 * 8
        assert "OOM" in here.log()
        for i in range(100):
            jack.say(str(i))
            assert await jack.hear() == [f"user0: {i}"]
        # It is halved when it is full, and not with each entry from then on.
        assert server.redis.xlen(STREAM) > 80
    finally:
        server.kill()


async def test_who_read_what_redis_lost_before_others_has_all_start_over(server):
    async with relayed(server) as relay:
        processes = await start(server, 1, url=relay.url, alive=1)
        processes += await start(server, 2, alive=1)
        _, reader, late = processes
        async with coming(
            [Page(f"user{i}", processes.__getitem__, i) for i in range(3)]
        ) as pages:
            relay.holds_after = b"user0: 0"
            late.stop()
            pages[0].say()
            await until(lambda: pages[1].heard == ["user0: 0"])
            for position, fields in server.redis.xrange(STREAM):
                if fields[b"said"]:
                    server.redis.xdel(STREAM, position)
            pages[1].say()
            await until(lambda: pages[1].heard[1:] == ["user1: 0"])
            late.go_on()
            relay.cut()  # so that what was lost is appended again
            await until(lambda: all(page.holes == 1 for page in pages), 15)
            await until(lambda: all(page.peer for page in pages))
            await until(lambda: len({page.number for page in pages}) == 1)
            numbers = [page.number for page in pages]
            assert len(await listed(processes)) == 3
            for page in pages:
                page.say()
            await until(lambda: all(page.number == numbers[0] + 3 for page in pages))
            assert pages[0].heard[-3:] == pages[1].heard[-3:] == pages[2].heard[-3:]
            # Who is late may have been sent what was lost, or lack it: it starts over anyway.
            for process in processes:
                assert "the users of this process have to come back" in process.log()
            assert "The stream has lost a part" in reader.log()


async def test_who_lacks_what_a_process_said_that_died_with_it_is_found_out(server):
    async with relayed(server) as relay:
        processes = await start(server, 1, url=relay.url, alive=1)
        processes += await start(server, 2, alive=1)
        author, _, late = processes
        pages = [Page(f"user{i}", processes.__getitem__, i) for i in range(3)]
        async with coming(pages) as (_, reader, lacking):
            relay.holds_after = b"user0: 0"
            late.stop()
            reader.say()  # which is in the answer that Redis owes to who is late
            await until(lambda: reader.heard == ["user1: 0"])
            pages[0].say()
            await until(lambda: reader.heard[1:] == ["user0: 0"])
            for position, fields in server.redis.xrange(STREAM):
                if b"user0: 0" in fields[b"said"]:
                    server.redis.xdel(STREAM, position)
            await author.end()
            late.go_on()
            lacking.say()
            await until(lambda: lacking.holes and reader.peer and lacking.peer, 20)
            await until(lambda: reader.number == lacking.number)
            reader.say()
            await until(lambda: lacking.heard[-1] == reader.heard[-1] == "user1: 1")
            assert reader.number == lacking.number


async def test_if_two_went_on_with_two_redis_all_start_over(server, tmp_path):
    folder = tmp_path / "replica"
    folder.mkdir()
    replica = Server(folder, "--replicaof", f"127.0.0.1 {server.port}")
    try:
        async with relayed(server) as near, relayed(server) as far:
            link = partial(replica.redis.info, "replication")
            await until(lambda: link()["master_link_status"] == "up", 20)
            last = await Process.start(server, url=far.url, alive=1)
            first = await Process.start(server, url=near.url, alive=4)
            at = {0: first, 1: last, 2: last}
            pages = [Page(f"user{i}", at.__getitem__, i) for i in range(3)]
            async with coming(pages) as (zoe, jack, ben):
                replica.redis.replicaof("NO", "ONE")
                near.to = replica.port
                near.cut()
                jack.say()
                await until(lambda: ben.heard == ["user1: 0"])
                zoe.say()
                await until(lambda: zoe.heard == ["user0: 0"])
                # And `last` reads on, to a position behind that of what it lacks.
                ((lacks, _),) = replica.redis.xrevrange(STREAM, count=1)
                await until(lambda: server.redis.xrange(STREAM, min=lacks)[1:])
                far.to = replica.port
                far.cut()
                jack.say()  # before the other says what it has read
                await until(lambda: all(page.holes for page in pages), 15)
                await until(lambda: all(page.peer for page in pages))
                ben.say()
                await until(lambda: all("user2: 0" in page.heard for page in pages))
    finally:
        replica.kill()


async def test_who_is_unknown_to_the_others_is_told_so(server):
    async with relayed(server) as relay:
        (old,) = await start(server, 1, url=relay.url, alive=1)
        known = {fields[b"author"] for _, fields in server.redis.xrange(STREAM)}
        relay.hold(relay.answers)
        new = await Process.start(server, alive=1)

        # Behind what it appended first, which Redis loses before the old one has it.
        entry = {"author": "x", "number": 1, "seen": "9-9", "words": "", "said": ""}
        end = server.redis.xadd(STREAM, entry)
        stream = server.redis.xrange(STREAM, max=end)
        first = [at for at, it in stream if it[b"author"] not in {*known, b"x"}]
        assert first and server.redis.xdel(STREAM, *first)
        relay.cut()
        await until(lambda: "taken for dead" in new.log())
        await come(new.port, "Jack")
        assert await listed([old, new], "Jack")


# Storms


class Storm:
    """Faults of which each ends when its method does."""

    def __init__(self, server, processes, pages, dice):
        self.server, self.processes, self.pages = server, processes, pages
        self.dice = dice

    def some(self):
        """Return the connections of half of the pages."""
        peers = [page.peer for page in self.pages if page.peer]
        return self.dice.sample(peers, len(peers) // 2)

    async def replace(self, i, how):
        assert await self.processes[i].end(how) == (0 if how == signal.SIGTERM else -9)
        self.processes[i] = await Process.start(self.server, "--keep", "60")

    async def pause(self, who):
        who.signal(signal.SIGSTOP)
        await asyncio.sleep(self.dice.choice([0.3, 1, 2.5]))
        who.signal(signal.SIGCONT)

    async def kill_a_process(self):
        await self.replace(self.dice.randrange(3), signal.SIGKILL)

    async def stop_a_process(self):
        await self.replace(self.dice.randrange(3), signal.SIGTERM)

    async def stop_all_in_turn(self):
        for i in range(3):
            await self.replace(i, signal.SIGTERM)

    async def pause_a_process(self):
        await self.pause(self.dice.choice(self.processes))

    async def pause_redis(self):
        await self.pause(self.server)

    async def kill_redis(self):
        self.server.kill()
        await asyncio.sleep(self.dice.choice([0, 1]))
        self.server.start()

    async def forbid_writing(self):
        self.server.redis.execute_command("CLIENT", "PAUSE", "1000", "WRITE")
        await asyncio.sleep(1)

    async def cut_off_from_redis(self):
        self.server.redis.execute_command("CLIENT", "KILL", "TYPE", "normal")

    async def reset_connections(self):
        for peer in self.some():
            peer.vanish()

    async def hang_up(self):
        for peer in self.some():
            peer.socket.shutdown(socket.SHUT_WR)

    async def cut_a_frame(self):
        for peer in self.some():
            peer.writer.write(test_chat.frame(TEXT, b"half a frame")[:9])
            peer.vanish()

    async def darken(self):
        for peer in self.some():
            peer.stall()  # the page hears nothing more, and the server learns nothing


async def test_in_a_storm_all_hear_all_once_in_one_order_and_are_back_in_6_s(server):
    dice = random.Random(SEED)
    processes = await start(server, 3)
    # Two users at any process, and one at each who comes back there
    pages = [Page(f"user{i}", lambda: dice.choice(processes)) for i in range(4)]
    pages += [Page(f"witness{i}", processes.__getitem__, i) for i in range(3)]
    storm = Storm(server, processes, pages, dice)
    kinds = [
        getattr(storm, name) for name in vars(Storm) if re.match("[a-z]+_[a-z]", name)
    ]
    kinds.append(storm.darken)
    assert len(kinds) == 12
    returns = []
    async with talking(pages) as all_back:
        for i in range(FAULTS):
            if i % 12 == 0:
                dice.shuffle(kinds)
            await kinds[i % 12]()
            returns.append((await all_back(), kinds[i % 12].__name__))
            if FAULTS > 12:
                print(
                    f"{i + 1}: {returns[-1][1]}, all back after {returns[-1][0]:.1f} s"
                )
    said, heard = sum(page.texts for page in pages), sum(len(p.heard) for p in pages)
    print(f"{FAULTS} faults, {said} said, {heard} heard, slowest return {max(returns)}")
    assert_exactly_once(pages)
    assert max(returns) < (6, "")


async def test_in_a_storm_with_losses_nothing_is_heard_twice_without_a_hole(tmp_path):
    dice = random.Random(SEED)
    server = Server(tmp_path, "--appendonly", "no")
    try:
        processes = await start(server, 3)
        pages = [Page(f"user{i}", processes.__getitem__, i % 3) for i in range(6)]
        async with talking(pages) as all_back:
            for i in range(max(6, FAULTS // 2)):
                behind = dice.choice(processes)
                behind.stop()
                await asyncio.sleep(0.3)
                if i % 3 == 0:
                    server.kill()
                    server.start()
                else:
                    count = dice.randrange(1, 20)
                    lost = [
                        entry
                        for entry, _ in server.redis.xrevrange(STREAM, count=count)
                    ]
                    server.redis.xdel(STREAM, *lost)
                behind.go_on()
                await all_back()
            await all_back()
        numbers = [page.number for page in pages]
        assert numbers == numbers[:1] * 6
        for page in pages:
            assert page.heard[-6:] == pages[0].heard[-6:]
            for other in pages:  # in the order in which they were said
                own = [m for m in page.heard if m.startswith(other.name)]
                assert own == sorted(own, key=lambda m: int(m.rpartition(" ")[2]))
            if not page.holes:
                assert (
                    len([m for m in page.heard if m.startswith(page.name)])
                    == page.texts
                )
        assert len(await listed(processes)) == 6
        holes = sum(page.holes for page in pages)
        print(f"{holes} holes, {sum(page.texts for page in pages)} said")
    finally:
        server.kill()


async def test_sentinels_name_another_redis_when_one_dies(server, sentinel, tmp_path):
    folder = tmp_path / "replica"
    folder.mkdir()
    replica = Server(folder, "--replicaof", f"127.0.0.1 {server.port}")
    configuration, port = tmp_path / "sentinel.conf", free_port()
    configuration.write_text(f"""
        port {port}
        sentinel monitor chat 127.0.0.1 {server.port} 1
        sentinel down-after-milliseconds chat 1500
        sentinel failover-timeout chat 3000
    """)
    watch = await asyncio.create_subprocess_exec(
        sentinel, str(configuration), stdout=subprocess.DEVNULL
    )
    try:
        known = Redis(port=port, decode_responses=True)

        def knows_the_replica():
            with suppress(RedisError):
                return known.sentinel_masters()["chat"]["num-slaves"] == 1

        def replica_is(field, value):
            with suppress(RedisError):
                return replica.redis.info("replication")[field] == value

        await until(knows_the_replica, 20)
        url = f"sentinel://127.0.0.1:{port}/chat"
        processes = await start(server, 3, url=url)
        pages = [Page(f"user{i}", processes.__getitem__, i) for i in range(3)]
        async with talking(pages) as all_back:
            await until(lambda: replica_is("master_link_status", "up"))
            server.kill()
            await until(lambda: replica_is("role", "master"), 15)
            returned = await all_back()
        print(f"all back {returned:.1f} s after the failover")
        assert returned < 6
        for page in pages:
            assert page.number == pages[0].number
        assert len(await listed(processes)) == 3
    finally:
        watch.terminate()
        await watch.wait()
        replica.kill()


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


async def test_a_name_chooses_the_room_and_the_url_has_user_password_and_tls(
    tmp_path, openssl
):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-nodes", "-days", "1"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", key, "-out", certificate]
    making = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    assert await making.wait() == 0
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
        [line] = refused.log().splitlines()
        assert "Redis" in line and "secret" not in line
    finally:
        server.kill()


@pytest.mark.parametrize(
    "url, status",
    [
        ("redis://127.0.0.1:1", 1),
        ("sentinel://127.0.0.1:1/chat", 1),
        ("http://127.0.0.1", 2),
        ("sentinel://127.0.0.1/chat", 2),
    ],
)
async def test_without_redis_at_the_start_one_line_says_so(server, url, status):
    process = await Process.start(server, url=url)
    assert process.child.returncode == status
    *usage, line = process.log().splitlines()
    assert "Redis" in line
    assert not usage or status == 2


FOREIGN = "0" * 39 + "1 127.0.0.1:1@2 master - 0 0 1 connected 0-16383\n"
OWN = "0" * 39 + "2 :0@0 myself,master - 0 0 0 connected\n"


@pytest.mark.parametrize("kind", ["READONLY", "MOVED", "WRONGTYPE", "NOPERM"])
async def test_a_redis_that_cannot_be_written_to_ends_the_start(tmp_path, kind):
    options = {
        "READONLY": ["--replicaof", "127.0.0.1 1"],
        "MOVED": ["--cluster-enabled", "yes"],
    }
    (tmp_path / "nodes.conf").write_text(
        FOREIGN + OWN + "vars currentEpoch 1 lastVoteEpoch 0\n"
    )
    server = Server(tmp_path, "--appendonly", "no", *options.get(kind, ()))

    def moved():
        return b"cluster_state:ok" in server.redis.execute_command("CLUSTER", "INFO")

    try:
        url = server.url
        if kind == "MOVED":
            await until(moved)
        elif kind == "WRONGTYPE":
            server.redis.set(STREAM, "no stream")
        elif kind == "NOPERM":
            server.redis.execute_command(
                "ACL", "SETUSER", "x", "on", ">x", "~y", "+@all"
            )
            url = url.replace("//", "//x:x@")
        process = await Process.start(server, url=url)
        assert process.child.returncode == 1
        [line] = process.log().splitlines()
        assert re.match(f"Cannot serve 127.0.0.1:0: Redis.*: {kind} ", line)
    finally:
        server.kill()


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


async def test_nginx_spreads_users_over_the_processes_of_one_room(server, nginx):
    processes, port = await start(server, 2), free_port()
    servers = " ".join(f"server 127.0.0.1:{process.port};" for process in processes)
    configuration = server.folder / "nginx.conf"
    configuration.write_text(NGINX.format(servers=servers, port=port))
    command = [nginx, "-p", str(server.folder), "-c", str(configuration)]
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
