"""Constant requests for the end-to-end tests, by httpx: one client over HTTP/1.1 and one over HTTP/2.

Usage: load.py CA-FILE URL TOKEN. Says `running` once both have had an answer, stops at a line on standard input, and
prints {"ok": number, "failed": [what happened instead of 200]}.
"""

import asyncio
import json
import ssl
import sys

import httpx

ok = 0
failed = []


async def ask(client, url, first, stop):
    global ok
    while not stop.is_set():
        try:
            response = await client.get(url)
            if response.status_code == 200:
                ok += 1
            else:
                failed.append(f"{response.http_version} {response.status_code} {response.text}")
        except httpx.HTTPError as error:
            failed.append(repr(error))
        first.set()


async def main():
    ca, url, token = sys.argv[1:]
    tls = ssl.create_default_context(cafile=ca)
    headers = {"Authorization": f"Bearer {token}"}
    stop = asyncio.Event()
    async with (
        httpx.AsyncClient(verify=tls, headers=headers, http2=False, trust_env=False) as one,
        httpx.AsyncClient(verify=tls, headers=headers, http1=False, http2=True, trust_env=False) as two,
    ):
        firsts = [asyncio.Event(), asyncio.Event()]
        tasks = [asyncio.create_task(ask(client, url, first, stop)) for client, first in zip((one, two), firsts)]
        for first in firsts:
            await first.wait()
        print("running", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        stop.set()
        await asyncio.gather(*tasks)
    print(json.dumps({"ok": ok, "failed": failed[:10]}), flush=True)


asyncio.run(main())
