# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4,<4", "redis[hiredis]>=8"]
# ///
"""The chat in several processes, on one machine or many, as one room: the stream is the room.

    python bonus/cluster.py --port 8081 --redis redis://localhost
    python bonus/cluster.py --port 8082 --redis redis://localhost

Each process appends to a Redis stream what happens at its own sockets, and does what it reads
there, its own entries too. So all do the same in the same order: they have the same users, and
the same messages under the same numbers, with no lock and no second source of truth.

Read chat.py first, then this from the top: chapters 1 and 2 are a room in several processes.
3 is how a name goes from one connection to the next, 4 how a process that starts learns what
the others know, 5 what a stream may do wrong. 6 serves it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import WSMsgType, web
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

sys.path.insert(0, str(Path(__file__).parent.parent))
import chat

PATIENCE = 6  # seconds that a login waits; by then, a dead process is gone
MAX_WAITING = 1000  # logins at once; more would fill the memory while Redis is away
SILENT = 5  # signs of life; who gives none between so many of another's is gone
END = b"\xff"  # of a message: no UTF-8 has it
log = logging.getLogger("chat")


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Wait for `event`, but so long at most, and tell whether it is set."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


@dataclass
class Draft:
    """The next entry of this process, as it gathers while another is under way."""

    words: list[Any] = field(default_factory=list)
    said: bytearray = field(default_factory=bytearray)  # messages, each with END
    # Who want to know whether all that they said was heard
    asking: dict[str, chat.User] = field(default_factory=dict)
    taken: asyncio.Event = field(default_factory=asyncio.Event)  # it gathers no more
    done: asyncio.Event = field(default_factory=asyncio.Event)  # it is read, and obeyed


class ClusterRoom(chat.Room):
    """The room of all processes; its `users` are those of this one."""

    since: str  # what was said by who had not read so far is not heard

    def __init__(self, redis: Redis, name: str, keep: float, alive: float) -> None:
        super().__init__()
        self.redis, self.name, self.keep, self.alive = redis, name, keep, alive
        self.wake = asyncio.Event()  # set when there is something to append
        # Set while it knows the room, and has read all that was there when it started
        self.ready = asyncio.Event()
        self.pending: dict[str, Wish] = {}  # logins, by a random word for each
        self.closing = set[asyncio.Task[bool]]()
        self.draft = Draft()
        self.be_born()

    # 1. What happens at the sockets of this process goes into its next entry

    def append(self, *word: Any) -> asyncio.Event:
        """Have the next entry say `word`; return the event that it is read, and obeyed."""
        self.draft.words.append(word)
        self.wake.set()
        return self.draft.done

    async def say(self, user: chat.User, text: bytes) -> None:
        """Have everyone hear it; while Redis is slow, wait, so that memory is bounded."""
        while len(self.draft.said) > chat.MAX_BATCH:
            await self.draft.taken.wait()
        if self.users.get(user.name) is user:
            self.draft.said += user.name.encode() + b": " + text + END
            self.wake.set()

    def answer(self, user: chat.User) -> None:
        """Tell `user` where it is, when all that it said before has come back.

        Even if it said nothing: so a page finds out that its process is cut off from the
        room, and goes to another one.
        """
        self.draft.asking[user.name] = user
        self.wake.set()

    def leave(self, user: chat.User, how: str = "left") -> None:
        """Log `user` off, unless that was done before."""
        if self.users.get(user.name) is user:
            del self.users[user.name]
            if owner := self.everyone.get(user.name):
                self.append("left", user.name, owner.login, how)

    def names(self) -> list[str]:
        """Return the names of all users of all processes, in order of login."""
        if not self.ready.is_set():
            raise web.HTTPServiceUnavailable(text="The room is not known just now")
        return list(self.everyone)

    def is_key_of(self, name: str, key: str) -> bool:
        """Tell whether the user of that name is here, in any process, with this key."""
        owner = self.everyone.get(name)
        return owner is not None and owner.key == hashed(key) != ""

    async def close(self, code: int, reason: str) -> None:
        """Log off everyone here, or everywhere, if it is the operator's reset: code 1000."""
        if code == 1000:
            if not await happens(self.append("reset", reason), 2):
                raise web.HTTPServiceUnavailable(text="The reset waits for Redis")
        else:
            how = "was let go: " + reason
            await happens(self.append("gone", self.stream.author, how), 2)
            self.let_go([*self.users.values()], code, reason)
        await asyncio.gather(*self.closing)

    def let_go(self, users: list[chat.User], code: int, reason: str) -> None:
        """Close the connections of `users`, who say nothing more from now on."""
        self.flush()
        for user in users:
            self.users.pop(user.name, None)
            if user.prepared:
                closing = user.close(code=code, message=reason.encode())
                self.closing.add(task := asyncio.create_task(closing))
                task.add_done_callback(self.closing.discard)

    async def write(self) -> None:
        """Append one entry after another, each of all that happened during the one before.

        So batches grow with the load, and Redis gets one command a round trip at most.
        """
        while True:
            await self.wake.wait()
            self.wake.clear()
            draft, self.draft = self.draft, Draft()
            draft.taken.set()
            if self.ready.is_set():
                draft.words += self.wishes()
            if self.is_to_tell():
                draft.words.append(self.state())
            last = self.last if self.knows else None
            await self.stream.append(draft.words, bytes(draft.said), last)
            draft.done.set()
            for user in draft.asking.values():
                super().answer(user)

    # 2. What is read, all processes do

    async def obey(self, entry: Entry) -> None:
        """Do what `entry` says, its messages first; raise StartOver if that cannot be."""
        authors, me = self.stream.authors, self.stream.author
        if not self.knows:
            return self.learn(entry)
        if not await self.stream.is_next(entry):
            if self.ready.is_set() and entry.author not in {me, *authors}:
                # It does not know that it was taken for dead, and is going to read this.
                self.append("gone", entry.author, "is gone")
            return
        authors[entry.author] = entry.number, entry.position
        self.silent[entry.author] = 0
        if order(entry.seen) >= order(self.since):
            # What is the last message there for its author, is that for this process.
            if entry.last not in (None, self.counts.get(entry.seen, entry.last)):
                raise Lost("Others have other messages")
            for message in entry.said:
                self.add(message)
        self.counts[entry.position] = self.last
        if len(self.counts) > 1000:
            del self.counts[next(iter(self.counts))]
        for word in entry.words:
            match word:
                case ["enter", str(name), str(login), str(key), int(turn)]:
                    self.wish(name, Owner(login, entry.author, key, turn))
                case ["moved", str(name), str(login), [*to], float(credit)]:
                    if len(to) == 4:
                        self.move(name, login, Owner(*to), credit)
                case ["left", str(name), str(login), str(how)]:
                    if self.owns(login, name):
                        self.remove([name], how)
                case ["gone", str(process), str(how)]:
                    if process == me != entry.author:
                        raise StartOver("This process was taken for dead")
                    authors.pop(process, None)
                    owners = self.everyone.items()
                    gone = [name for name, it in owners if it.process == process]
                    self.remove(gone, how)
                case ["reset", str(reason)]:
                    self.since = entry.position  # what was said before is heard no more
                    self.draft.said.clear()
                    self.remove([*self.everyone], "was let go: " + reason)
                    self.let_go([*self.users.values()], 1000, reason)
                case ["room", *_] if self.ready.is_set():
                    self.tell_at = time.monotonic() + self.keep / 8
                case ["founds", *_] if order(entry.seen) >= order(self.since):
                    raise StartOver("This process was taken for dead")
                case ["lost"]:
                    raise StartOver("The stream has lost a part")
        if entry.last is None:  # its author asks what the room is, which is known
            self.tell_at = 0.0
            self.wake.set()

    def remove(self, names: list[str], how: str) -> None:
        """Take `names` off the list."""
        for name in names:
            del self.everyone[name]
            self.changed(name, how)
        if self.pending:
            self.utter_again()

    async def flush_soon(self) -> None:
        """Flush at once: an entry is a batch already, and to wait again would only cost."""
        self.flushing = None
        self.flush()

    def changed(self, name: str, how: str) -> None:
        """Log who came or went, and tell everyone here; not what is long past."""
        if self.ready.is_set():
            super().changed(name, how)

    # 3. A name is one login's, which hands it over to the next one of the same user
    #
    # The process of the new connection says what it wants. The one of the old connection
    # reads that, lets its user go, and says so after all that this user said. So all of it
    # has been heard when the new connection begins.

    async def enter(self, user: chat.User) -> None:
        """Log `user` in, or raise HTTPConflict; without Redis, HTTPServiceUnavailable."""
        taken = web.HTTPConflict(text=f"User {user.name} already logged in")
        away = web.HTTPServiceUnavailable(text="The room cannot be reached just now")
        if not self.is_free_for(user):
            raise taken
        if len(self.pending) >= MAX_WAITING:
            raise away
        login, wish = secrets.token_hex(8), Wish(user)
        self.pending[login] = wish
        self.wake.set()
        try:
            if not await happens(wish.answered, PATIENCE):
                raise away
        finally:
            del self.pending[login]
        if self.users.get(user.name) is not user:
            raise taken

    def is_free_for(self, user: chat.User) -> bool:
        """Tell whether the name is nobody's, in no process, or the same user's."""
        owner = self.everyone.get(user.name)
        if owner is None or owner.yields_to(hashed(user.key), user.turn):
            return True
        # Listed, but of no user here, it is one who is leaving: a login comes after that.
        return owner.process == self.stream.author and user.name not in self.users

    def wishes(self) -> list[Any]:
        """Return the words of those who wait for a name and have not uttered it yet."""
        words = []
        for login, wish in self.pending.items():
            user = wish.user
            done = wish.answered.is_set() or user.transport.is_closing()
            if not wish.uttered and not done:
                wish.uttered = True
                words.append(("enter", user.name, login, hashed(user.key), user.turn))
        return words

    def utter_again(self) -> None:
        """Have those say their wish again who wait for somebody to hand over a name."""
        for wish in self.pending.values():
            wish.uttered = False
        self.wake.set()

    def wish(self, name: str, new: Owner) -> None:
        """Give `name` to `new` if it is free; its owner hands it over if it may."""
        owner, wish = self.everyone.get(name), self.pending.get(new.login)
        if not owner:
            self.give(name, new, "logged in")
        elif not owner.yields_to(new.key, new.turn):
            if wish and not self.is_free_for(wish.user):
                wish.answered.set()
        elif owner.process == self.stream.author and owner.login != new.login:
            credit = float(chat.BURST)
            if user := self.users.get(name):
                credit = user.credit + chat.RATE * (time.monotonic() - user.paid_at)
                self.let_go([user], 1000, "logged in again elsewhere")
            self.append("moved", name, owner.login, new, credit)

    def move(self, name: str, login: str, new: Owner, credit: float) -> None:
        """Give `name` to `new`, with the token bucket, if `login` still owns it."""
        if self.owns(login, name) and new.process not in self.stream.authors:
            self.remove([name], "is gone")
        elif self.owns(login, name):
            if wish := self.pending.get(new.login):
                wish.user.credit, wish.user.paid_at = credit, time.monotonic()
            self.give(name, new, "came back")

    def give(self, name: str, owner: Owner, how: str) -> None:
        """Have `owner` own `name`."""
        self.everyone[name] = owner
        if owner.process == self.stream.author:
            wish = self.pending.get(owner.login)
            if wish and not wish.user.transport.is_closing():
                self.users[name] = wish.user
                wish.answered.set()
            else:
                self.append("left", name, owner.login, "did not wait")
        self.changed(name, how)

    def owns(self, login: str, name: str) -> bool:
        """Tell whether `login` owns `name`, at this place of the stream."""
        return name in self.everyone and self.everyone[name].login == login

    # 4. Who does not know the room reads on until somebody says what it is
    #
    # From time to time, the eldest process says that. Who starts reads the stream from its
    # oldest entry on, and from the first such word on it does what all did: so it has the
    # same room, and the same messages. If the stream has none, it asks; if nobody answers
    # for two signs of life, it founds a room.
    #
    # A process lives more than once. If it has missed something, or the others took it for
    # dead, it lets its users go, who come back, and starts over under another name.

    def be_born(self, *words: Any) -> None:
        """Be a process that knows nothing; its first entry is going to say `words`."""
        self.stream = Stream(self.redis, self.name, self.keep)
        # Signs of life since the last one of that process, and of any that knows the room
        self.silent = Counter[str]()
        self.silence = 0
        self.tell_at = 0.0  # when the eldest is to say again what the room is
        self.ready.clear()
        self.draft.taken.set()
        self.draft = Draft([*words])
        self.know({}, {}, self.last, "")
        self.utter_again()

    def know(self, authors: Any, everyone: Any, last: int, since: str) -> None:
        """Have this room, or none if `since` is ""; keep none of the messages before."""
        self.knows, self.since = since != "", since
        self.stream.authors = {name: tuple(it) for name, it in authors.items()}
        self.everyone: dict[str, Owner] = {n: Owner(*it) for n, it in everyone.items()}
        # The number of the last message at each of the last positions
        self.counts = dict[str, int]()
        self.messages.clear()
        self.size, self.last, self.forgotten = 0, last, last
        self.flush()

    def state(self) -> tuple[Any, ...]:
        """Return the word that says what the room is, as of what was read last."""
        here = self.stream.position, self.stream.authors, self.everyone
        if self.knows:
            return "room", *here, self.last, self.since
        # The clock gives the first number, as in chat.py; none comes again.
        return "founds", *here, max(time.time_ns() // 1000, self.last + 2**20), ""

    def learn(self, entry: Entry) -> None:
        """See whether `entry` says what the room is; if so, read on from where it was that."""
        self.stream.authors[entry.author] = entry.number, entry.position
        if entry.last is not None:
            self.silence = 0  # there is somebody who is going to answer
        for word in entry.words:
            match word:
                case ["room" | "founds", str(at), who, owners, int(last), str(since)]:
                    if self.stream.go_back(at):
                        self.know(who, owners, last, since or entry.position)

    async def read(self) -> None:
        """Do what one entry after another says."""
        while True:
            if self.knows and not self.ready.is_set():
                self.ready.set()
                self.wake.set()
            if entry := await self.stream.next():
                try:
                    await self.obey(entry)
                except StartOver:
                    self.ready.clear()  # write() may run once more, and must not tell it
                    raise
                self.stream.obeyed(entry)

    async def live(self) -> None:
        """Be in the room, from one start to the next."""
        me = asyncio.current_task()
        # A life that raises StartOver may not see that it is cancelled, too.
        while not (me and me.cancelling()):
            try:
                # Before Python 3.13, a task whose TaskGroup has failed counts as cancelled
                # from then on. So each life is a task of its own.
                await asyncio.create_task(self.life())
            except StartOver as error:
                log.warning("%s: the users of this process have to come back", error)
                self.let_go([*self.users.values()], 1012, str(error))
                # What is lost to all has all start over, with other numbers.
                lost = [("lost",)] if isinstance(error, Lost) and self.knows else []
                self.be_born(("gone", self.stream.author, "has to come back"), *lost)

    async def life(self) -> None:
        """Learn what the stream keeps, then take part, until StartOver is raised."""
        while entry := await self.stream.next(wait=None):
            try:
                await self.obey(entry)
            except StartOver:
                self.know({}, {}, self.last, "")
                self.learn(entry)
        try:
            async with asyncio.TaskGroup() as group:
                for job in self.read(), self.write(), self.give_signs():
                    group.create_task(job)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def give_signs(self) -> None:
        """Append something from time to time; who does not, as often as this one, is gone.

        So time without Redis does not count, nor time in which this process stood still.
        """
        while True:
            await asyncio.sleep(self.alive)
            self.utter_again()
            await self.draft.done.wait()
            if not self.knows:
                self.silence += 1
            elif self.stream.author in self.stream.authors:  # it has not left
                for process in self.stream.authors:
                    self.silent[process] += 1
                    if self.silent[process] >= SILENT:
                        self.append("gone", process, "is gone")
            if self.is_to_tell():
                self.wake.set()

    def is_to_tell(self) -> bool:
        """Tell whether this process is to say now what the room is."""
        if not self.knows:
            return self.silence >= 2
        eldest = next(iter(self.stream.authors), "") == self.stream.author
        return eldest and self.ready.is_set() and time.monotonic() >= self.tell_at

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Be in the room while the application serves, or end it if that cannot be.

        If a task of a TaskGroup fails, whoever waits in the group is cancelled: here it is
        the server. A chat that is deaf must not look like one that is quiet.
        """
        try:
            async with self.redis, asyncio.TaskGroup() as group:
                try:  # whether the stream can be written to; this drops nothing
                    await self.redis.xtrim(self.name, maxlen=2**62)
                except (RedisError, OSError) as error:
                    raise OSError(f"Redis: {reason(error)}") from None
                living = group.create_task(self.live())
                await self.ready.wait()
                yield
                living.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


class Owner(NamedTuple):
    """A login, at one process, to which a name belongs."""

    login: str
    process: str
    key: str  # hashed
    turn: int

    def yields_to(self, key: str, turn: int) -> bool:
        """Tell whether a login with this key is of the same user, and of no earlier turn."""
        return self.key == key != "" and self.turn <= turn


@dataclass
class Wish:
    """A user who waits for its name."""

    user: chat.User
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    uttered: bool = False  # in an entry


def hashed(key: str) -> str:
    """Return what may be known elsewhere of a user's key."""
    return key and hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:32]


