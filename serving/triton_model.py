"""Triton's Python backend over the loop: `model.py` of the repository that `hd-export --triton` writes.

`execute` puts requests into a queue and returns. One thread runs the loop, which takes requests at any step. It answers
each request through its own response sender (decoupled) when the picture is done.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from handiffuser import Failure, HanDiffuser, HanDiffuserError, Request
from handiffuser.engines.plans import cache_folder
from handiffuser.runtime.loading import SERVER_PICTURES
from handiffuser.serving.adapters import Adapters
from handiffuser.serving.triton import FIELDS


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])["parameters"]
        parameters = {name: entry["string_value"] for name, entry in config.items()}
        self.folder = Path(args["model_repository"]) / args["model_version"] / "engines"
        self.pipeline = HanDiffuser.load(
            self.folder,
            parameters["device"],
            batch_size=int(parameters["slots"]),
            backend=parameters["backend"],
            pictures=SERVER_PICTURES,
            lora_memory=float(parameters.get("lora_memory") or 0) or None,
        )
        named = parameters.get("lora_folder")
        self.adapters = Adapters(Path(named) if named else None, "lora_folder of config.pbtxt")
        self.pipeline.warm_up()
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.senders = {}  # id -> (Triton's request, its response sender)
        self.thread = threading.Thread(target=self._run, name="handiffuser")
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                fields = {"seed": secrets.randbelow(2**31), **self._fields(request)}
                filled, refused = self.pipeline.prepare([Request(**fields, id=f"t-{secrets.token_hex(12)}")])
                if refused:
                    raise HanDiffuserError(refused[0].sentence)
                self.waiting.put((filled[0], request, sender))
            except HanDiffuserError as error:
                self._fail(sender, str(error))
        return None

    def finalize(self):
        self.waiting.put(None)
        self.thread.join()
        self.pipeline.close()

    def _fields(self, request):
        fields = {}
        for name, ours in FIELDS.items():
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values = [
                    value.decode("utf-8", "replace") if isinstance(value, bytes) else value.item()
                    for value in tensor.as_numpy().reshape(-1)
                ]
                fields[ours] = values[0] if len(values) == 1 else tuple(values)
        fields["lora"] = self.adapters.paths(fields.get("lora"))
        return fields

    def _source(self):
        while True:
            try:
                item = self.waiting.get(block=not self.senders)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            filled, request, sender = item
            self.senders[filled.id] = (request, sender)
            yield filled

    def _between_steps(self, kind, count):
        if kind == "steps":
            for id, (request, _) in self.senders.items():
                if request.is_cancelled():
                    self.pipeline.cancel(id)

    def _run(self):
        try:
            for result in self.pipeline.run(self._source(), self._between_steps):
                _, sender = self.senders.pop(result.id)
                if isinstance(result, Failure):
                    self._fail(sender, result.sentence)
                else:
                    self._answer(sender, result)
        except HanDiffuserError as error:  # Triton can unload and load the model to start it again
            for _, sender in self.senders.values():
                self._fail(sender, str(error))

    def _answer(self, sender, picture):
        warnings = np.array([text.encode() for text in picture.warnings], np.object_)
        values = {
            "IMAGE": picture.image,
            "JOINTS_2D": picture.hands["joints_2d"].astype(np.float32),
            "VISIBILITY": picture.hands["visibility"].astype(np.float32),
            "SEED": np.array([picture.request.seed], np.int64),
            "WARNINGS": warnings,
        }
        tensors = [pb_utils.Tensor(name, value) for name, value in values.items()]
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=final)

    def _fail(self, sender, sentence):
        """Sends a sentence without the names of files and folders of this machine."""
        sentence = self.adapters.hidden(sentence)
        for own, name in ((self.folder, "ENGINES"), (cache_folder(), "the server's cache")):
            sentence = sentence.replace(str(own), name)
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence)), flags=final)
