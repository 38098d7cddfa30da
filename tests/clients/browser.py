"""Chromium for the end-to-end tests: commands in, events out, one JSON object a line.

Usage: browser.py CERTIFICATE. Playwright drives Debian's chromium, headless, with a fresh profile; it takes the server's
CERTIFICATE, by its key, though no authority that it knows has signed it, and no other. src/driver.rs names the commands
and events: `goto` loads a page, and everything else happens in that page's own script.
"""

import asyncio
import base64
import hashlib
import json
import subprocess
import sys

from playwright.async_api import async_playwright

SCRIPT = """
const sockets = new Map();
window.act = ({ op, id, url, subprotocols, data, code, reason }) => {
  const tell = (event, rest) => window.tell({ id, event, ...rest });
  if (op === "open") {
    const socket = new WebSocket(url, subprotocols);
    sockets.set(id, socket);
    socket.onopen = () => tell("open", { subprotocol: socket.protocol || null, extensions: socket.extensions || null });
    socket.onmessage = ({ data }) => tell("text", { data });
    socket.onclose = ({ code, reason, wasClean }) => tell("close", { code, reason, clean: wasClean });
  } else if (op === "text") {
    sockets.get(id).send(data);
  } else if (op === "close") {
    sockets.get(id).close(code, reason);
  }
};
"""


def tell(event):
    print(json.dumps(event), flush=True)


def key_hash(certificate):
    """SHA-256 of the public key, as Chromium wants it."""
    pem = subprocess.run(
        ["openssl", "x509", "-in", certificate, "-noout", "-pubkey"], check=True, capture_output=True
    ).stdout.decode()
    der = base64.b64decode("".join(pem.splitlines()[1:-1]))
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


async def main():
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=[f"--ignore-certificate-errors-spki-list={key_hash(sys.argv[1])}", "--no-proxy-server"],
        )
        page = await browser.new_page()
        await page.expose_function("tell", tell)
        await page.add_init_script(SCRIPT)
        while line := await reader.readline():
            command = json.loads(line)
            try:
                if command["op"] == "goto":
                    response = await page.goto(command["url"])
                    tell({"id": command["id"], "event": "page", "status": response.status})
                else:
                    await page.evaluate("command => window.act(command)", command)
            except Exception as error:  # whatever it is, the test wants to see it
                tell({"id": command["id"], "event": "failed", "error": str(error)})
        await browser.close()


asyncio.run(main())
