"""The floor: a bare epoll loop, no more than the system calls a chat cannot do without.

It accepts, receives and sends the same bytes as a chat, but trusts everyone and checks
nothing. What is said until a pass of the loop brings no more leaves in one write to each
user or, with --each, in a write for each message, as in most servers.

Run by bench.py: python floor.py [--each] PORT
"""

import base64
import hashlib
import re
import select
import socket
import sys
from collections.abc import Iterator

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
BACKLOG = 1024
MAX_PENDING = 2000  # frames; with more, nobody waits for others


class User:
    def __init__(self, connection: socket.socket, poll: select.epoll) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(connection, select.EPOLLIN)
        self.connection = connection
        self.poll = poll
        self.prefix = b""  # of all that the user says, known from the handshake on
        self.behind = b""  # bytes that the kernel did not take yet

    def shake_hands(self, request: bytes) -> None:
        found = re.search(rb"user=(\S+)(?s:.*)-Key: (\S+)", request)
        assert found is not None
        self.prefix = found[1] + b": "
        accept = base64.b64encode(hashlib.sha1(found[2] + GUID).digest())
        self.connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )

    def said(self, received: bytes) -> Iterator[bytes]:
        """Yield a frame for each one of `received`: whole and short, as bench.py's are."""
        while received:
            size = received[1] & 127
            mask = (received[2:6] * 32)[:size]
            text = int.from_bytes(received[6 : 6 + size]) ^ int.from_bytes(mask)
            payload = self.prefix + text.to_bytes(size)
            yield bytes([0x81, len(payload)]) + payload
            received = received[6 + size :]

    def write(self, batch: bytes) -> None:
        if self.behind:
            self.behind += batch
            return
        try:
            sent = self.connection.send(batch)
        except BlockingIOError:
            sent = 0
        if sent < len(batch):
            self.behind = batch[sent:]
            self.poll.modify(self.connection, select.EPOLLIN | select.EPOLLOUT)

    def catch_up(self) -> None:
        late, self.behind = self.behind, b""
        self.poll.modify(self.connection, select.EPOLLIN)
        self.write(late)


def serve(port: int, each: bool) -> None:
    listening = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
    poll = select.epoll()
    poll.register(listening, select.EPOLLIN)
    users: dict[int, User] = {}
    pending: list[bytes] = []  # frames to be written
    while True:
        frames: list[bytes] = []
        for fd, events in poll.poll(0 if pending else None):
            if fd == listening.fileno():
                connection = listening.accept()[0]
                users[connection.fileno()] = User(connection, poll)
                continue
            user = users[fd]
            if events & select.EPOLLOUT:
                user.catch_up()
            if events & ~select.EPOLLOUT:
                received = user.connection.recv(2**16)
                if not received:
                    users.pop(fd).connection.close()
                elif user.prefix:
                    frames += user.said(received)
                else:
                    user.shake_hands(received)
        pending += frames
        if pending and (each or not frames or len(pending) > MAX_PENDING):
            for batch in pending if each else [b"".join(pending)]:
                for user in users.values():
                    user.write(batch)
            pending.clear()


serve(int(sys.argv[-1]), each="--each" in sys.argv)
