// ws on Node.js: `send` to each user, as in its documentation.
// Run by bench.py: node ws_chat.js PORT

const { WebSocket, WebSocketServer } = require("ws");

const server = new WebSocketServer({
  host: "127.0.0.1",
  port: Number(process.argv[2]),
  perMessageDeflate: false,
});

server.on("connection", (socket, request) => {
  const name = new URL(request.url, "ws://localhost").searchParams.get("user");
  socket.on("error", console.error);
  socket.on("message", (text) => {
    const message = `${name}: ${text}`;
    for (const listener of server.clients) {
      if (listener.readyState === WebSocket.OPEN) listener.send(message);
    }
  });
});
