"""A bundle goes to the Hugging Face Hub, with a card that says what it is: `hd-export CHECKPOINT --push hf://org/name`.

    target = check_push("hf://org/name", "creativeml-openrail-m", checkpoint, body=None)    # before minutes of export
    push(Path("bundle"), target, "creativeml-openrail-m", notes)

A bundle with arrays of a licensed SMPL-H body is refused: they may not be passed on. Plans stay here, because each is
built for one GPU. A new repository is private until its owner opens it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import hub, shipped
from ..contract import MANIFEST, Manifest
from ..errors import HubError

FREE = "the demo's own, licence-free"  # `made_by["body"]` of a bundle that may be passed on
PAPER = "https://arxiv.org/abs/2403.01693"


def check_push(name: str, licence: str | None, checkpoint: Path, body: Path | None) -> tuple[hub.Id, str]:
    """The repository to push to, and the licence of the weights. Raises HubError for what the push would refuse."""
    from huggingface_hub import get_token

    id = hub.parse(hub.PREFIX + name.removeprefix(hub.PREFIX))
    if id is None or id.revision is not None:
        raise HubError(f"--push must be hf://ORGANISATION/NAME, without a revision, got {name}.")
    own = checkpoint / "body" / "smplh.npz"
    for path in (body,) if body is not None else (own,) if own.is_file() else ():
        if not shipped.is_demo_body(path):
            raise HubError(_licensed(str(path)))
    if licence is None and checkpoint.resolve() != shipped.checkpoint_path().resolve():
        raise HubError(
            "--license must be given with --push: the licence of the weights, as the Hub names it, such as "
            "creativeml-openrail-m for what was made from Stable Diffusion 1.x."
        )
    if hub.offline():
        raise HubError("--push must have a connection, but HF_HUB_OFFLINE is set. Unset it.")
    if get_token() is None:
        raise HubError("--push must have a token that may write. Log in with `hf auth login`, or set HF_TOKEN.")
    return id, licence or "apache-2.0"


def push(bundle: Path, id: hub.Id, licence: str, notes: dict[str, Any]) -> str:
    """Uploads a bundle in one commit, and removes graphs of an older bundle there. Returns the commit.

    notes: of the checkpoint. An existing README.md stays. Raises HubError; BundleError for a damaged bundle.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    manifest = Manifest.load(bundle)
    if manifest.made_by.get("body") != FREE:
        raise HubError(_licensed(str(bundle)))
    api, names = HfApi(), [*manifest.files, MANIFEST]
    hub.show_bars(sys.stderr.isatty())
    with hub.explained(id):
        api.create_repo(id.repo, private=True, exist_ok=True)
        there = api.list_repo_files(id.repo)
        operations: list[Any] = [CommitOperationAdd(name, str(bundle / name)) for name in names]
        if "README.md" not in there:
            operations.append(CommitOperationAdd("README.md", card(manifest, id, licence, notes).encode()))
        old = [name for name in there if name.endswith((".onnx", ".onnx.data")) and name not in names]
        operations += [CommitOperationDelete(name) for name in old]
        return str(api.create_commit(id.repo, operations, commit_message="Bundle of hd-export").oid)


def card(manifest: Manifest, id: hub.Id, licence: str, notes: dict[str, Any]) -> str:
    """The model card: metadata for the Hub, then what it is, how to run it, and what may be done with it."""
    base, _, commit = str(notes.get("from", "")).partition("@")
    head = [f"license: {licence}", "pipeline_tag: text-to-image", "library_name: handiffuser"]
    head += ["tags: [hands, SMPL-H, onnx]", *([f"base_model: {base}"] if "/" in base else [])]
    height, width = manifest.image_size
    defaults, made_by = manifest.defaults, manifest.made_by
    origin = f" from [{base}](https://huggingface.co/{base}) at commit {commit}" if "/" in base else ""
    hands = "Its hand prior is untrained: paint with `--no-hands`, or give hands with `--hand-params`. "
    first, prompt = id.repo.partition("/")[2], "a right hand making a fist"
    return f"""---
{chr(10).join(head)}
---

# {first}

ONNX graphs of [HanDiffuser]({PAPER}): a prompt becomes SMPL-H hands, then a picture. They run without PyTorch.

```sh
pip install "handiffuser[cpu]"
hd-run hf://{id.repo} "{prompt}"{" --no-hands" if notes.get("trained") is False else ""}
```

{hands if notes.get("trained") is False else ""}It makes pictures of {height} x {width} in {manifest.precision}, by
default with {defaults.get("steps")} steps of `{defaults.get("solver")}` at guidance {defaults.get("guidance")}. The
handiffuser toolkit {made_by.get("handiffuser", "")} exported it{origin}, opset {made_by.get("opset")}.

## Licence

- **Weights**: {licence}. Terms of the model that they were made from hold for them, too.
- **Body**: the toolkit's own, in SMPL-H's format, under Apache-2.0. No arrays of SMPL, SMPL-H or MANO are in these
  files.
"""


def _licensed(what: str) -> str:
    return (
        f"{what} holds arrays of an SMPL-H body, whose licence forbids passing them on: --push must have the demo's "
        "free body. Export without --body."
    )
