#!/usr/bin/env bash
# huggingface_hub 2.4.0: `create_repo(exist_ok=True)` returns as usual if the hub refuses to create the repository with 403
# but lets it be read, so that it does not show that a token may write there; `auth_check(write=True)` asks that.
# Seen, against a server that answers as the hub does: create_repo gives the address, auth_check raises.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet huggingface_hub==2.4.0
cd "$folder"
HF_HUB_OFFLINE=0 HF_HOME="$folder/home" "$folder/venv/bin/python" - <<'PYTHON'
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer


class Hub(BaseHTTPRequestHandler):
    """Others' repositories may be read, and not be written."""

    def answer(self, status):
        body = json.dumps({"id": "others/model", "modelId": "others/model"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(403 if "auth-check" in self.path else 200)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(403)

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()

os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

import huggingface_hub

api = huggingface_hub.HfApi(token="hf_of_a_reader")
created = api.create_repo("others/model", exist_ok=True)
try:
    api.auth_check("others/model", write=True)
    refused = None
except Exception as error:
    refused = type(error).__name__
print("huggingface_hub", huggingface_hub.__version__)
print("create_repo(exist_ok=True) returns", str(created).partition("/others")[2] and ".../others/model")
print("auth_check(write=True) raises", refused)
assert str(created).endswith("others/model") and refused is not None
PYTHON
