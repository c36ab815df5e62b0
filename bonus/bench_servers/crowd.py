"""The crowd that bench.py lets loose on each server: users who log in, talk and listen.

They are raw sockets around one loop, to be so cheap that not they are what is measured.
"""

import asyncio
import re
import selectors
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

HOST = "127.0.0.1"
NAME = b"user%05d"  # all of one size, as the messages are
MESSAGE_SIZE = 60  # bytes
NOTICE = b"{{RefreshUsers}}"  # from chat.py: ask for the users again
MASK = b"\x37\xfa\x21\x3d"  # of the crowd's frames; any will do (RFC 6455, section 5.3)
BUFFER = 2**20  # bytes taken from a socket at once
LOGINS_AT_ONCE = 64  # handshakes under way; asyncio's backlog, the shortest, is 100
WARM_UP = 0.3  # seconds before each measurement
QUIET = 0.2  # seconds of silence after which all notices of the logins are through
STUCK = 2  # seconds of silence and idleness after which what is missing is lost
RUSH_LIMIT = 60  # seconds


class Failed(Exception):
    """A server does not do its job; says why."""


@dataclass(frozen=True)
class Dialect:
    """How a server wants to be spoken to: in plain texts, unless said otherwise."""

    path: str = "/ws?user={}"
    before: bytes = b""  # what stands in a frame before a message, both ways, ...
    after: bytes = b""  # ... and after it
    welcome: bytes = b""  # how the text begins that logs in; else the handshake does
    replies: Mapping[bytes, bytes] = field(default_factory=dict)  # by first byte


PLAIN = Dialect()
SOCKET_IO = Dialect(
    path="/socket.io/?EIO=4&transport=websocket&user={}",
    before=b'42["message","',
    after=b'"]',
    welcome=b"40",
    replies={b"0": b"40", b"2": b"3"},  # open: connect; ping: pong
)


class Mark(NamedTuple):
    """A moment, and what had happened until then."""

    time: float  # seconds, as the following two
    crowd_cpu: float
    server_cpu: float
    deliveries: float = 0
    said: int = 0


def mark(server: int, deliveries: float = 0, said: int = 0) -> Mark:
    now, crowd_cpu = time.perf_counter(), time.process_time()
    return Mark(now, crowd_cpu, cpu_seconds(server), deliveries, said)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    if sys.platform == "linux":  # its clock, to the nanosecond: clock_getcpuclockid(3)
        return time.clock_gettime(~pid << 3 | 2)
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def message(number: int) -> bytes:
    return (b"%09d " % number).ljust(MESSAGE_SIZE, b".")


def masked(text: bytes) -> bytes:
    """Mask what a client says (RFC 6455, section 5.3)."""
    mask = (MASK * len(text))[: len(text)]
    return (int.from_bytes(text) ^ int.from_bytes(mask)).to_bytes(len(text))


def handshake(path: str) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


class Client:
    """A user's socket, and how far it has heard what everyone should hear."""

    __slots__ = ("connection", "fork", "heard", "name", "own", "plain", "rest", "state")

    def __init__(self, connection: socket.socket, name: bytes) -> None:
        self.connection = connection
        self.name = name
        self.state = "connecting"  # then "upgraded", then "logged in"
        self.rest = bytearray()  # received, but not understood yet
        self.heard = 0  # bytes of messages
        self.plain = False  # all it has heard is as in the stream, and there is no rest
        self.fork = 0  # bytes heard when it first heard something else, ...
        self.own: bytearray | None = None  # ... and what it has heard from there on


