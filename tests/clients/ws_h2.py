"""WebSocket client over HTTP/2 (RFC 8441) for the end-to-end tests: commands in, events out, one JSON object a line.

Usage: ws_h2.py CA-FILE [CERTIFICATE-FILE KEY-FILE]. HTTP/2 is the `h2` package's, frames are those of `websockets`; src/driver.rs names the
commands and events. All sockets of one authority share a connection for as long as it takes new streams.
"""

import asyncio
import base64
import json
import ssl
import sys
from urllib.parse import urlsplit

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection, H2ConnectionStateMachine
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Opcode
from websockets.headers import build_extension, parse_extension
from websockets.protocol import Protocol, Side

# `h2` takes a GOAWAY for the end of everything; streams that are open may be finished (RFC 9113 section 6.8).
goaway = (ConnectionState.CLIENT_OPEN, ConnectionInputs.RECV_GOAWAY)
H2ConnectionStateMachine._transitions[goaway] = (None, ConnectionState.CLIENT_OPEN)

connections = {}
sockets = {}


def tell(ident, event, **rest):
    print(json.dumps({"id": ident, "event": event, **rest}), flush=True)


class Stream:
    """One request, or the WebSocket that it became."""

    def __init__(self, connection, ident, number):
        self.connection, self.ident, self.number = connection, ident, number
        self.frames = None
        self.deflate = None
        self.answer = None
        self.body = b""
        self.parts = []
        self.kind = None
        self.outgoing = b""
        self.ending = self.ended = self.stalled = False
        self.unread = 0

    def answered(self, headers):
        self.answer = headers
        fields = dict(headers)
        if self.ident in sockets and fields[":status"] == "200":
            self.frames = Protocol(Side.CLIENT, max_size=None)
            chosen = fields.get("sec-websocket-extensions")
            if chosen:
                [(_, params)] = parse_extension(chosen)
                self.frames.extensions = [self.deflate.process_response_params(params, [])]
            rest = [[name, value] for name, value in headers if not name.startswith(":")]
            subprotocol = fields.get("sec-websocket-protocol")
            tell(self.ident, "open", subprotocol=subprotocol, extensions=chosen, headers=rest)

    def received(self, data):
        if self.frames is None:
            self.body += data
            return
        self.frames.receive_data(data)
        for frame in self.frames.events_received():
            if frame.opcode is Opcode.PONG:
                tell(self.ident, "pong")
            if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self.kind = frame.opcode if frame.opcode is not Opcode.CONT else self.kind
                self.parts.append(frame.data)
                if frame.fin:
                    whole, self.parts = b"".join(self.parts), []
                    if self.kind is Opcode.TEXT:
                        tell(self.ident, "text", data=whole.decode())
                    else:
                        tell(self.ident, "binary", data=base64.b64encode(whole).decode())
        self.pump()

    def end(self, reset=None):
        if self.ended:
            return
        self.ended = True
        if self.frames is not None:
            if reset is None:
                self.frames.receive_eof()
                self.pump()
            closed = self.frames.close_rcvd
            code, reason = (closed.code, closed.reason) if closed else (1006, "")
            tell(self.ident, "close", code=code, reason=reason, reset=reset)
        elif self.answer is None:
            tell(self.ident, "failed", error=f"reset: {reset}")
        else:
            status = int(dict(self.answer)[":status"])
            rest = [[name, value] for name, value in self.answer if not name.startswith(":")]
            event = "refused" if self.ident in sockets else "response"
            tell(self.ident, event, status=status, headers=rest, body=self.body.decode())

    def pump(self):
        if self.frames is not None:
            for data in self.frames.data_to_send():
                self.outgoing += data
                self.ending |= data == b""
        http = self.connection.http
        try:
            while self.outgoing:
                room = min(http.local_flow_control_window(self.number), http.max_outbound_frame_size)
                if room == 0:
                    break
                http.send_data(self.number, self.outgoing[:room])
                self.outgoing = self.outgoing[room:]
            if self.ending and not self.outgoing:
                self.ending = False
                http.end_stream(self.number)
        except ProtocolError:
            self.outgoing, self.ending = b"", False  # the stream is gone; its end has been told
        self.connection.flush()


