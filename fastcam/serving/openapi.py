"""The OpenAPI document of a server."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from ..explaining.methods import METHODS
from .pictures import ANSWERS

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "What is wrong, where, and the way out."}},
}
_CLASS = {
    "type": "object",
    "required": ["index", "label", "score", "probability", "evidence", "caption"],
    "properties": {
        "index": {"type": "integer"},
        "label": {"type": "string"},
        "score": {"type": "number", "description": "The logit."},
        "probability": {"type": ["number", "null"]},
        "evidence": {"type": "number", "description": "Share of positive evidence, 0..1."},
        "caption": {"type": ["string", "null"], "description": "A warning if there is little evidence."},
        "box": {
            "type": "array",
            "items": {"type": "number"},
            "description": "Of a detector: left, top, right, bottom.",
        },
        "map": {
            "type": "object",
            "properties": {
                "size": {"type": "array", "items": {"type": "integer"}},
                "data": {"type": "string", "description": "8-bit values in row-major order, base64."},
            },
        },
    },
}
_SCORES = {
    "type": "object",
    "required": ["model", "image_size", "classes"],
    "properties": {
        "model": {"type": "string"},
        "image_size": {"type": ["array", "null"], "items": {"type": "integer"}},
        "classes": {"type": "array", "items": _CLASS},
    },
}
_BINARY = {"type": "string", "format": "binary"}


def describe_api(models: Sequence[str]) -> dict[str, Any]:
    """Return the document for a server with these models."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastcam", "version": version("fastcam"), "description": "Scores and heatmaps of pictures."},
        "components": {
            "schemas": {"Error": _ERROR, "Scores": _SCORES},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "paths": {
            "/explain": {"post": _explain(models)},
            "/metrics": {"get": _plain("Counters for Prometheus", "text/plain")},
            "/v2": {"get": _plain("The server's metadata", "application/json")},
            "/v2/health/live": {"get": _plain("Whether the server runs", "application/json")},
            "/v2/health/ready": {"get": _plain("Whether it takes requests", "application/json", "503")},
            "/v2/models/{name}": {"get": _of_model(models, "A model's inputs and outputs")},
            "/v2/models/{name}/ready": {"get": _of_model(models, "Whether a model takes requests")},
            "/v2/models/{name}/infer": {"post": _infer(models)},
        },
    }


def _explain(models: Sequence[str]) -> dict[str, Any]:
    parameters = [
        _query("model", {"type": "string", "enum": list(models)}, "Needed if there are several."),
        _query("target", {"type": "string", "minLength": 1}, "A class, by name or index; by default the top class."),
        _query("top_k", {"type": "integer", "minimum": 1, "maximum": 100}, "The top K classes instead."),
        _query("method", {"type": "string", "enum": list(METHODS)}, "By default the file's own."),
        _query("colormap", {"type": "string", "enum": ["jet", "turbo", "viridis"]}, "Any name of the cmap library."),
        _query("map", {"type": "string", "enum": ["true", "false"]}, "JSON with the maps of the explained layer."),
    ]
    content = {media: {"schema": _BINARY} for media in ANSWERS}
    content["application/json"] = {"schema": {"$ref": "#/components/schemas/Scores"}}
    body = {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": _BINARY},
            "image/jpeg": {"schema": _BINARY},
            "image/png": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["image"], "properties": {"image": _BINARY}}
            },
        },
    }
    answers = {"200": {"description": "As Accept asks; JPEG by default.", "content": content}}
    return {
        "summary": "Explain a picture",
        "parameters": parameters,
        "requestBody": body,
        "responses": answers | _errors("400", "401", "404", "413", "422", "500", "503", "504"),
    }


def _infer(models: Sequence[str]) -> dict[str, Any]:
    body = {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/octet-stream": {"schema": _BINARY},
        },
    }
    answers = {"200": {"description": "The outputs", "content": {"application/json": {"schema": {"type": "object"}}}}}
    return {
        "summary": "Infer, by the Open Inference Protocol",
        "parameters": [_name(models)],
        "requestBody": body,
        "responses": answers | _errors("400", "401", "404", "413", "422", "500", "503", "504"),
    }


def _of_model(models: Sequence[str], summary: str) -> dict[str, Any]:
    answer = _plain(summary, "application/json")
    return {**answer, "parameters": [_name(models)], "responses": answer["responses"] | _errors("404")}


def _plain(summary: str, media: str, *further: str) -> dict[str, Any]:
    schema = {"type": "string"} if media == "text/plain" else {"type": "object"}
    answers: dict[str, Any] = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
    others = {status: {"description": "Not yet", "content": {media: {"schema": schema}}} for status in further}
    return {"summary": summary, "responses": answers | others | _errors("401")}


def _errors(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": "An error", "content": content} for status in statuses}


def _query(name: str, schema: dict[str, Any], meaning: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": meaning}


def _name(models: Sequence[str]) -> dict[str, Any]:
    return {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(models)}}