# 5. The stream, which may fail, forget, and say something twice

ANSWER = 5  # seconds to wait for Redis
HOPELESS = {"ERR", "MOVED", "NOAUTH", "NOPERM", "WRONGPASS", "WRONGTYPE"}


class StartOver(Exception):
    """This process does not know what others know; says why."""


def reason(error: BaseException) -> str:
    """Return what `error` says, after the kind of error that Redis named, if it did."""
    kind = getattr(error, "status_code", None) or ""
    text = str(error).partition(" : ")[0]  # what follows is what redis-py was told
    return text if text.startswith(kind) else f"{kind} {text}"


class Lost(StartOver):
    """The stream has lost what this process has read, and others have not."""


def order(position: str) -> tuple[int, int]:
    """Return what the ID of an entry is ordered by: milliseconds, and a number in them."""
    milliseconds, _, number = position.partition("-")
    return int(milliseconds), int(number)


@dataclass
class Entry:
    """What one process appended in one go."""

    position: str  # its ID
    author: str
    number: int  # one more than that of its author's entry before
    seen: str  # the position of the entry that its author had read last
    words: list[Any]
    said: list[bytes]  # messages, each a frame
    last: int | None  # the number of the last message at `seen`, if its author knew

    @classmethod
    def parse(cls, position: str, fields: dict[bytes, bytes]) -> Entry:
        """Return the entry of these fields; if it is none, ValueError or LookupError."""
        author, seen = fields[b"author"].decode(), fields[b"seen"].decode()
        words = json.loads(fields[b"words"] or b"[]")
        if not isinstance(words, list) or order(seen) >= order(position):
            raise ValueError
        *texts, rest = fields[b"said"].split(END)
        if rest:
            raise ValueError
        said = [chat.frame(WSMsgType.TEXT, text) for text in texts]
        last = int(fields[b"last"]) if b"last" in fields else None
        return cls(position, author, int(fields[b"number"]), seen, words, said, last)


