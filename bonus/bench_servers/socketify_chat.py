"""socketify (uWebSockets, in C++): `publish` to a topic, as in its documentation.

Run by bench.py: python socketify_chat.py PORT
"""

import sys

from socketify import (  # type: ignore[import-untyped]
    App,
    AppListenOptions,
    CompressOptions,
    OpCode,
    Request,
    Response,
    WebSocket,
)


def upgrade(response: Response, request: Request, context: object) -> None:
    headers = (
        "sec-websocket-key",
        "sec-websocket-protocol",
        "sec-websocket-extensions",
    )
    key, protocol, extensions = map(request.get_header, headers)
    name = request.get_query("user")
    response.upgrade(key, protocol, extensions, context, name)


def open_socket(socket: WebSocket) -> None:
    socket.subscribe("room")


def message(socket: WebSocket, text: str, opcode: OpCode) -> None:
    socket.publish("room", f"{socket.get_user_data()}: {text}", opcode)


app = App()
app.ws(
    "/ws",
    {
        "compression": CompressOptions.DISABLED,
        "max_backpressure": 2**24,  # by default, a user 64 KiB behind loses messages
        "upgrade": upgrade,
        "open": open_socket,
        "message": message,
    },
)
app.listen(AppListenOptions(port=int(sys.argv[1]), host="127.0.0.1"))
app.run()
