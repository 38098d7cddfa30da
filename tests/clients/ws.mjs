// WebSocket client for the end-to-end tests: commands in, events out, one JSON object a line.
//
// Usage: node ws.mjs CA-FILE. The client is the `ws` package; src/driver.rs names the commands and events.

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import WebSocket from "ws";

const ca = readFileSync(process.argv[2]);
const sockets = new Map();

const tell = (id, event, rest = {}) => process.stdout.write(JSON.stringify({ id, event, ...rest }) + "\n");

const pairs = (raw) => {
  const list = [];
  for (let at = 0; at < raw.length; at += 2) list.push([raw[at].toLowerCase(), raw[at + 1]]);
  return list;
};

const open = ({ id, url, headers, origin, subprotocols, compression }) => {
  const options = { ca, headers: Object.fromEntries(headers), perMessageDeflate: compression, maxPayload: 1 << 26 };
  if (origin !== null) options.origin = origin;
  const socket = new WebSocket(url, subprotocols, options);
  let upgraded = [];
  let settled = false;
  sockets.set(id, socket);
  socket.on("upgrade", (response) => {
    upgraded = pairs(response.rawHeaders);
  });
  socket.on("open", () => {
    settled = true;
    tell(id, "open", { subprotocol: socket.protocol || null, extensions: socket.extensions || null, headers: upgraded });
  });
  socket.on("unexpected-response", (_request, response) => {
    settled = true;
    let body = "";
    response.setEncoding("utf8");
    response.on("data", (part) => (body += part));
    response.on("end", () => tell(id, "refused", { status: response.statusCode, headers: pairs(response.rawHeaders), body }));
  });
  socket.on("message", (data, binary) => {
    if (binary) tell(id, "binary", { data: data.toString("base64") });
    else tell(id, "text", { data: data.toString() });
  });
  socket.on("pong", () => tell(id, "pong"));
  socket.on("error", (error) => {
    if (!settled) tell(id, "failed", { error: String(error) });
  });
  socket.on("close", (code, reason) => {
    if (settled) tell(id, "close", { code, reason: reason.toString() });
  });
};

const act = (command) => {
  if (command.op === "open") return open(command);
  const socket = sockets.get(command.id);
  if (socket.readyState !== WebSocket.OPEN) return;
  switch (command.op) {
    case "text":
      return socket.send(command.data);
    case "fragments":
      return command.parts.forEach((part, at) => socket.send(part, { fin: at === command.parts.length - 1 }));
    case "binary":
      return socket.send(Buffer.from(command.data, "base64"));
    case "ping":
      return socket.ping();
    case "close":
      return socket.close(command.code, command.reason);
  }
};

createInterface({ input: process.stdin }).on("line", (line) => act(JSON.parse(line)));