class Stream:
    """What all processes append to, and all read in the same order; one for each life."""

    def __init__(self, redis: Redis, name: str, keep: float) -> None:
        self.redis, self.name, self.keep = redis, name, keep
        self.author = secrets.token_hex(6)  # this process, as the others know it
        self.number = 0  # of the last entry appended
        self.read_back = asyncio.Event()  # set when that was read, and obeyed
        # Who is in the room, the eldest first; with number and position of the last entry
        self.authors: dict[str, tuple[int, str]] = {}
        self.position = self.before = "0-0"  # of the last one read, and the one before
        self.oldest = ""  # the first position read
        self.went_back_at = "0-0"
        self.fetched = deque[tuple[bytes, dict[bytes, bytes]]]()  # not read yet
        self.times = deque[tuple[float, str]]()  # when which position was read
        self.faults = dict[str, tuple[str, float]]()  # of Redis, and the next pause
        self.is_full = False  # Redis has no memory left

    async def append(self, words: list[Any], said: bytes, last: int | None) -> None:
        """Append an entry until it is read back, and obeyed.

        `last` is the number of the last message, as of what was read, if that is known.
        Redis may take it though the answer is lost, or lose it though it has answered.
        Who reads it twice knows that by its number.
        """
        self.number += 1
        self.read_back.clear()
        seen, text = self.position, json.dumps(words) if words else ""
        entry: dict[Any, Any] = {"author": self.author, "number": self.number}
        entry |= {"seen": seen, "words": text, "said": said}
        if last is not None:
            entry["last"] = last
        while not self.read_back.is_set():
            if position := await self.ask(self.redis.xadd, self.name, entry):
                if order(position.decode()) <= order(seen):
                    raise Lost("The stream fell back")
                await happens(self.read_back, ANSWER)
            await self.trim()

    async def next(self, wait: int | None = 2000) -> Entry | None:
        """Return the next entry, or None if there is none within `wait` milliseconds."""
        while True:
            while self.fetched:
                position, fields = self.fetched.popleft()
                self.before, self.position = self.position, position.decode()
                self.oldest = self.oldest or self.position
                with suppress(LookupError, ValueError, RecursionError, OverflowError):
                    return Entry.parse(self.position, fields)
                log.warning("Skipped what is no entry of a chat: %s", self.position)
            since = {self.name: self.position}
            answer = await self.ask(self.redis.xread, since, count=100, block=wait)
            if answer == []:
                return None
            self.fetched.extend(answer[0][1] if answer else ())

    def obeyed(self, entry: Entry) -> None:
        """Have append() return, if this was its entry."""
        if (entry.author, entry.number) == (self.author, self.number):
            self.read_back.set()

    def go_back(self, position: str) -> bool:
        """Read on from `position`, if all since then was read.

        But each entry may ask for that once, or a hole after it would be read for ever.
        """
        behind = order(self.position) <= order(self.went_back_at)
        if behind or order(position) < order(self.oldest):
            return False
        self.fetched.clear()
        self.went_back_at, self.position = self.position, position
        return True

    async def is_next(self, entry: Entry) -> bool:
        """Tell whether to do what `entry` says, or raise StartOver: there is a hole."""
        number, position = self.authors.get(entry.author, (0, ""))
        # What its author had read is before it, unless the stream has fallen back since.
        missed = order(self.before) < order(entry.seen)
        if missed or 0 < number < entry.number - 1:
            raise StartOver("A part of the stream is missing")
        first, xrange = None, self.redis.xrange
        while 0 < number == entry.number and first is None:  # it was read before
            first = await self.ask(xrange, self.name, position, position)
        if first == []:  # but that one is gone, and others have only this one
            raise Lost("The stream has lost a part")
        return entry.number == number + 1  # of who is unknown, that is 1: it is new

    async def trim(self) -> None:
        """Drop what was read longer ago than is kept; if Redis is full, one half.

        By the clock of this process, since that of Redis may be set back: then all entries
        are of one millisecond. That counts only for what is older than this process.
        """
        now = time.monotonic()
        done = self.times and now < self.times[-1][0] + self.keep / 100
        if done and not self.is_full:
            return
        self.times.append((now, self.position))
        while len(self.times) > 1 and self.times[1][0] <= now - self.keep:
            self.times.popleft()
        read_at, oldest = self.times[0]
        if read_at > now - self.keep:
            milliseconds = int(1000 * (read_at - now + self.keep))
            oldest = f"{max(0, order(oldest)[0] - milliseconds)}-0"
        if self.is_full:  # which forbids XADD, but not XTRIM
            self.is_full = False
            half = (await self.ask(self.redis.xlen, self.name) or 2**62) // 2
            # If that may be approximate, Redis may drop nothing at all.
            exactly: dict[str, Any] = {"maxlen": half, "approximate": False}
            await self.ask(self.redis.xtrim, self.name, **exactly)
        else:
            await self.ask(self.redis.xtrim, self.name, minid=oldest)

    async def ask(self, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what Redis answers, or None if it fails: log how, but once, and wait.

        If to wait does not help, raise OSError.
        """
        name = command.__name__
        fault: BaseException | None = None
        before, pause = self.faults.pop(name, ("", 0.05))
        try:
            answer = await command(*args, **options)
        except (RedisError, OSError, asyncio.CancelledError) as error:
            fault = error
        # Before Python 3.12, wait_for(), which redis-py uses, may lose a cancellation; and
        # one that nobody asked for would end this task without a word.
        if (task := asyncio.current_task()) and task.cancelling():
            raise asyncio.CancelledError
        if fault is None:
            return answer
        what = reason(fault)
        code = what.partition(" ")[0]
        told = isinstance(fault, (ResponseError, AuthenticationError))
        if told and code in HOPELESS:
            raise OSError(f"Redis, {name}: {what}")
        if what != before:
            log.warning("Redis, %s: %s", name, what)
        self.is_full = code == "OOM"
        self.faults[name] = what, min(2 * pause, 1)
        await asyncio.sleep(pause)
        return None


# 6. Serving


def connect(url: str) -> Redis:
    """Return a client of the Redis at `url`, or of the master that Sentinels know.

    Their URL is sentinel://user:password@host:port,host:port/service, and the user is the
    master's. Raises ValueError for what is no URL.
    """
    sure: dict[str, Any] = {"socket_timeout": ANSWER, "socket_connect_timeout": ANSWER}
    sure |= {"retry": Retry(NoBackoff(), 0), "health_check_interval": 0}
    scheme, _, rest = url.partition("://")
    if scheme == "sentinel":
        place, _, service = rest.partition("/")
        user, _, hosts = place.rpartition("@")
        addresses = [host.rpartition(":") for host in hosts.split(",")]
        places = [(host, int(port)) for host, _, port in addresses]
        master = parse_url(f"redis://{user}@")
        sentinel: Any = Sentinel(places, sentinel_kwargs=sure)  # type: ignore[no-untyped-call]
        pool: ConnectionPool = SentinelConnectionPool(service, sentinel, **master)  # type: ignore[no-untyped-call]
    else:
        pool = ConnectionPool.from_url(url)
    # What this program relies on prevails over options in the URL.
    sure |= {"protocol": 2, "decode_responses": False, "legacy_responses": True}
    pool.connection_kwargs.update(sure)
    return Redis.from_pool(pool)


def make_app(
    url: str, name: str, keep: float = 60, alive: float = 1
) -> web.Application:
    """Return the chat as an application of one room with all others at that stream."""
    room = ClusterRoom(connect(url), name, keep, alive)
    app = chat.make_app(room)
    app.cleanup_ctx.append(room.run)
    return app


def seconds(text: str) -> float:
    """Return an option's seconds, of which there must be some."""
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


if __name__ == "__main__":
    parser = chat.options("The chat in several processes, as one room")
    add = parser.add_argument
    add("--redis", default="redis://localhost", help="its URL; default: %(default)s")
    add("--name", default="chat", help="of the stream; default: %(default)s")
    add("--keep", default=60, type=seconds, help="seconds that it keeps; default: 60")
    add("--alive", default=1, type=seconds, help="seconds between signs of life")
    args = parser.parse_args()
    try:
        app = make_app(args.redis, args.name, args.keep, args.alive)
    except ValueError as error:
        parser.error(f"Redis: {error}")
    chat.serve(app, args.host, args.port)
