"""`/openapi.json`: the requests that this server takes, with its own bounds."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .service import Service

# The beginning of a path -> the group in which Swagger UI shows it.
TAGS = {
    "/v1/": "Pictures and hands",
    "/sdapi/": "AUTOMATIC1111's API",
    "/queue/": "AUTOMATIC1111's API",
    "/": "State of the server",
}
TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": TEXT_OR_NULL,
                "code": TEXT_OR_NULL,
            },
        }
    },
}


def describe(app: FastAPI, service: Service) -> dict[str, Any]:
    """The schema of the routes, with the bounds of the bundle and the limits."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schema["servers"] = [{"url": "./"}]  # relative to the schema itself: a proxy may put a path in front
    for name, path in schema["paths"].items():
        for operation in path.values():
            operation["responses"].pop("422", None)  # this server answers 400
            operation["tags"] = [next(words for start, words in TAGS.items() if name.startswith(start))]
    parts = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    sizes = {} if service.front.any_size or service.bundle.manifest.size_multiple else {"enum": [service.size, "auto"]}
    for part, field, bounds in (
        ("Generation", "model", {"enum": service.names}),
        ("HandsRequest", "model", {"enum": service.names}),
        ("Generation", "size", sizes),
        ("Generation", "n", {"maximum": service.most}),
        ("Generation", "num_inference_steps", {"maximum": service.limits.steps}),
        ("Generation", "hand_steps", {"maximum": service.limits.steps}),
    ):
        parts[part]["properties"][field]["anyOf"][0].update(bounds)
    parts["Error"] = ERROR
    if service.keys.path is not None:
        schema["security"] = [{"key": []}]
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return schema
