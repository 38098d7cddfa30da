"""OpenSSL as Python has it: one HTTPS request for each line of input.

python3 tls.py PORT CA PATH, then lines of: VERSION ("1.2", "1.3"), CERTIFICATE and KEY (files; "-" for none). Each is answered by a
line: the status, or "refused", and "full" or "resumed". Sessions are kept for the next connection of the same kind.
"""

import socket
import ssl
import sys

port, ca, path = sys.argv[1:]
kept = {}


def connect(version, *identity):
    if (version, identity) not in kept:
        tls = ssl.create_default_context(cafile=ca)
        tls.minimum_version = tls.maximum_version = getattr(ssl.TLSVersion, "TLSv1_" + version[2:])
        if identity[0] != "-":
            tls.load_cert_chain(*identity)
        kept[version, identity] = (tls, None)
    tls, session = kept[version, identity]
    raw = socket.create_connection(("127.0.0.1", int(port)), timeout=20)
    with tls.wrap_socket(raw, server_hostname="localhost", session=session) as stream:
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := stream.recv(65536):
            answer += data
        # In TLS 1.3 it comes behind the handshake.
        kept[version, identity] = (tls, stream.session)
        status = answer.split(b" ")[1].decode()
        return f"{status} {'resumed' if stream.session_reused else 'full'}"


for line in sys.stdin:
    try:
        said = connect(*line.split())
    except (ssl.SSLError, ConnectionError) as error:
        print(error, file=sys.stderr)
        said = "refused full"
    print(said, flush=True)
