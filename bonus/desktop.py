# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.4,<4"]
# ///
"""The chat in a window of its own: the article's bonus program, for every desktop.

`python bonus/desktop.py` talks to chat.py as the page does: the WebSocket /ws?user=NAME
is the room, and /?getUsers2=1 lists who is in it. A user outlives the connection: one that
is dead is given up, and what it lost, either way, is made up for.
"""

import argparse
import asyncio
import itertools
import os
import random
import re
import secrets
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from threading import Thread
from typing import Any

import aiohttp

try:
    import tkinter as tk
    from tkinter import font, ttk
except ImportError:
    sys.exit("desktop.py: this Python has no Tk; install python3-tk or python-tk")

MAX_MESSAGE = 2**14  # bytes in a message, the server's limit
KEPT = 1000  # messages; older ones go
LAST = 50  # messages to begin with
TICK = 30  # milliseconds between two looks at the news
PORTION = 50_000  # characters drawn in a tick; each message counts 100 on top
LONG_LINE = re.compile(".{5000}")  # Tk's time to wrap a line grows with its square
SILENCE = 20  # seconds without a word, after which to ask whether there is a connection
PATIENCE = 8  # seconds for an answer: 8 do on a line of 16 kbit/s, 5 do not
CLOSE = 1  # seconds for the answer to a close
FIRST_PAUSE, LAST_PAUSE = 1, 10  # seconds before coming back, doubled each time
HERE = re.compile(r"\{\{Here (\d+)}}")
FOR_GOOD = (1000, 1002, 1007, 1009)  # close codes after which not to come back
COLORS = ("navy", "red4", "darkgreen", "purple3", "sienna4", "teal", "maroon4", "black")
WHY = {  # there is no connection, in plain words
    aiohttp.ClientConnectorCertificateError: "The server's certificate is not trusted",
    aiohttp.ClientConnectorDNSError: "There is no such server",
    aiohttp.ClientConnectorError: "No server answers there",
    aiohttp.InvalidUrlClientError: "A server is written as host:port",
    TimeoutError: "The server does not answer",
}


class Refused(aiohttp.ClientError):
    """The chat itself, and nothing between, does not let one in."""


