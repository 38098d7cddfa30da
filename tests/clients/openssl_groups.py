"""A newer OpenSSL than Debian's, the one that comes with Python's `cryptography`: which key exchange group it gets.

python3 openssl_groups.py PORT CA VERSION ("1.2", "1.3"): says its own version, and the group, as OpenSSL offers them by itself.
"""

import socket
import sys

from OpenSSL import SSL

port, ca, version = sys.argv[1:]
context = SSL.Context(SSL.TLS_CLIENT_METHOD)
context.set_min_proto_version(getattr(SSL, "TLS1_" + version[2:] + "_VERSION"))
context.set_max_proto_version(getattr(SSL, "TLS1_" + version[2:] + "_VERSION"))
context.load_verify_locations(ca)
context.set_verify(SSL.VERIFY_PEER)
connection = SSL.Connection(context, socket.create_connection(("127.0.0.1", int(port)), timeout=20))
connection.setblocking(True)
connection.set_tlsext_host_name(b"localhost")
connection.set_connect_state()
connection.do_handshake()
print(SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode())
print(connection.get_protocol_version_name(), connection.get_group_name())
connection.shutdown()
