#!/usr/bin/env bash
# Ask a server for a picture with curl.
#
#     hd-serve demo                                        # in another terminal
#     examples/client.sh http://localhost:8000 fist.png
#
# With hd-serve --api-keys, add: -H "Authorization: Bearer KEY".
set -euo pipefail
url=${1:-http://localhost:8000} path=${2:-fist.png}

curl --silent --show-error --fail-with-body "$url/v1/images/generations" \
  -H "Content-Type: application/json" \
  -d '{"prompt": "a right hand making a fist, blue background", "seed": 7}' |
  python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))' \
    >"$path"
echo "$path: $(wc -c <"$path") bytes"
