"""Autobahn|Testsuite's fuzzing client, for Python 2.7: fuzzing_client.py SPEC MESSAGES

SPEC is its own JSON; the report goes where that says. The compression cases (12.* and 13.*) send a thousand messages
each; here they send MESSAGES.
"""

import sys

# Takes the reactor, so it comes first.
from autobahntestsuite import wstest
from autobahntestsuite.case import Cases

spec, messages = sys.argv[1], int(sys.argv[2])
for case in Cases:
    if hasattr(case, "CLIENT_OFFERS"):
        case.COUNT = min(case.COUNT, messages)

sys.argv[1:] = ["--mode", "fuzzingclient", "--spec", spec]
wstest.run()
