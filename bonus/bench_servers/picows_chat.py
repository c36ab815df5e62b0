"""picows: `send` to each user, as in its broadcast example.

Run by bench.py: python picows_chat.py PORT
"""

import sys
from urllib.parse import parse_qs, urlsplit

import uvloop
from picows import (
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    ws_create_server,
)

transports: set[WSTransport] = set()


class Talk(WSListener):
    def __init__(self, request: WSUpgradeRequest) -> None:
        self.prefix = parse_qs(urlsplit(request.path).query)[b"user"][0] + b": "

    def on_ws_connected(self, transport: WSTransport) -> None:
        transports.add(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            message = self.prefix + frame.get_payload_as_bytes()
            for listener in transports:
                listener.send(WSMsgType.TEXT, message)
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        transports.discard(transport)


async def main() -> None:
    server = await ws_create_server(Talk, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


uvloop.run(main())
