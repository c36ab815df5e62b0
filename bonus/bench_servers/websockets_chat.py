"""websockets: its `broadcast()`, as its documentation recommends.

Run by bench.py: python websockets_chat.py PORT
"""

import asyncio
import sys
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection, broadcast, serve

connections: set[ServerConnection] = set()


async def talk(connection: ServerConnection) -> None:
    assert connection.request is not None
    name = parse_qs(urlsplit(connection.request.path).query)["user"][0]
    connections.add(connection)
    try:
        async for message in connection:
            broadcast(connections, f"{name}: {message!s}")
    finally:
        connections.remove(connection)


async def main() -> None:
    port = int(sys.argv[1])
    async with serve(talk, "127.0.0.1", port, compression=None) as server:
        await server.serve_forever()


asyncio.run(main())