class Stay:
    """One stay in the room, from Login to Log off, in the network's thread.

    Tk and asyncio both want to run the thread they are in, so each has its own, and there
    is one way between the two: the window gives asyncio's loop these methods to run, and
    they put methods of the window into `news`, which it runs when it has time. Neither
    waits for the other, and nobody reads the news of a stay that is over. Only `unheard`
    is touched by both: the window appends to it, which no thread can see half done.
    """

    http: aiohttp.ClientSession
    socket: aiohttp.ClientWebSocketResponse | None = None
    limit: asyncio.Timeout  # when it passes, the connection is given up

    def __init__(self, window: "Window", url: str, user: str) -> None:
        self.window = window
        self.url = url
        self.user = user.strip()  # as it stands before one's own words
        self.number = window.number  # of the last message heard
        self.unheard: list[str] = []  # said at the window, and not heard back
        self.sent = 0  # of the unheard texts, those that this connection has taken
        self.online = False  # connected, and all that was missed has come
        self.pause = 0  # seconds; while there is none, there is no coming back
        self.news: deque[tuple[Any, ...]] = deque()  # method, arguments
        self.users_changed = asyncio.Event()
        self.is_over = False  # logged off
        self.running = asyncio.run_coroutine_threadsafe(self.run(), window.loop)

    async def run(self) -> None:
        """Be in the room, and come back to it, until refused or let go for good."""
        while not self.is_over:
            for_good, reason = await self.connect()
            if for_good or not self.pause:
                return self.news.append((self.window.leave, reason))
            wait = self.pause * random.uniform(0.5, 1)
            reason += f"; trying again in {wait:.0f} s"
            self.news.append((self.window.show, False, reason))
            await asyncio.sleep(wait)
            self.pause = min(2 * self.pause, LAST_PAUSE)

    async def connect(self) -> tuple[bool, str]:
        """Be in the room over one connection; return whether it is for good, and why."""
        patience = aiohttp.ClientTimeout(PATIENCE)
        try:
            # Each has a session, whose end is that of all its connections, dead ones too. It
            # is also what tells that all is over: aiohttp (3.14) loses a cancellation that
            # comes together with a time limit of its own.
            async with aiohttp.ClientSession(timeout=patience) as self.http:
                self.socket = await self.enter()
                self.pause = FIRST_PAUSE
                async with asyncio.timeout(PATIENCE) as self.limit:
                    return await self.listen(self.socket)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return isinstance(error, Refused), WHY.get(type(error), str(error))

    async def enter(self) -> aiohttp.ClientWebSocketResponse:
        """Open the socket; raise a ClientError with the server's words if refused.

        Who has the key is this user, and takes the name over from a connection that the
        server still believes in. A login that was given up may arrive late, but then its
        turn is over.
        """
        key = f"{self.window.key}.{next(self.window.turns)}"
        query = {"user": self.user, "key": key, "after": str(self.number)}
        try:
            return await self.http.ws_connect(f"{self.url}/ws", params=query)
        except aiohttp.WSServerHandshakeError as refusal:
            async with self.http.get(f"{self.url}/ws", params=query) as answer:
                plain = answer.content_type == "text/plain"
                words = await answer.text() if plain else answer.reason
                # All else is a proxy's, while the server starts anew.
                if plain and answer.status in (400, 403, 409):
                    raise Refused(words) from refusal
                raise aiohttp.ClientError(words) from refusal

    async def listen(self, socket: aiohttp.ClientWebSocketResponse) -> tuple[bool, str]:
        """Bring what is said; return whether the socket is gone for good, and why."""
        users = asyncio.create_task(self.list_users())
        welcomed = False  # the first Here is no answer
        try:
            await self.ask(socket)  # is answered after all that was missed
            while True:
                try:
                    message = await socket.receive(SILENCE)
                except TimeoutError:
                    await self.ask(socket)
                    continue
                if message.type is aiohttp.WSMsgType.CLOSE:
                    why = f"Closed by the server: {message.extra or message.data}"
                    return message.data in FOR_GOOD, why
                if message.type is aiohttp.WSMsgType.BINARY:
                    continue
                if message.type is aiohttp.WSMsgType.CLOSING:
                    await asyncio.Event().wait()  # until close() has logged off
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return False, "The connection was lost"
                if message.data == "{{RefreshUsers}}":
                    self.users_changed.set()
                elif here := HERE.fullmatch(message.data):
                    if int(here[1]) != self.number:
                        self.skip(int(here[1]))
                    elif welcomed and not self.online:
                        await self.catch_up()
                    welcomed = True
                else:
                    self.hear(message.data)
                if not (self.online and self.unheard):
                    self.limit.reschedule(None)
        finally:
            self.online = False
            users.cancel()

    def expect(self) -> None:
        """Give the connection up if what is expected has not come in time."""
        self.limit.reschedule(self.window.loop.time() + PATIENCE)

    async def ask(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Ask with a binary frame; {{Here N}} comes back, after all that was said."""
        self.expect()
        await socket.send_bytes(b"")

    def hear(self, message: str) -> None:
        """Bring a message, with its time unless it was missed: then nobody knows it."""
        self.number += 1
        if self.unheard and message == f"{self.user}: {self.unheard[0]}":
            self.unheard.pop(0)
            self.sent = max(0, self.sent - 1)
            if self.online and self.unheard:
                self.expect()  # others' words do not count: they come by another way
        when = time.strftime("%H:%M") if self.online else ""
        self.news.append((self.window.hear, self.number, when, message))

    def skip(self, number: int) -> None:
        """Go on from a number that is not the next: what is between is no longer kept."""
        texts = []  # which may have been said there
        while self.unheard:
            texts.append(self.unheard.pop(0))
        self.sent = 0
        if self.number >= 0:  # it is not the first login
            self.news.append((self.window.miss, number, texts))
        self.number = number

    async def catch_up(self) -> None:
        """Be online: what is still unheard now was not said, and is said again."""
        self.online, self.sent = True, 0
        self.news.append((self.window.show, True))
        self.users_changed.set()  # of who comes back, the server tells nobody
        await self.talk()

    async def talk(self) -> None:
        """Say what this connection has not taken yet."""
        with suppress(ConnectionError):  # then it is said by the next one
            while self.online and self.socket and self.sent < len(self.unheard):
                text = self.unheard[self.sent]
                self.sent += 1
                if self.sent == 1:
                    self.expect()
                await self.socket.send_str(text)

    async def list_users(self) -> None:
        """Bring the users after each notice, by one request at a time."""
        http = self.http  # which may end before the task, see connect()
        while await self.users_changed.wait() and not http.closed:
            self.users_changed.clear()
            try:
                async with http.get(f"{self.url}/?getUsers2=1") as answer:
                    answer.raise_for_status()
                    users = (await answer.text()).splitlines()
                self.news.append((self.window.show_users, users))
            except (aiohttp.ClientError, OSError, ValueError):  # or it is no UTF-8
                await asyncio.sleep(FIRST_PAUSE)
                self.users_changed.set()

    async def close(self) -> None:
        """Close as is proper, but do not wait long for the server's answer."""
        if self.socket:
            closing = asyncio.create_task(self.socket.close())
            await asyncio.wait([closing], timeout=CLOSE)
        self.is_over = True
        self.running.cancel()


class Window(tk.Tk):
    """The window, in the thread that makes it; raises tk.TclError without a display."""

    def __init__(self, server: str, user: str, tls: bool) -> None:
        super().__init__()
        self.stay: Stay | None = None
        self.key = secrets.token_hex()  # who comes back with it is the same user
        self.turns = itertools.count()  # of the logins with it
        self.url = ""  # of the latest login
        self.number = -LAST  # of the last message in the log, or so many to begin with
        self.heard: deque[tuple[str, str]] = deque(maxlen=KEPT)  # and not drawn yet
        self.misses = False  # messages after the last that was heard
        self.server = tk.StringVar(value=server)
        self.user = tk.StringVar(value=user)
        self.tls = tk.BooleanVar(value=tls)
        self.users = tk.Variable()
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()
        self.lay_out()
        self.leave("")
        self.attend()

    def lay_out(self) -> None:
        self.title("Chat")
        self.geometry("900x560")
        self.minsize(740, 320)
        if ttk.Style().theme_use() == "default":
            ttk.Style().theme_use("clam")  # X11 has no native look, and a grim default
        room = ttk.Frame(self, padding=10)
        room.pack(fill="both", expand=True)

        bar = ttk.Frame(room)
        bar.pack(fill="x")
        for text, variable in ("Server", self.server), ("User", self.user):
            ttk.Label(bar, text=text)
            entry = ttk.Entry(bar, textvariable=variable)
        entry.focus()
        ttk.Checkbutton(bar, text="TLS", variable=self.tls)
        login = ttk.Button(bar, text="Login", command=self.log_in)
        self.to_log_in = list(bar.children.values())
        self.logoff = ttk.Button(bar, text="Log off", command=self.log_off)
        for widget in bar.children.values():
            widget.pack(side="left", padx=(0, 8))
        self.light = ttk.Label(room, wraplength=700)
        self.light.pack(fill="x", pady=8)

        foot = ttk.Frame(room)
        foot.pack(side="bottom", fill="x", pady=(10, 0))
        self.sender = ttk.Button(foot, text="Send", command=self.say)
        self.sender.pack(side="right", fill="y", padx=(10, 0))
        look = {"font": "TkTextFont", "wrap": "word", "padx": 8, "pady": 6}
        self.draft = tk.Text(foot, look, height=3)
        self.draft.pack(fill="x")

        self.side = ttk.LabelFrame(room, relief="flat")
        self.side.pack(side="right", fill="y", padx=(10, 0))
        self.refresher = ttk.Button(self.side, text="Refresh", command=self.refresh)
        self.refresher.pack(side="bottom", fill="x", pady=(6, 0))
        users = tk.Listbox(self.side, listvariable=self.users, width=24)
        self.messages = tk.Text(room, look, state="disabled", bg="white", fg="black")
        for view in users, self.messages:
            self.scrollbar = ttk.Scrollbar(view.master, command=view.yview)
            view.configure(yscrollcommand=self.scrollbar.set)
            self.scrollbar.pack(side="right", fill="y")
            view.pack(fill="both", expand=True)

        self.bold = font.nametofont("TkTextFont").copy()
        self.bold.configure(weight="bold")
        self.messages.tag_configure("time", foreground="#5f6368", spacing1=3)
        self.messages.configure(tabs="15m")
        self.messages.tag_configure("text", lmargin1="18m", lmargin2="18m")
        for color in COLORS:
            self.messages.tag_configure(color, foreground=color, font=self.bold)

        self.bind_class("TEntry", "<Return>", f"{login} invoke")
        self.draft.bind("<Return>", f"{self.sender} invoke; break")
        self.draft.bind("<Shift-Return>", "# Tk breaks the line")
        self.draft.bind("<<Modified>>", self.on_edit)
        self.messages.bind("<Configure>", self.on_resize)
        self.messages.bind("<Button-1>", "focus %W")  # so that it can be copied from

    def attend(self) -> None:
        """Take the news, draw a portion of what was heard, and come back in a tick."""
        if self.stay:
            news = self.stay.news
            for _ in range(len(news)):
                method, *args = news.popleft()
                method(*args)
        if self.heard:
            self.draw()
        self.after(TICK, self.attend)

    def show(self, online: bool, notice: str = "") -> None:
        """Show whether there is a connection, why, and what can be done now."""
        state, color = ("Online", "#0d652d") if online else ("Offline", "#b3261e")
        self.light.configure(text=f"● {state}  {notice}", foreground=color)
        for widget in self.to_log_in:
            widget["state"] = "disabled" if self.stay else "normal"
        self.logoff["state"] = "normal" if self.stay else "disabled"
        for button in self.sender, self.refresher:
            button["state"] = "normal" if online else "disabled"
        if online:
            self.draft.focus()
        else:
            self.show_users([])

    def hear(self, number: int, when: str, message: str) -> None:
        self.number = number
        self.heard.append((when, message))
        self.misses = False

    def miss(self, number: int, texts: list[str]) -> None:
        """Tell once that messages are missing, and give back what may have been said there."""
        if not self.misses:
            self.hear(number, "", "Some messages are missing here")
        self.number, self.misses = number, True
        self.give_back(texts)

    def give_back(self, texts: list[str]) -> None:
        """Put what was said and not heard back before what is in the draft."""
        if texts and self.draft.get("1.0", "end-1c"):
            texts = [*texts, ""]
        self.draft.insert("1.0", "\n".join(texts))

    def show_users(self, users: list[str]) -> None:
        self.users.set(users)
        self.side["text"] = f"Users ({len(users)})"

    def draw(self) -> None:
        """Add a portion of what was heard; stay at the end unless somebody reads back."""
        at_end = self.messages.yview()[1] == 1.0
        pieces: list[str] = []
        size = 0
        while self.heard and size < PORTION:
            when, message = self.heard.popleft()
            message = LONG_LINE.sub(r"\g<0>\n", message.replace("\0", "\ufffd"))
            author, colon, text = message.partition(": ")
            color = COLORS[sum(author.encode()) % len(COLORS)] if colon else "time"
            pieces += "\n", "", f"{when}\t", "time", author + colon, color, text, "text"
            size += len(text) + 100
        self.messages["state"] = "normal"
        self.messages.insert("end", *pieces)
        starts = self.messages.tag_ranges("time")[::2]
        self.messages.delete("1.0", starts[-KEPT:][0])
        self.messages["state"] = "disabled"
        if at_end:
            self.messages.see("end")

    def on_resize(self, _: object) -> None:
        if float(self.scrollbar.get()[1]) == 1.0:  # as it was before
            self.messages.see("end")

    def on_edit(self, _: object) -> None:
        self.draft.edit_modified(False)
        is_long = LONG_LINE.search(self.draft.get("1.0", "end"))
        self.draft["wrap"] = "none" if is_long else "word"

    def log_in(self) -> None:
        """Log in at a server, written as host:port or as the address of its page."""
        scheme, _, host = self.server.get().strip().rpartition("://")
        if scheme:
            self.tls.set(scheme.lower() in ("https", "wss"))
        url = f"http{'s' * self.tls.get()}://{host.rstrip('/')}"
        if url != self.url:
            self.url, self.number = url, -LAST
        self.stay = Stay(self, url, self.user.get())
        self.show(False, "Connecting ...")

    def log_off(self) -> None:
        if self.stay:
            asyncio.run_coroutine_threadsafe(self.stay.close(), self.loop)
            self.leave("")

    def leave(self, reason: str) -> None:
        if self.stay:
            self.give_back(self.stay.unheard)
        self.stay = None
        self.show(False, reason)

    def refresh(self) -> None:
        if self.stay:
            self.loop.call_soon_threadsafe(self.stay.users_changed.set)

    def say(self) -> None:
        """Say what is in the draft, unless that is nothing or too much."""
        draft = self.draft.get("1.0", "end-1c").encode(errors="replace")
        if len(draft) > MAX_MESSAGE:
            excess = f"{len(draft):,} bytes are too many, {MAX_MESSAGE:,} can be sent"
            self.show(True, excess)
        elif self.stay and draft.strip():
            self.stay.unheard.append(draft.decode())
            asyncio.run_coroutine_threadsafe(self.stay.talk(), self.loop)
            self.draft.delete("1.0", "end")


def main() -> None:
    """Show the window until it is closed; where that cannot be, say why and exit."""
    parser = argparse.ArgumentParser(description="The smallest real chat, in a window")
    parser.add_argument("--server", default="localhost:8080", help="%(default)s")
    parser.add_argument("--user", default="", help="the name to log in with")
    parser.add_argument("--tls", action="store_true", help="whether the server has TLS")
    try:
        window = Window(**vars(parser.parse_args()))
    except tk.TclError as error:
        sys.exit(f"desktop.py: {error}; install a desktop, or xvfb for xvfb-run")
    signal.signal(signal.SIGINT, lambda *_: window.quit())
    window.mainloop()
    if window.stay:
        asyncio.run_coroutine_threadsafe(window.stay.close(), window.loop).result()
    os._exit(0)  # Python would wait for the thread that may be looking up a name


if __name__ == "__main__":
    main()
