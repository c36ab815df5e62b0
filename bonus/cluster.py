# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4,<4", "redis[hiredis]"]
# ///
"""The chat in several processes, on one machine or many, as one room: the stream is the room.

    python bonus/cluster.py --port 8081 --redis redis://localhost
    python bonus/cluster.py --port 8082 --redis redis://localhost

Each process appends to a Redis stream what happens at its own sockets, and does what it reads
there, its own entries too. So all do the same in the same order: they have the same users,
and deliver the same messages, with no lock and no second source of truth.
"""

import asyncio
import json
import logging
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

sys.path.insert(0, str(Path(__file__).parent.parent))
import chat

RETENTION = 60_000  # milliseconds for which the stream keeps an entry
ALIVE = 4  # seconds between signs of life; who is silent for four of another's is gone
PATIENCE = 5  # seconds to wait for Redis
log = logging.getLogger("chat")


def order(position: str) -> list[int]:
    """Return what the ID of an entry is ordered by: milliseconds, and a number in them."""
    return [int(number) for number in position.split("-")]


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait for `event`, but so long at most, and tell whether it is set."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


class ClusterRoom(chat.Room):
    """The room of all processes; its `users` are those of this one."""

    def __init__(self, redis: Redis, stream: str) -> None:
        super().__init__()
        self.redis, self.stream = redis, stream
        self.wake = asyncio.Event()  # set when there is something to append
        self.under_way = asyncio.Event()  # set when what was appended is read back
        self.silent = Counter[str]()  # own signs of life since one of another process
        self.ready = asyncio.Event()  # set while this process knows the room
        self.process = ""  # a random name, for one life
        self.begin()

    def begin(self) -> None:
        """Be a new process, which does not know the room; who it was before is gone."""
        self.news = {"gone": [self.process], "new": ["?"]}  # for the next entry
        self.read_back = asyncio.Event()  # set when that was read back, and done
        self.process = secrets.token_hex(8)
        self.number = 0  # of the last entry appended
        self.position = "0-0"  # the ID of the last entry read
        self.everyone: dict[str, str] = {}  # process by name, in order of login
        self.processes: dict[str, int] = {}  # the last number read, the eldest first
        self.entering: dict[str, asyncio.Event] = {}  # set when the answer is known
        self.batch.clear()
        self.ready.clear()
        self.wake.set()

    def start_over(self, why: str) -> None:
        """Be a new process, and have the users of this one come back to it."""
        log.warning("%s: the users of this process have to come back", why)
        self.under_way.set()  # nobody is going to read it
        self.begin()
        self.closing = asyncio.create_task(super().close(1012, why.encode()))

    # What happens at the sockets of this process

    def names(self) -> list[str]:
        """Return the names of all users of all processes, in order of login."""
        return list(self.everyone)

    async def enter(self, user: chat.User) -> None:
        """Log `user` in, or raise HTTPConflict; without Redis, HTTPServiceUnavailable."""
        name = user.name
        taken = web.HTTPConflict(text=f"User {name} already logged in")
        # Listed, but of no user here, it is one who is leaving: this login comes after that.
        if self.everyone.get(name, self.process) != self.process or name in self.users:
            raise taken
        # More would fill the memory while Redis is away.
        if len(self.entering) < 1000 and await happens(self.ready, PATIENCE):
            if name not in self.entering:
                self.entering[name] = self.append("entered", name)
            # Of all who wait for the same name here, the first one takes it.
            if await happens(self.entering[name], PATIENCE) and name in self.everyone:
                if self.everyone[name] != self.process or name in self.users:
                    raise taken
                self.users[name] = user
                return
        raise web.HTTPServiceUnavailable(text="The room cannot be reached just now")

    def changed(self, name: str, how: str) -> None:
        """Tell all processes that `name` has left this one."""
        if self.everyone.get(name) == self.process:
            self.append("left", f"{name}:{how}")

    def flush(self) -> None:
        """Let the next entry take the batch, which may grow until then."""
        if self.batch:
            self.wake.set()

    async def close(self, code: int, reason: bytes) -> None:
        """Log off everyone here, or everywhere, if it is the operator's reset: code 1000."""
        resets = code == 1000
        word = ("reset", reason.decode()) if resets else ("gone", self.process)
        if not await happens(self.append(*word), 2) and resets:
            raise web.HTTPServiceUnavailable(text="The reset waits for Redis")
        await super().close(code, reason)

    # What is appended

    def append(self, kind: str, word: str) -> asyncio.Event:
        """Have the next entry say this; return the event that it is read back, and done."""
        self.news.setdefault(kind, []).append(word)
        self.wake.set()
        return self.read_back

    async def write(self) -> None:
        """Append one entry after another, each of all that happened during the one before.

        Redis may take it though the answer is lost, or lose it though it has answered: so it
        is appended until it is read back. Who reads it twice knows that by its number.
        """
        while True:
            await self.wake.wait()
            self.wake.clear()
            process, seen, self.number = self.process, self.position, self.number + 1
            news = {kind: "\n".join(words) for kind, words in self.news.items()}
            head = {"process": process, "number": self.number, "seen": seen}
            entry = {**head, **news, "said": bytes(self.batch)}
            self.under_way, self.read_back = self.read_back, asyncio.Event()
            self.news = {}
            self.batch.clear()
            self.flushed.set()
            self.flushed.clear()
            xadd, oldest = self.redis.xadd, max(0, order(seen)[0] - RETENTION)
            while not self.under_way.is_set():
                position = await self.ask(xadd, self.stream, entry, minid=oldest)
                if process == self.process and order(position.decode()) <= order(seen):
                    self.start_over("The stream fell back")  # after a failover
                await happens(self.under_way, PATIENCE)

    async def live(self) -> None:
        """Give signs of life; a process of which there is none between four is gone."""
        while True:
            await asyncio.sleep(ALIVE)
            kind = "alive" if self.ready.is_set() else "new"
            # Not after its own end, nor for others' silence while Redis is away.
            if self.process in self.processes:
                heard = await happens(self.append(kind, "?"), PATIENCE)
                for process in self.processes if heard else ():
                    self.silent[process] += 1
                    if self.silent[process] >= 4:
                        self.append("gone", process)

    async def ask(self, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what Redis answers to `command`, which is repeated until it does."""
        pause = 0.05  # seconds
        while True:
            try:
                return await command(*args, **options)
            except (RedisError, OSError) as error:
                if pause < 0.1:
                    log.warning("Redis: %s", error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1)

    # What is read

    async def read(self) -> None:
        """Do what one entry after another says, from the last one read on."""
        while True:
            position, xread = self.position, self.redis.xread
            answer = await self.ask(xread, {self.stream: position}, 100, block=2000)
            for entry_id, fields in answer[0][1] if answer else []:
                if self.position != position:
                    break  # there is another place to read on from
                before, position = position, entry_id.decode()
                self.position, said = position, fields.pop(b"said")
                entry = {kind.decode(): text.decode() for kind, text in fields.items()}
                if self.is_next(entry, before):
                    await self.apply(entry, said)

    def is_next(self, entry: dict[str, str], before: str) -> bool:
        """Tell whether to do what `entry` says; start over if an earlier one is missing."""
        process, number = entry["process"], int(entry["number"])
        last = self.processes.get(process, 0)
        if self.ready.is_set():
            # What its author had read is before it, unless the stream has fallen back since.
            missed = order(before) < order(entry["seen"]) < order(self.position)
            if missed or 0 < last < number - 1:
                self.start_over("A part of the stream is missing")
                return False
            if not last and number > 1:
                if process != self.process:
                    self.append("gone", process)  # it reads that, and starts over
                return False
        if number > last:
            self.processes[process], self.silent[process] = number, 0
        return number > last  # else it was appended twice

    async def apply(self, entry: dict[str, str], said: bytes) -> None:
        """Do what `entry` says, with `said` first."""
        process, ready = entry["process"], self.ready.is_set()
        if said and ready:
            self.deliver(said)
        known = "left", "entered", "reset", "gone", "new"
        for kind in known if ready else ("gone", "room"):
            for word in entry.get(kind, "").splitlines():
                self.obey(process, kind, word)
        if self.process == self.eldest():
            self.ready.set()  # there is nobody to ask
        own = process == self.process
        if own and entry["number"] == str(self.number):
            self.under_way.set()
        await asyncio.sleep(0)  # who waited for this goes on before the next is read
        for name in entry.get("entered", "").splitlines() if own else []:
            self.entering.pop(name, None)
            if self.everyone.get(name) == process and name not in self.users:
                self.append("left", f"{name}:did not wait")

    def obey(self, process: str, kind: str, word: str) -> None:
        """Do what `process` says with one word."""
        if kind == "left":
            name, _, how = word.partition(":")
            self.remove([name] if self.everyone.get(name) == process else [], how)
        elif kind == "entered" and word not in self.everyone:
            self.everyone[word] = process
            super().changed(word, "logged in")
        elif kind == "reset":
            self.remove(self.names(), f"was let go: {word}")
            self.closing = asyncio.create_task(super().close(1000, word.encode()))
        elif kind == "gone":
            self.processes.pop(word, None)
            self.remove([n for n, p in self.everyone.items() if p == word], "is gone")
            if word == self.process != process:
                self.start_over("This process was taken for dead")
        elif kind == "new" and process != self.process == self.eldest():
            room = [self.position, self.processes, self.everyone]
            self.append("room", json.dumps(room))
        elif kind == "room" and self.process in json.loads(word)[1]:
            self.position, self.processes, self.everyone = json.loads(word)
            self.ready.set()

    def eldest(self) -> str:
        """Return the process that is in the room for the longest time."""
        return next(iter(self.processes), "")

    def remove(self, names: list[str], how: str) -> None:
        """Take `names` off the list."""
        for name in names:
            del self.everyone[name]
            super().changed(name, how)

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Take part in the room; let users in as soon as it is known."""
        async with self.redis:
            try:
                await self.redis.ping()
            except (RedisError, OSError) as error:
                raise OSError(f"Redis: {error}") from None
            jobs = self.read(), self.write(), self.live()
            tasks = [asyncio.create_task(job) for job in jobs]
            await self.ready.wait()
            yield
            for task in tasks:
                task.cancel()


def make_app(url: str, stream: str) -> web.Application:
    """Return the chat as an application of one room with all others at that stream."""
    room = ClusterRoom(Redis.from_url(url), stream)
    app = chat.make_app(room)
    app.cleanup_ctx.append(room.run)
    return app


if __name__ == "__main__":
    parser = chat.options("The chat in several processes, as one room")
    parser.add_argument("--redis", default="redis://localhost", help="its URL")
    parser.add_argument("--name", default="chat", help="the stream's; default: chat")
    args = parser.parse_args()
    try:
        app = make_app(args.redis, args.name)
    except ValueError as error:
        parser.error(str(error))
    chat.serve(app, args.host, args.port)
