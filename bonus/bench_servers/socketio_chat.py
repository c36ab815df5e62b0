"""python-socketio on aiohttp: `emit` to everyone, as in its documentation.

Run by bench.py: python socketio_chat.py PORT
"""

import sys
from typing import Any

import socketio  # type: ignore[import-untyped]
from aiohttp import web

names: dict[str, str] = {}  # by session
server = socketio.AsyncServer(async_mode="aiohttp")


async def connect(session: str, environ: dict[str, Any]) -> None:
    names[session] = environ["aiohttp.request"].query["user"]


async def message(session: str, text: str) -> None:
    await server.emit("message", f"{names[session]}: {text}")


async def disconnect(session: str, reason: str) -> None:
    del names[session]


server.on("connect", connect)
server.on("message", message)
server.on("disconnect", disconnect)
app = web.Application()
server.attach(app)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None)
