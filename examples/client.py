"""Ask a server for a picture with OpenAI's own client.

    hd-serve demo                                          # in another terminal
    python examples/client.py http://localhost:8000 fist.png

It needs `pip install openai`. The same server answers `examples/client.sh`.
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
path = Path(sys.argv[2] if len(sys.argv) > 2 else "fist.png")
client = OpenAI(base_url=f"{url}/v1", api_key="none")  # or a key of the file that hd-serve --api-keys reads
answer = client.images.generate(
    prompt="a right hand making a fist, blue background",
    extra_body={"seed": 7, "return_hands": True},  # fields beyond OpenAI's
)
picture = answer.data[0]
path.write_bytes(base64.b64decode(picture.b64_json))
print(f"{path}: {path.stat().st_size} bytes, {len(picture.hands['right_hand_pose'])} numbers pose the right hand")
