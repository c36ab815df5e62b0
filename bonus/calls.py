"""Calls for the chat: the members of one meet over /call/ID/ws.

The server introduces the members to one another; sound and picture go from page to page.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from contextlib import suppress
from weakref import WeakValueDictionary

from aiohttp import WSMsgType, web

import chat

MAX_MEMBERS = 6  # of a call, in which everyone sends to everyone
MAX_BEHIND = 2**20  # bytes not written to a member; above, the member is let go
STAY = 0.5  # seconds until all are told who came, and has not left again
LIFETIME = 3600  # seconds for which the credentials of a relay are good

Servers = list[tuple[str, str]]  # URLs, and their secrets


def ice_server(text: str) -> tuple[str, str]:
    """Return the URL and the secret in `stun:HOST` or `turn:HOST?secret=SECRET`."""
    url, secret = [*re.split(r"[?&]secret=", text, maxsplit=1), ""][:2]
    if not re.fullmatch(r"turns?:\S+" if secret else r"stuns?:\S+", url):
        text = "expected stun:HOST or turn:HOST?secret=SECRET"
        raise argparse.ArgumentTypeError(text)
    return url, secret


def signed(token: str, servers: Servers) -> str:
    """Return the ID of a call that was begun in the room: its members may use relays."""
    key = "".join(secret for _, secret in servers).encode()
    return token + hmac.digest(key, token.encode(), "sha256")[:8].hex()


def ice_for(call: str, member: str, servers: Servers) -> list[dict[str, str]]:
    """Return the RTCIceServers for a member of a call; no relay if nobody began it.

    The credentials are as coturn's use-auth-secret wants them, and its quotas are a user's.
    """
    user, ice = f"{int(time.time()) + LIFETIME}:{member}", []
    is_begun = hmac.compare_digest(signed(call[:-16], servers).encode(), call.encode())
    for url, secret in servers:
        if not secret:
            ice.append({"urls": url})
        elif is_begun:
            password = hmac.digest(secret.encode(), user.encode(), "sha1")
            credential = base64.b64encode(password).decode()
            ice.append({"urls": url, "username": user, "credential": credential})
    return ice


class Call:
    """Who is in a call."""

    def __init__(self, id: str, servers: Servers) -> None:
        self.id, self.servers = id, servers
        self.members: dict[str, chat.User] = {}  # by ID
        self.names: dict[str, str] = {}  # of those who were introduced, by ID
        self.changing = False  # introduce() is on its way
        # What those who left could still say for free, and when: see chat.User.pay().
        self.credits: list[tuple[float, float]] = []

    def changed(self) -> None:
        """Introduce the members soon, once for all changes until then.

        A page makes a connection to each: who comes and goes all the time costs it few.
        """
        if not self.changing:
            self.changing = True
            asyncio.get_running_loop().call_later(STAY, self.introduce)

    def introduce(self) -> None:
        """Tell the members who is here."""
        self.changing = False
        self.names = {id: member.name for id, member in self.members.items()}
        for id in self.members:
            self.answer(id)

    def answer(self, id: str) -> None:
        """Tell a member what all were told, with credentials that are new."""
        if id in self.names:
            ice = ice_for(self.id, id, self.servers)
            self.tell(id, {"id": id, "members": self.names, "ice": ice})

    def pass_on(self, sender: str, payload: bytes) -> None:
        """Pass [TO, KIND, CONTENT] on to that member as [FROM, KIND, CONTENT]."""
        with suppress(ValueError, TypeError, RecursionError):  # of nonsense
            to, kind, content = json.loads(payload)
            known = {sender, to} <= self.names.keys()
            if known and kind in ("description", "candidate"):
                self.tell(to, [sender, kind, content])

    def tell(self, id: str, said: object) -> None:
        """Send `said`, as JSON, and wait for nobody; or raise ValueError: NaN is none."""
        # With escapes for what is not ASCII, it might be longer than 64 KiB.
        text = json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
        member = self.members[id]
        if member.transport.get_write_buffer_size() > MAX_BEHIND:
            chat.cut_off(member.transport)
        elif not (member.closed or member.transport.is_closing()):
            member.transport.write(chat.frame(WSMsgType.TEXT, text))


Calls = WeakValueDictionary[str, Call]  # by ID; what holds a call are its members
CALLS = web.AppKey("calls", Calls)
ICE = web.AppKey("ice", Servers)
ROUTES = web.RouteTableDef()


@ROUTES.post("/calls")
async def begin(request: web.Request) -> web.Response:
    """Answer a user who is here, which the user's key proves, with the path of a call."""
    user, key = (request.query.get(key, "").strip() for key in ("user", "key"))
    if chat.is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not call")
    if not request.app[chat.ROOM].is_key_of(user, key):
        raise web.HTTPForbidden(text="Log in first: calls are for who is in the room")
    id = signed(secrets.token_urlsafe(16), request.app[ICE])
    return web.Response(status=201, text=f"/call/{id}")


@ROUTES.get("/call/{id}/ws", allow_head=False)
async def signalling(request: web.Request) -> web.WebSocketResponse:
    """Let a member into a call, and pass on what the pages say to one another.

    Only who has the same key comes back as the same member: the ID is what it hashes to.
    A binary frame asks for an answer, which shows that the connection is alive.
    """
    calls, transport = request.app[CALLS], request.transport
    call_id, servers = request.match_info["id"], request.app[ICE]
    user, key = (request.query.get(key, "") for key in ("user", "key"))
    name = "".join(filter(str.isprintable, user)).strip()[:32] or "Nobody"
    id = hashlib.sha256(key.encode()).hexdigest()[:16]
    if transport is None or chat.is_cross_origin(request):
        raise web.HTTPForbidden(text="The pages of other sites may not join")
    transport.set_write_buffer_limits(MAX_BEHIND)  # or close() may wait, see chat.py
    member = chat.User(name, transport)
    with suppress(ValueError):  # aiohttp's, of a header that is not ASCII
        await member.prepare(request)
    if not member.prepared:
        raise web.HTTPBadRequest
    call = calls.setdefault(call_id, Call(call_id, servers))
    if before := call.members.get(id):  # over a connection that is lost
        member.replace(before)
    elif len(call.members) == MAX_MEMBERS:
        await member.close(code=4000, message=b"the call is full, it has 6 members")
        return member
    elif call.credits:  # else one could flood a call by coming and leaving as another
        member.credit, member.paid_at = call.credits.pop()
    call.members[id] = member
    try:
        call.changed()
        async for kind, payload in member.read():
            if kind is WSMsgType.TEXT:
                call.pass_on(id, payload)
            else:
                call.answer(id)
    finally:
        if call.members.get(id) is member:
            del call.members[id]
            call.names.pop(id, None)  # an answer tells of nobody who has left
            call.credits.append((member.credit, member.paid_at))
            call.changed()
        asyncio.get_running_loop().call_later(2, chat.cut_off, member.transport)
    return member
