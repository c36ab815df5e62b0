"""A Redis stream, to which several processes append, and which all of them read.

All read the same entries in the same order, so who does what they say does what all others
do. That takes more than XADD and XREAD: a connection breaks, and an entry is appended twice;
a Redis fails, and has lost what some have read. Who uses this, as cluster.py does, hears of
each entry once, or that it does not know what others know: StartOver.

Begin with Entry, then Stream: append() and next() are the stream, is_next() is what it may
do wrong, ask() what Redis may. connect() comes last.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

END = b"\xff"  # of a text: no UTF-8 has it
SILENT = 5  # signs of life; who gives none between so many of another's is dead
COUNT = 100  # entries to fetch at once
ANSWER = 5  # seconds to wait for Redis
PAUSE = 0.1  # seconds, after a fault of Redis
# What Redis says when to wait does not help
HOPELESS = {"ERR", "MOVED", "NOAUTH", "NOPERM", "WRONGPASS", "WRONGTYPE"}
log = logging.getLogger("chat")


class StartOver(Exception):
    """This process does not know what others know; says why."""


class Missed(StartOver):
    """This process has not read all that others have, and may have counted wrong."""


class Lost(Missed):
    """The stream has lost what this process has read, and others have not."""


class Entry(NamedTuple):
    """What one process appended in one go."""

    position: str  # its ID
    before: str  # the position of the entry that was read before it
    author: str
    number: int  # one more than that of its author's entry before
    seen: str  # the position of the entry that its author had read last
    last: int | None  # the count of all at `seen`; None: its author asks for the room
    words: list[Any]
    said: list[bytes]  # texts

    @classmethod
    def parse(cls, position: str, before: str, fields: dict[bytes, bytes]) -> Entry:
        """Return the entry of these fields; if it is none, ValueError or LookupError."""
        author, seen = fields[b"author"].decode(), fields[b"seen"].decode()
        number, last = int(fields[b"number"]), fields.get(b"last")
        words = json.loads(fields[b"words"] or b"[]")
        *said, rest = fields[b"said"].split(END)
        if not isinstance(words, list) or order(seen) >= order(position):
            raise ValueError
        if rest or any(len(text) >= 2**16 for text in said):
            raise ValueError
        counted = None if last is None else int(last)
        return cls(position, before, author, number, seen, counted, words, said)


def order(position: str) -> tuple[int, int]:
    """Return what a position is ordered by: milliseconds, and a number in them."""
    milliseconds, _, number = position.partition("-")
    return int(milliseconds), int(number)


class Stream:
    """What all processes append to, and all read from its oldest entry on."""

    def __init__(self, redis: Redis, name: str, keep: float) -> None:
        self.redis, self.name, self.keep = redis, name, keep  # keep: seconds
        self.author = secrets.token_hex(6)  # this process, as the others know it
        self.number = 0  # of the last entry appended
        self.read_back = asyncio.Event()  # set when that was read, and obeyed
        self.fell_back = False  # it has a position before some that were read
        # Who takes part, the eldest first; with number and position of the last entry
        self.authors: dict[str, tuple[int, str]] = {}
        self.silent = Counter[str]()  # own signs of life since each one's last entry
        self.position = "0-0"  # of the last entry read
        self.fetched = deque[tuple[bytes, dict[bytes, bytes]]]()  # not read yet
        self.is_at_end = False  # the last fetch got all that was there
        self.all_read = asyncio.Event()  # set when all was read that was there
        self.times = deque[tuple[float, str]]()  # when which position was read

    async def check(self) -> None:
        """Raise OSError if the stream cannot be written to."""
        try:
            await self.redis.xtrim(self.name, maxlen=2**62)  # which drops nothing
        except (RedisError, OSError) as error:
            raise OSError(f"Redis: {reason(error)}") from None

    async def append(self, words: list[Any], said: bytes, last: int | None) -> None:
        """Append an entry until it is read back, and obeyed.

        `said` is texts, each with END. `last` is a number that is the same for all who have
        read as much, or None if it is not known. Redis may take an entry though its answer
        is lost, or lose it though it has answered. Who reads it twice sees its number.
        """
        self.number += 1
        self.read_back.clear()
        seen, text = self.position, json.dumps(words) if words else ""
        entry: dict[Any, Any] = {"author": self.author, "number": self.number}
        entry |= {"seen": seen, "words": text, "said": said}
        if last is not None:
            entry["last"] = last
        while not self.read_back.is_set():
            xadd, oldest = self.redis.xadd, self.oldest()
            position = await self.ask(xadd, self.name, entry, minid=oldest)
            self.fell_back = order(position.decode()) <= order(seen)
            await happens(self.read_back, ANSWER)

    async def next(self) -> Entry:
        """Return the next entry, or raise Lost; what is no entry is logged and skipped."""
        while True:
            while not self.fetched:
                if self.fell_back:  # so what is appended from now on would not be read
                    raise Lost("The stream fell back")
                if self.is_at_end:
                    self.all_read.set()
                wait = 2000 if self.is_at_end else None  # milliseconds; below ANSWER
                xread, since = self.redis.xread, {self.name: self.position}
                for _, fetched in await self.ask(xread, since, count=COUNT, block=wait):
                    self.fetched.extend(fetched)
                self.is_at_end = self.is_at_end or len(self.fetched) < COUNT
            position, fields = self.fetched.popleft()
            before, self.position = self.position, position.decode()
            with suppress(LookupError, ValueError, RecursionError):
                return Entry.parse(self.position, before, fields)
            log.warning("Skipped what is no entry of a chat: %s", self.position)

    async def is_next(self, entry: Entry) -> bool:
        """Tell whether to do what `entry` says, or raise StartOver: there is a hole."""
        number, position = self.authors.get(entry.author, (0, ""))
        xrange = self.redis.xrange
        # Its author has read what is not here, or its own entries have a hole.
        if order(entry.before) < order(entry.seen) or 0 < number < entry.number - 1:
            oldest = await self.ask(xrange, self.name, count=1)
            # What is missing was dropped if that is younger than what was read, else lost.
            dropped = oldest and order(oldest[0][0].decode()) > order(entry.before)
            fault = Missed if dropped else Lost
            raise fault("A part of the stream is missing")
        is_second = 0 < number == entry.number
        if is_second and not await self.ask(xrange, self.name, position, position):
            # The first is gone, and others have only this one.
            raise Lost("The stream has lost a part")
        if entry.number != number + 1:  # of who is unknown, that is 1: it is new
            return False
        self.authors[entry.author] = entry.number, entry.position
        self.silent[entry.author] = 0
        return True

    def silent_ones(self) -> list[str]:
        """Count a sign of life of this process; return those who seem to be dead."""
        self.silent.update([*self.authors])
        return [author for author in self.authors if self.silent[author] >= SILENT]

    def obeyed(self, entry: Entry) -> None:
        """Have append() return, if this was its entry."""
        if (entry.author, entry.number) == (self.author, self.number):
            self.read_back.set()

    def oldest(self) -> str:
        """Return the position of the oldest entry to keep: who appends, drops those before.

        By the clock of this process: if that of Redis is set back, all entries are of one
        millisecond. Only what is older than this process goes by the clock of Redis.
        """
        now = time.monotonic()
        if not self.times or self.times[-1][0] + self.keep / 100 <= now:
            self.times.append((now, self.position))
        while len(self.times) > 1 and self.times[1][0] + self.keep <= now:
            self.times.popleft()
        read_at, position = self.times[0]
        milliseconds, number = order(position)
        rest = max(0, int(1000 * (read_at + self.keep - now)))
        return f"{max(0, milliseconds - rest)}-{number}"

    async def ask(self, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what Redis answers, however long that takes; log each fault, but once.

        If to wait does not help, raise OSError.
        """
        name, logged = command.__name__, set[str]()
        while True:
            fault: BaseException | None = None
            try:
                answer = await command(*args, **options)
            except (RedisError, OSError, asyncio.CancelledError) as error:
                fault = error
            # Before Python 3.12, wait_for(), which redis-py uses, may lose a cancellation;
            # and one that nobody asked for would end this task without a word.
            if (task := asyncio.current_task()) and task.cancelling():
                raise asyncio.CancelledError
            if fault is None:
                return answer
            what = reason(fault)
            code = what.partition(" ")[0]
            told = isinstance(fault, (ResponseError, AuthenticationError))
            if told and code in HOPELESS:
                raise OSError(f"Redis, {name}: {what}")
            if what not in logged:
                log.warning("Redis, %s: %s", name, what)
                logged.add(what)
            if code == "OOM":  # which forbids XADD, but not to drop one half
                half = await self.ask(self.redis.xlen, self.name) // 2
                # If that may be approximate, Redis may drop nothing at all.
                exactly: dict[str, Any] = {"maxlen": half, "approximate": False}
                await self.ask(self.redis.xtrim, self.name, **exactly)
            await asyncio.sleep(PAUSE)


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait for `event`, but so long at most, and tell whether it is set."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def reason(error: BaseException) -> str:
    """Return what `error` says, after the kind of error that Redis named, if it did."""
    kind = getattr(error, "status_code", None) or ""
    # What follows " : " is what redis-py was told.
    text = (str(error) or repr(error)).partition(" : ")[0]
    return text if text.startswith(kind) else f"{kind} {text}"


def connect(url: str) -> Redis:
    """Return a client of the Redis at `url`, or of the master that Sentinels know.

    Their URL is sentinel://user:password@host:port,host:port/service, and the user is the
    master's. Raises ValueError for what is no URL.
    """
    sure: dict[str, Any] = {"socket_timeout": ANSWER, "socket_connect_timeout": ANSWER}
    sure |= {"retry": Retry(NoBackoff(), 0), "health_check_interval": 0}
    sure |= {"protocol": 2, "decode_responses": False, "legacy_responses": True}
    scheme, _, rest = url.partition("://")
    if scheme != "sentinel":
        # What this module relies on prevails over options in the URL.
        options: dict[str, Any] = {**parse_url(url), **sure}
        return Redis.from_pool(ConnectionPool(**options))
    place, _, service = rest.partition("/")
    user, _, hosts = place.rpartition("@")
    addresses = [host.rpartition(":") for host in hosts.split(",")]
    places = [(host, int(port)) for host, _, port in addresses]
    master: dict[str, Any] = {**parse_url(f"redis://{user}@"), **sure}
    sentinel: Any = Sentinel(places, sentinel_kwargs=sure)  # type: ignore[no-untyped-call]
    client: Redis = sentinel.master_for(service, **master)
    return client
