"""FastAPI on uvicorn: the connection manager of FastAPI's documentation.

Run by bench.py: python fastapi_chat.py PORT
"""

import sys

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect


class ConnectionManager:
    def __init__(self) -> None:
        self.connections: list[WebSocket] = []

    async def connect(self, socket: WebSocket) -> None:
        await socket.accept()
        self.connections.append(socket)

    def disconnect(self, socket: WebSocket) -> None:
        self.connections.remove(socket)

    async def broadcast(self, message: str) -> None:
        for connection in self.connections:
            await connection.send_text(message)


app = FastAPI()
manager = ConnectionManager()


@app.websocket("/ws")
async def talk(socket: WebSocket, user: str) -> None:
    await manager.connect(socket)
    try:
        while True:
            await manager.broadcast(f"{user}: {await socket.receive_text()}")
    except WebSocketDisconnect:
        manager.disconnect(socket)


uvicorn.run(
    app, port=int(sys.argv[1]), log_level="warning", ws_per_message_deflate=False
)
