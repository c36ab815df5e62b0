"""Tornado: `write_message` to each user, as in Tornado's own chat demo.

Run by bench.py: python tornado_chat.py PORT
"""

import asyncio
import sys

from tornado.web import Application
from tornado.websocket import WebSocketHandler

users: set[WebSocketHandler] = set()


class Talk(WebSocketHandler):
    def open(self) -> None:
        self.name = self.get_query_argument("user")
        self.set_nodelay(True)
        users.add(self)

    def on_message(self, message: str | bytes) -> None:
        for user in users:
            user.write_message(f"{self.name}: {message!s}")

    def on_close(self) -> None:
        users.discard(self)


async def main() -> None:
    Application([("/ws", Talk)]).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()


asyncio.run(main())
