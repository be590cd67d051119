"""These tests run under Triton's interpreter only: `../test_interpreted.py` starts them so."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import hasten

    hasten()
else:
    collect_ignore_glob = ["*.py"]
