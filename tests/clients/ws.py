"""WebSocket client for the end-to-end tests: commands in, events out, one JSON object a line.

Usage: ws.py CA-FILE. The client is the `websockets` package; src/driver.rs names the commands and events.
"""

import asyncio
import base64
import json
import ssl
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

sockets = {}


def tell(ident, event, **rest):
    print(json.dumps({"id": ident, "event": event, **rest}), flush=True)


async def hold(command, tls):
    ident = command["id"]
    try:
        socket = await connect(
            command["url"],
            ssl=tls if command["url"].startswith("wss:") else None,
            additional_headers=command["headers"],
            subprotocols=command["subprotocols"] or None,
            origin=command["origin"],
            compression="deflate" if command["compression"] else None,
            ping_interval=None,
            open_timeout=20,
            close_timeout=5,
            max_size=None,
            proxy=None,
        )
    except InvalidStatus as refusal:
        response = refusal.response
        headers = [[name.lower(), value] for name, value in response.headers.raw_items()]
        tell(ident, "refused", status=response.status_code, headers=headers, body=(response.body or b"").decode())
        return
    except Exception as error:  # whatever it is, the test wants to see it
        tell(ident, "failed", error=repr(error))
        return
    sockets[ident] = socket
    tell(
        ident,
        "open",
        subprotocol=socket.subprotocol,
        extensions=socket.response.headers.get("Sec-WebSocket-Extensions"),
        headers=[[name.lower(), value] for name, value in socket.response.headers.raw_items()],
    )
    try:
        while True:
            message = await socket.recv()
            if isinstance(message, str):
                tell(ident, "text", data=message)
            else:
                tell(ident, "binary", data=base64.b64encode(message).decode())
    except ConnectionClosed as closed:
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        tell(ident, "close", code=code, reason=reason)


async def act(command):
    ident = command["id"]
    socket = sockets[ident]
    try:
        match command["op"]:
            case "text":
                await socket.send(command["data"])
            case "fragments":
                await socket.send(command["parts"])
            case "binary":
                await socket.send(base64.b64decode(command["data"]))
            case "ping":
                await (await socket.ping())
                tell(ident, "pong")
            case "close":
                await socket.close(command["code"], command["reason"])
    except ConnectionClosed:
        pass  # told by the reader


async def main():
    tls = ssl.create_default_context(cafile=sys.argv[1])
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    chains = {}
    while line := await reader.readline():
        command = json.loads(line)
        if command["op"] == "open":
            task = asyncio.create_task(hold(command, tls))
        else:
            # In order on each socket, independent between sockets.
            before = chains.get(command["id"])

            async def ordered(command=command, before=before):
                if before:
                    await asyncio.wait([before])
                await act(command)

            task = chains[command["id"]] = asyncio.create_task(ordered())
        tasks.add(task)
        task.add_done_callback(tasks.discard)


asyncio.run(main())
