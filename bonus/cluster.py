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
the others know, 5 serves it. stream.py is the stream; read its Entry before chapter 2.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import WSMsgType, web

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stream import END, Entry, Lost, Missed, StartOver, Stream, connect, happens, order

import chat

PATIENCE = 6  # seconds that a login waits for Redis
MAX_WAITING = 1000  # logins; more would fill the memory while Redis is away


class Owner(NamedTuple):
    """A login, at one process, to which a name belongs."""

    login: str
    process: str  # the author of its entries
    key: str  # hashed
    turn: int

    def yields_to(self, key: str, turn: int) -> bool:
        """Tell whether a login with this key is of the same user, and of no earlier turn."""
        return self.key == key != "" and self.turn <= turn


def hashed(key: str) -> str:
    """Return what may be known elsewhere of a user's key."""
    return key and hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:32]


@dataclass
class Draft:
    """The next entry of this process, as it gathers while another is under way."""

    words: list[Any] = field(default_factory=list)
    said: dict[chat.User, bytearray] = field(default_factory=dict)  # each text with END
    size: int = 0  # bytes of that
    logins: dict[str, chat.User] = field(default_factory=dict)  # by a random ID
    # Who want to know whether all that they said was heard
    asking: dict[str, chat.User] = field(default_factory=dict)
    taken: asyncio.Event = field(default_factory=asyncio.Event)  # it gathers no more
    # It is read and obeyed, or this process starts over
    done: asyncio.Event = field(default_factory=asyncio.Event)