class Connection:
    def __init__(self, authority):
        self.authority = authority
        self.streams = {}
        self.settled = asyncio.Event()
        self.usable = True

    async def start(self, tls):
        host, _, port = self.authority.rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port), ssl=tls, server_hostname=host)
        self.http = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.http.initiate_connection()
        # A stalled stream is to stall itself only.
        self.http.increment_flow_control_window(1 << 24)
        self.flush()
        self.task = asyncio.create_task(self.read())
        await self.settled.wait()
        return self

    def flush(self):
        if data := self.http.data_to_send():
            self.writer.write(data)

    async def read(self):
        try:
            while data := await self.reader.read(65536):
                for event in self.http.receive_data(data):
                    self.happened(event)
                self.flush()
                for stream in list(self.streams.values()):
                    stream.pump()
        except (OSError, ProtocolError) as error:
            tell("", "broken", error=repr(error))
        self.usable = False
        self.settled.set()
        for stream in self.streams.values():
            stream.end("connection")

    def happened(self, event):
        if isinstance(event, RemoteSettingsChanged):
            self.settled.set()
        elif isinstance(event, ConnectionTerminated):
            self.usable = False
            tell("", "goaway", error=int(event.error_code))
        stream = self.streams.get(getattr(event, "stream_id", None))
        if stream is None:
            return
        if isinstance(event, ResponseReceived):
            stream.answered(event.headers)
        elif isinstance(event, DataReceived):
            if stream.stalled:
                stream.unread += event.flow_controlled_length
                return
            self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            stream.received(event.data)
        elif isinstance(event, StreamEnded):
            stream.end()
        elif isinstance(event, StreamReset):
            stream.end(int(event.error_code))

    def request(self, ident, headers, end):
        number = self.http.get_next_available_stream_id()
        stream = self.streams[number] = Stream(self, ident, number)
        self.http.send_headers(number, headers, end_stream=end)
        return stream


async def connected(authority, tls):
    connection = connections.get(authority)
    if connection is None:
        connection = connections[authority] = asyncio.create_task(Connection(authority).start(tls))
    connection = await connection
    if not connection.usable:
        del connections[authority]
        return await connected(authority, tls)
    return connection


async def begin(command, tls):
    ident, url = command["id"], urlsplit(command["url"])
    path = url.path + (f"?{url.query}" if url.query else "")
    own = [(name.lower(), value) for name, value in command["headers"]]
    try:
        connection = await connected(url.netloc, tls)
        if command["op"] == "request":
            headers = [(":method", "GET"), (":scheme", "https"), (":path", path), (":authority", url.netloc)]
            connection.request(ident, headers + own, True)
            connection.flush()
            return
        if connection.http.remote_settings.get(SettingCodes.ENABLE_CONNECT_PROTOCOL) != 1:
            tell(ident, "failed", error="extended CONNECT is not offered")
            return
        headers = [
            (":method", "CONNECT"),
            (":protocol", command["protocol"]),
            (":scheme", "https"),
            (":path", path),
            (":authority", url.netloc),
            ("sec-websocket-version", "13"),
            *own,
        ]
        if command["origin"]:
            headers.append(("origin", command["origin"]))
        if command["subprotocols"]:
            headers.append(("sec-websocket-protocol", ", ".join(command["subprotocols"])))
        deflate = ClientPerMessageDeflateFactory()
        if command["compression"]:
            offer = build_extension([("permessage-deflate", deflate.get_request_params())])
            headers.append(("sec-websocket-extensions", offer))
        stream = connection.request(ident, headers, False)
        stream.deflate = deflate
        sockets[ident] = stream
        connection.flush()
    except Exception as error:  # whatever it is, the test wants to see it
        tell(ident, "failed", error=repr(error))


def act(command):
    stream = sockets[command["id"]]
    frames = stream.frames
    match command["op"]:
        case "text":
            frames.send_text(command["data"].encode())
        case "fragments":
            first, *middle, last = [part.encode() for part in command["parts"]]
            frames.send_text(first, fin=False)
            for part in middle:
                frames.send_continuation(part, fin=False)
            frames.send_continuation(last, fin=True)
        case "binary":
            frames.send_binary(base64.b64decode(command["data"]))
        case "ping":
            frames.send_ping(b"")
        case "close":
            frames.send_close(command["code"], command["reason"])
        case "reset":
            stream.connection.http.reset_stream(stream.number, ErrorCodes.CANCEL)
        case "half-close":
            stream.ending = True
        case "stall":
            stream.stalled = True
        case "resume":
            stream.stalled = False
            stream.connection.http.acknowledge_received_data(stream.unread, stream.number)
    stream.pump()


async def main():
    tls = ssl.create_default_context(cafile=sys.argv[1])
    tls.set_alpn_protocols(["h2"])
    if len(sys.argv) > 2:
        tls.load_cert_chain(sys.argv[2], sys.argv[3])
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    while line := await reader.readline():
        command = json.loads(line)
        if command["op"] in ("open", "request"):
            task = asyncio.create_task(begin(command, tls))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            try:
                act(command)
            except Exception as error:  # closed meanwhile: told by the reader
                print(repr(error), file=sys.stderr)


asyncio.run(main())
