"""The crowd that bench.py lets loose on each server: users who log in, talk and listen.

They are raw sockets around one loop, to be so cheap that not they are what is measured.
"""

import selectors
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

HOST = "127.0.0.1"
NAME = b"user%05d"  # all of one size, as the messages are
MESSAGE_SIZE = 60  # bytes
NOTICE = b"{{RefreshUsers}}"  # from chat.py, at most 1 ms a user after a login
MASK = b"\x37\xfa\x21\x3d"  # of the crowd's frames; any will do (RFC 6455, section 5.3)
BUFFER = 2**20  # bytes taken from a socket at once
LOGINS_AT_ONCE = 64  # handshakes under way; asyncio's backlog, the shortest, is 100
WARM_UP = 0.3  # seconds before each measurement
QUIET = 0.2  # seconds of silence after which nothing more is to come
STUCK = 2  # seconds of silence and idleness after which what is missing is lost


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

    time: float  # seconds, as the following three
    crowd_cpu: float
    server_cpu: float  # of all processes
    redis_cpu: float  # of the last one alone
    deliveries: float
    said: int


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

    def __init__(self, ports: list[int], pids: list[int], dialect: Dialect) -> None:
        """Get ready for the processes `pids`, which listen on `ports`, as one room."""
        self.ports = ports
        self.pids = pids
        self.dialect = dialect
        self.clients: list[Client] = []
        self.gone: list[Client] = []
        self.logged_in = 0
        self.noticed = False  # that this server announces logins
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
        """Log `users` in; return when that began and was done."""
        begin = self.mark()
        while self.logged_in < users:
            while len(self.clients) < min(users, self.logged_in + LOGINS_AT_ONCE):
                self.connect(len(self.clients))
            if not self.hear_more() or self.gone:
                raise Failed(f"lets in only {self.logged_in:,} of {users:,} users")
        return begin, self.mark()

    def connect(self, number: int) -> None:
        name, port = NAME % number, self.ports[number % len(self.ports)]
        connection = socket.create_connection((HOST, port))
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
        while self.listen(QUIET + self.noticed * len(self.clients) / 1000):
            pass
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
        before = sum(map(cpu_seconds, self.pids)) + STUCK / 10
        return bool(self.listen(STUCK)) or sum(map(cpu_seconds, self.pids)) > before

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
        now, crowd_cpu = time.perf_counter(), time.process_time()
        cpu = [*map(cpu_seconds, self.pids)]
        heard = sum(client.heard for client in self.clients + self.gone)
        deliveries = heard / self.size
        return Mark(now, crowd_cpu, sum(cpu), cpu[-1], deliveries, len(self.said))

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
        elif text == NOTICE:
            self.noticed = True
        else:
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