class ClusterRoom(chat.Room):
    """The room of all processes; its `users` are those of this one."""

    def __init__(self, url: str, name: str, keep: float, alive: float) -> None:
        super().__init__()
        self.redis = connect(url)
        self.name, self.keep, self.alive = name, keep, alive
        self.wake = asyncio.Event()  # set when there is something to append
        self.ready = asyncio.Event()  # set while it knows the room, and is in it
        self.draft = self.under_way = Draft()
        self.be_born()

    # 1. What happens at the sockets of this process goes into its next entry

    def append(self, *word: Any) -> asyncio.Event:
        """Have the next entry say `word`; return the event that it is done."""
        self.draft.words.append(word)
        self.wake.set()
        return self.draft.done

    async def say(self, user: chat.User, text: bytes) -> None:
        """Have everyone hear it; while Redis is slow, wait, so that memory is bounded."""
        while self.draft.size > chat.FULL_BATCH:
            await self.draft.taken.wait()
        if self.users.get(user.name) is user:
            line = user.name.encode() + b": " + text + END
            self.draft.said.setdefault(user, bytearray()).extend(line)
            self.draft.size += len(line)
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
            done = await happens(self.append("reset", reason), 2)
            if not done or not self.ready.is_set():
                raise web.HTTPServiceUnavailable(text="The reset waits for Redis")
            return
        how = "was let go: " + reason
        await happens(self.append("gone", self.stream.author, how), 2)
        self.ready.clear()  # nobody enters any more
        users = [user for user in self.users.values() if user.prepared]
        self.let_go(self.users.values(), code, reason)
        await asyncio.gather(*(user.closing for user in users))

    def let_go(self, users: Iterable[chat.User], code: int, reason: str) -> None:
        """Close the connections of `users`, of whom nothing more is heard from now on."""
        self.flush()
        for user in list(users):
            del self.users[user.name]
            self.draft.said.pop(user, None)  # its page says that again, perhaps here
            if user.prepared:
                closing = user.close(code=code, message=reason.encode())
                user.closing = asyncio.create_task(closing)

    async def write(self) -> None:
        """Append one entry after another, each of all that happened during the one before.

        So batches grow with the load, and Redis gets one command a round trip at most.
        """
        while True:
            await self.wake.wait()
            await self.stream.all_read.wait()  # first see what the stream tells
            self.wake.clear()
            self.under_way = draft = self.draft
            self.draft = Draft()
            draft.taken.set()
            for login, user in draft.logins.items():
                if not user.transport.is_closing():
                    word = "enter", user.name, login, hashed(user.key), user.turn
                    draft.words.append(word)
            draft.words += self.state()
            last = self.last if self.knows else None
            await self.stream.append(draft.words, b"".join(draft.said.values()), last)
            draft.done.set()
            for user in draft.asking.values():
                super().answer(user)

    async def give_signs(self) -> None:
        """Say from time to time that this process is alive; while Redis is away, once."""
        while True:
            await asyncio.sleep(self.alive)
            if ("alive",) not in self.draft.words:
                self.append("alive")

    # 2. What is read, all processes do

    async def read(self) -> None:
        """Do what one entry after another says; if that cannot be, start over."""
        while True:
            try:
                entry = await self.stream.next()
                await (self.obey if self.knows else self.learn)(entry)
                self.stream.obeyed(entry)
                if self.knows and self.stream.author in self.stream.authors:
                    self.ready.set()
            except StartOver as error:
                if self.stream.all_read.is_set():
                    self.start_over(error)
                else:  # a hole from before it started: it learns the room behind that
                    self.forget()

    async def obey(self, entry: Entry) -> None:
        """Do what `entry` says, its messages first; raise StartOver if that cannot be."""
        authors = self.stream.authors
        if not await self.stream.is_next(entry):
            # It was gone, or its first entry is lost: it has to know.
            if self.knows and entry.author not in authors:
                self.append("gone", entry.author, "is not known")
            return
        ours = order(entry.seen) >= order(self.founded)  # the room was founded by then
        if ours and entry.seen == entry.before and entry.last not in (None, self.last):
            raise Lost("Others have other messages")
        for text in entry.said:
            owner = self.everyone.get(text.partition(b":")[0].decode(errors="replace"))
            if owner and owner.process == entry.author:  # else it has lost the name
                self.add(chat.frame(WSMsgType.TEXT, text))
        for word in entry.words:
            match word:
                case ["enter", str(name), str(login), str(key), int(turn)]:
                    if entry.author in authors:  # it may have gone in the same entry
                        self.give(name, Owner(login, entry.author, key, turn))
                case ["left", str(name), str(login), str(how)]:
                    if (owner := self.everyone.get(name)) and owner.login == login:
                        self.remove([name], how)
                case ["alive"] if entry.author == self.stream.author:
                    for process in self.stream.silent_ones():
                        self.append("gone", process, "is gone")
                case ["gone", str(process), str(how)]:
                    if process == self.stream.author != entry.author:
                        raise StartOver("This process was taken for dead")
                    authors.pop(process, None)
                    owners = self.everyone.items()
                    gone = [name for name, it in owners if it.process == process]
                    self.remove(gone, how)
                case ["reset", str(reason)]:
                    self.remove([*self.everyone], "was let go: " + reason)
                    self.let_go(self.users.values(), 1000, reason)
                case ["founds", *_] if ours:
                    raise StartOver("Others have founded a room")
                case ["lost", self.founded]:
                    raise Missed("The stream has lost a part")
        if entry.last is None:  # its author knows no room: the eldest tells
            self.tell_at = 0.0
            self.wake.set()

    def remove(self, names: list[str], how: str) -> None:
        """Take `names` off the list."""
        for name in names:
            del self.everyone[name]
            self.changed(name, how)

    async def flush_soon(self) -> None:
        """Flush when the entry under way is read back, since that brings more; or at once."""
        await happens(self.stream.read_back, chat.MAX_WAIT)
        self.flushing = None
        self.flush()

    def changed(self, name: str, how: str) -> None:
        """Log who came or went, and tell everyone here; not what is long past."""
        if self.ready.is_set():
            super().changed(name, how)

    # 3. A name is one login's, which loses it to the next one of the same user
    #
    # All processes read at the same place of the stream who enters with the key. What the
    # process of the old connection appends behind that place under this name, nobody hears:
    # so the page does not hear it back, and says it again.

    async def enter(self, user: chat.User) -> None:
        """Log `user` in, or raise HTTPConflict; without Redis, HTTPServiceUnavailable."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not user.transport.is_closing():
                    await self.ready.wait()
                    login, draft = secrets.token_hex(8), self.draft
                    if len(draft.logins) >= MAX_WAITING:
                        break
                    draft.logins[login] = user
                    self.wake.set()
                    try:
                        await draft.done.wait()
                    finally:
                        del draft.logins[login]
                    if self.users.get(user.name) is user:
                        return
                    # Free now: its owner was leaving, or this process has started over.
                    if user.name in self.users or not self.is_free_for(user):
                        text = f"User {user.name} already logged in"
                        raise web.HTTPConflict(text=text)
        if self.users.get(user.name) is not user:
            raise web.HTTPServiceUnavailable(text="The room cannot be reached just now")

    def is_free_for(self, user: chat.User) -> bool:
        """Tell whether the name is nobody's, in no process, or the same user's."""
        owner = self.everyone.get(user.name)
        if owner is None or owner.yields_to(hashed(user.key), user.turn):
            return True
        # Its owner has left this process, which has yet to say so: a login is said after.
        return owner.process == self.stream.author and user.name not in self.users

    def give(self, name: str, new: Owner) -> None:
        """Give `name` to `new` if it is free, or the same user's."""
        owner, is_here = self.everyone.get(name), new.process == self.stream.author
        if owner and not owner.yields_to(new.key, new.turn):
            return
        self.everyone[name] = new
        if name in self.users:
            self.let_go([self.users[name]], 1000, "logged in again elsewhere")
        if is_here and (user := self.under_way.logins.get(new.login)):
            self.users[name] = user
            if owner:  # or each takeover would bring a new BURST
                user.credit = -chat.MAX_MESSAGE
        elif is_here:
            self.append("left", name, new.login, "did not wait")
        self.changed(name, "came back" if owner else "logged in")

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
        self.silence = 0  # own signs of life since one who knows the room was read
        self.tell_at = 0.0  # when the eldest is to say again what the room is
        self.ready.clear()
        self.draft.taken.set()
        self.draft.done.set()
        self.draft = Draft([*words])
        self.forget()
        self.wake.set()  # to ask what the room is, or to be in it

    def forget(self) -> None:
        """Know no room."""
        self.knows = False
        # Read meanwhile: who tells the room had not yet read the last of these
        self.passed = deque[Entry](maxlen=1000)
        self.have({}, {}, self.last, "")

    def have(self, authors: Any, everyone: Any, last: int, founded: str) -> None:
        """Have this room, with none of the messages before."""
        self.founded = founded  # the position of the entry that founded it
        self.stream.authors = authors
        self.everyone: dict[str, Owner] = {n: Owner(*it) for n, it in everyone.items()}
        self.messages.clear()
        self.size, self.last, self.forgotten = 0, last, last
        self.flush()

    def state(self) -> list[Any]:
        """Return the word that says what the room is, if it is on this process to say it."""
        authors = self.stream.authors
        eldest = self.knows and next(iter(authors), "") == self.stream.author
        if eldest and (now := time.monotonic()) >= self.tell_at:
            self.tell_at = now + self.keep / 8
            return [("room", authors, self.everyone, self.last, self.founded)]
        if not self.knows and self.silence >= 2:
            # The clock gives the first number, as in chat.py; none comes again.
            last = max(time.time_ns() // 1000, self.last + 2**20)
            return [("founds", authors, {}, last, "")]
        return []

    async def learn(self, entry: Entry) -> None:
        """If `entry` says what the room was at its `seen`, do what was read after that."""
        self.passed.append(entry)
        self.stream.authors[entry.author] = entry.number, entry.position
        if entry.last is not None:
            self.silence = 0  # there is somebody who is going to answer
            self.last = max(self.last, entry.last)  # the clock may have been set back
        for word in entry.words:
            match word:
                case ["alive"] if entry.author == self.stream.author:
                    self.silence += 1
                    self.wake.set()
                case ["room" | "founds", authors, everyone, int(last), str(founded)]:
                    at, passed = order(entry.seen), self.passed
                    behind = [each for each in passed if order(each.position) > at]
                    if len(behind) < len(passed):  # nothing is missing since
                        me = self.stream.author
                        was_read = me in self.stream.authors
                        self.have(authors, everyone, last, founded or entry.position)
                        for each in behind:
                            await self.obey(each)
                        if was_read and me not in self.stream.authors:
                            raise StartOver("This process was taken for dead")
                        self.knows = True
                        passed.clear()

    def start_over(self, error: StartOver) -> None:
        """Let all users go, who come back, and be another process."""
        chat.log.warning("%s: the users of this process have to come back", error)
        if isinstance(error, Missed):
            for user in self.users.values():
                counts = user.place and user.after is not None
                if counts and not user.transport.is_closing():
                    # Its count may be wrong: it is to see a hole.
                    user.place = self.last + 2**40
                    user.transport.write(user.here())
        self.let_go(self.users.values(), 1012, str(error))
        old = self.stream
        # What is lost to all has all start over, with other numbers.
        lost = [("lost", self.founded)] if isinstance(error, Lost) else []
        self.be_born(("gone", old.author, "has to come back"), *lost)
        old.read_back.set()  # so that write() waits no more for what the old one appended

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Be in the room while the application serves, or end it if that cannot be.

        If a task of a TaskGroup fails, whoever waits in the group is cancelled: here it is
        the server. A chat that is deaf must not look like one that is quiet.
        """
        try:
            async with self.redis, asyncio.TaskGroup() as group:
                await self.stream.check()
                jobs = self.read(), self.write(), self.give_signs()
                tasks = [group.create_task(job) for job in jobs]
                await self.ready.wait()
                yield
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


# 5. Serving


def make_app(
    url: str, name: str, keep: float = 60, alive: float = 1
) -> web.Application:
    """Return the chat as an application of one room with all others at that stream."""
    room = ClusterRoom(url, name, keep, alive)
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