class Crowd:
    """Users who log in, talk, and compare every byte they hear with what was said.

    All frames of all messages have one size, and everyone should hear the same. So the
    first to hear something adds it to the stream; for the others it takes one comparison
    of bytes; and the stream is compared with what was said when all is over.
    """

    def __init__(self, port: int, server: int, dialect: Dialect) -> None:
        """Get ready for the process `server`, which listens on `port`."""
        self.port = port
        self.server = server
        self.dialect = dialect
        self.clients: list[Client] = []
        self.gone: list[Client] = []
        self.logged_in = 0
        self.selector = selectors.DefaultSelector()
        self.buffer = memoryview(bytearray(BUFFER))
        around = len(dialect.before + dialect.after)
        payload_size = around + len(NAME % 0) + len(b": ") + MESSAGE_SIZE
        self.head = bytes([0x81, payload_size]) + dialect.before  # of each message ...
        self.size = 2 + payload_size  # ... and its bytes, as it is heard
        self.stream = bytearray()
        self.said: list[tuple[Client, float]] = []  # speaker and time of each message
        self.finished = 0  # messages that everyone has heard
        self.target = 0  # bytes heard by those who have heard one more ...
        self.waiting = 0  # ... and how many have not
        self.arrivals: defaultdict[int, list[float]] | None = None  # by place in stream
        self.faults: Counter[str] = Counter()

    def log_in(self, users: int) -> tuple[Mark, Mark]:
        """Log `users` in and wait until the line is quiet; return when it was done."""
        begin = mark(self.server)
        while self.logged_in < users:
            while len(self.clients) < min(users, self.logged_in + LOGINS_AT_ONCE):
                self.connect(NAME % len(self.clients))
            if not self.listen(STUCK) or self.gone:
                raise Failed(f"lets in only {self.logged_in:,} of {users:,} users")
        end = mark(self.server)
        while self.listen(QUIET):
            pass
        return begin, end

    def connect(self, name: bytes) -> None:
        connection = socket.create_connection((HOST, self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(handshake(self.dialect.path.format(name.decode())))
        connection.setblocking(False)
        client = Client(connection, name)
        self.clients.append(client)
        self.selector.register(connection, selectors.EVENT_READ, client)

    def close(self) -> None:
        self.selector.close()
        for client in self.clients + self.gone:
            client.connection.close()

    # Talking

    def talk(
        self, seconds: float, in_flight: int = 0, rate: int = 0
    ) -> tuple[Mark, Mark]:
        """Keep `in_flight` messages on their way, or say `rate` of them a second.

        That goes on for the warm-up and as many `seconds`; then what is on its way is
        heard out and checked. Returns the end of the warm-up and of the last delivery.
        """
        start = time.perf_counter()
        self.look_around()
        self.converse(start, start + WARM_UP, in_flight, rate)
        begin = self.mark()
        self.converse(start, begin.time + seconds, in_flight, rate)
        last_heard = time.perf_counter()
        while self.finished < len(self.said) and self.hear_more():
            last_heard = time.perf_counter()
        end = self.mark()._replace(time=last_heard)
        self.listen(QUIET)  # what comes now comes twice
        self.check()
        return begin, end

    def converse(self, start: float, end: float, in_flight: int, rate: int) -> None:
        while (now := time.perf_counter()) < end:
            due = self.finished + in_flight if in_flight else int((now - start) * rate)
            while len(self.said) < due:
                self.say()
            pause = start + (len(self.said) + 1) / rate if rate else end
            self.listen(max(0, min(pause, end) - now))

    def hear_more(self) -> bool:
        """Listen; tell whether more is to come: who is silent may be hard at work."""
        before = cpu_seconds(self.server)
        return (
            bool(self.listen(STUCK)) or cpu_seconds(self.server) > before + STUCK / 10
        )

    def say(self) -> None:
        """Have the next user say the next message."""
        number = len(self.said)
        speaker = self.clients[number % len(self.clients)]
        self.said.append((speaker, time.perf_counter()))
        text = self.dialect.before + message(number) + self.dialect.after
        self.send(speaker, 0x1, text)

    def send(self, client: Client, opcode: int, text: bytes) -> None:
        frame = bytes([0x80 | opcode, 0x80 | len(text)]) + MASK + masked(text)
        if client.connection.send(frame) < len(frame):
            raise Failed("does not read what is said")

    def mark(self) -> Mark:
        heard = sum(client.heard for client in self.clients + self.gone)
        return mark(self.server, heard / self.size, len(self.said))

    # Listening

    def listen(self, timeout: float) -> int:
        """Receive once from everyone who has something; return how many had."""
        events = self.selector.select(timeout)
        buffer, stream, size = self.buffer, self.stream, self.size
        for key, _ in events:
            client: Client = key.data
            try:
                count = client.connection.recv_into(buffer)
            except ConnectionError:
                count = 0
            before = client.heard
            if count and client.plain and stream.startswith(buffer[:count], before):
                client.heard = before + count
            else:
                self.examine(client, buffer[:count])
            if before < self.target <= client.heard:
                self.waiting -= 1
                if not self.waiting:
                    self.look_around()
            if self.arrivals is not None:
                now = time.perf_counter()
                for place in range(before // size, client.heard // size):
                    self.arrivals[place].append(now)
        return len(events)

    def look_around(self) -> None:
        """Find out which messages everyone has heard."""
        heard = [client.heard for client in self.clients]
        self.finished = min(heard) // self.size
        self.target = (self.finished + 1) * self.size
        self.waiting = sum(count < self.target for count in heard)

    def examine(self, client: Client, received: memoryview) -> None:
        """Take in what is not just more of the stream."""
        if not received:
            return self.lose(client)
        rest = client.rest
        rest += received
        if client.state == "connecting":
            head, end, _ = rest.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                raise Failed(f"answers a login with {head.splitlines()[0].decode()}")
            del rest[: len(head + end)]
            client.state = "upgraded"
            if not self.dialect.welcome:
                self.welcome(client)
        while rest:
            inside = client.heard % self.size
            if inside or rest.startswith(self.head):
                piece = bytes(rest[: self.size - inside])
                del rest[: len(piece)]
                self.hear(client, piece)
            elif self.head.startswith(rest):
                break  # too little to tell
            else:
                size = 2 + (rest[1] & 127)  # none of these frames is long
                if len(rest) < size:
                    break
                self.notice(client, rest[0] & 15, bytes(rest[2:size]))
                del rest[:size]
        client.plain = not rest and client.own is None

    def hear(self, client: Client, piece: bytes) -> None:
        """Take in a message or a piece of one."""
        known = self.stream[client.heard : client.heard + len(piece)]
        if client.own is None and not piece.startswith(known):
            client.fork, client.own = client.heard, bytearray()
        if client.own is None:
            self.stream += piece[len(known) :]
        else:
            client.own += piece
        client.heard += len(piece)

    def notice(self, client: Client, opcode: int, text: bytes) -> None:
        """Take in a frame that is no message."""
        if opcode == 0x8:
            self.lose(client)
        elif opcode == 0x9:
            self.send(client, 0xA, text)
        elif client.state != "logged in" and text.startswith(self.dialect.welcome):
            self.welcome(client)
        elif reply := self.dialect.replies.get(text[:1]):
            self.send(client, 0x1, reply)
        elif text != NOTICE:
            self.faults["unknown frames"] += 1

    def welcome(self, client: Client) -> None:
        client.state = "logged in"
        self.logged_in += 1

    def lose(self, client: Client) -> None:
        self.faults["users dropped"] += 1
        self.selector.unregister(client.connection)
        self.clients.remove(client)
        self.gone.append(client)
        if not self.clients:
            raise Failed("drops everyone")
        self.look_around()

    # Checking

    def check(self) -> None:
        """Count what was lost, repeated, reordered or garbled, over all users."""
        common = self.compare(self.stream)
        for client in self.clients:
            if client.own is not None:
                faults = self.compare(self.stream[: client.fork] + client.own)
                self.faults += faults
                self.faults["users with another order"] += not faults and not common
            elif client.heard < len(self.stream):
                self.faults += self.compare(self.stream[: client.heard])
            else:
                self.faults += common

    def compare(self, heard: bytearray) -> Counter[str]:
        """Compare what a user has heard with what was said."""
        faults: Counter[str] = Counter()
        seen: set[int] = set()
        last: dict[Client, int] = {}  # message of each speaker
        for number in self.numbers(heard):
            if number is None:
                faults["garbled"] += 1
                continue
            speaker, _ = self.said[number]
            faults["repeated"] += number in seen
            faults["reordered"] += number < last.get(speaker, 0)
            seen.add(number)
            last[speaker] = number
        faults["lost"] = len(self.said) - len(seen)
        return +faults

    def numbers(self, heard: bytearray) -> Iterator[int | None]:
        """Yield the number of each message heard, None for what nobody has said."""
        digits = slice(start := len(self.head) + len(NAME % 0) + 2, start + 9)
        for place in range(0, len(heard), self.size):
            frame = bytes(heard[place : place + self.size])
            number = int(frame[digits]) if frame[digits].isdigit() else len(self.said)
            if number < len(self.said):
                speaker, _ = self.said[number]
                text = speaker.name + b": " + message(number) + self.dialect.after
                yield number if frame == self.head + text else None
            else:
                yield None

    def latencies(self, since: float) -> list[float]:
        """Return the seconds from saying to hearing, of all that was said `since`."""
        arrivals: dict[int, list[float]] = self.arrivals or {}
        return [
            arrival - said
            for place, number in enumerate(self.numbers(self.stream))
            if number is not None and (said := self.said[number][1]) >= since
            for arrival in arrivals.get(place, ())
        ]


# The rush: pages that ask chat.py for the list of users

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def rush(port: int, server: int, users: int) -> tuple[Mark, Mark]:
    """Have `users` log in at once; return when, and when all had the right list."""
    everyone = {(NAME % number).decode() for number in range(users)}
    # The pages are there, and so are the connections they were loaded over.
    loaded = [(name, await asyncio.open_connection(HOST, port)) for name in everyone]
    begin = mark(server)
    try:
        async with asyncio.timeout(RUSH_LIMIT):
            pages = (page(port, name, everyone, asking) for name, asking in loaded)
            await asyncio.gather(*pages)
    except TimeoutError:
        raise Failed(f"takes over {RUSH_LIMIT} seconds") from None
    return begin, mark(server)


async def page(port: int, name: str, everyone: set[str], asking: Connection) -> object:
    """Log in, and return once the list of users is right, with what keeps one logged in.

    Behaves as chat.html: asks for the list over the connection that the page was loaded
    over, never twice at once, and once more after the last notice.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(handshake(f"/ws?user={name}"))
    await reader.readuntil(b"\r\n\r\n")
    changed = asyncio.Event()
    changed.set()
    listening = asyncio.create_task(heed(reader, changed))
    listed: set[str] = set()
    while listed != everyone:
        await changed.wait()
        changed.clear()
        listed = await ask(*asking)
    return listening, writer


async def heed(reader: asyncio.StreamReader, changed: asyncio.Event) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            _, size = await reader.readexactly(2)
            await reader.readexactly(size)  # a notice, as nobody talks
            changed.set()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> set[str]:
    writer.write(f"GET /?getUsers2=1 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    size = re.search(rb"Content-Length: (\d+)", head)
    assert size is not None
    return set((await reader.readexactly(int(size[1]))).decode().split("\r\n"))
