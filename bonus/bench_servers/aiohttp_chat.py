"""aiohttp: `send_str` to each user in turn, as in aiohttp's own example.

Run by bench.py: python aiohttp_chat.py PORT
"""

import sys

from aiohttp import WSMsgType, web

SOCKETS = web.AppKey("sockets", set[web.WebSocketResponse])


async def talk(request: web.Request) -> web.WebSocketResponse:
    sockets = request.app[SOCKETS]
    name = request.query["user"]
    socket = web.WebSocketResponse(compress=False)
    await socket.prepare(request)
    sockets.add(socket)
    try:
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                for listener in list(sockets):
                    await listener.send_str(f"{name}: {message.data}")
    finally:
        sockets.remove(socket)
    return socket


app = web.Application()
app[SOCKETS] = set()
app.router.add_get("/ws", talk)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None)
