"""Make pictures from Python, and keep each with its hands.

    python examples/pictures.py out

The word "demo" loads the model that ships with the package. Give `load` the folder that hd-export wrote to use yours.
"""

import sys
from pathlib import Path

from handiffuser import HanDiffuser
from handiffuser.hands import save_hands
from PIL import Image

PROMPTS = ["a right hand making a fist, blue background", "two open hands"]

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
out.mkdir(parents=True, exist_ok=True)
with HanDiffuser.load("demo") as pipeline:
    for picture in pipeline.generate(PROMPTS, images_per_prompt=2, seed=3):
        Image.fromarray(picture.image).save(out / f"{picture.id}.png")
        save_hands(out / f"{picture.id}.hands.npz", picture.hands, prompt=picture.request.prompt)
        print(f"{picture.id}: {picture.seconds:.2f} s, right wrist at {picture.hands['joints_2d'][1, 0].round(2)}")
