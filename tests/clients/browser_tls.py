"""What Chromium agrees on with a TLS server, as its own developer tools say it.

Usage: browser_tls.py URL CERTIFICATE [FLAG...]. Loads URL with Debian's chromium, headless, with a fresh profile and FLAGs
such as --ssl-version-max=tls1.2; takes the server's CERTIFICATE, by its key, and no other that no authority it knows has signed. Prints
one JSON object: status, HTTP version, and `securityDetails` (protocol, keyExchangeGroup, cipher, subjectName …).
"""

import base64
import hashlib
import json
import subprocess
import sys

from playwright.sync_api import sync_playwright


def key_hash(certificate):
    """SHA-256 of the public key, as Chromium wants it."""
    pem = subprocess.run(
        ["openssl", "x509", "-in", certificate, "-noout", "-pubkey"], check=True, capture_output=True
    ).stdout.decode()
    der = base64.b64decode("".join(pem.splitlines()[1:-1]))
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


url, certificate, *flags = sys.argv[1:]
trust = f"--ignore-certificate-errors-spki-list={key_hash(certificate)}"
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path="/usr/bin/chromium", args=[trust, "--no-proxy-server", *flags]
    )
    page = browser.new_page()
    tools = page.context.new_cdp_session(page)
    tools.send("Network.enable")
    seen = []
    tools.on("Network.responseReceived", lambda event: seen.append(event["response"]))
    page.goto(url)
    response = next(response for response in seen if response["url"] == url)
    details = {**response.get("securityDetails", {}), "status": response["status"], "http": response.get("protocol")}
    print(json.dumps(details))
    browser.close()
