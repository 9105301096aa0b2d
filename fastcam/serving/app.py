"""The routes of a server, and what becomes of an error."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeAlias, TypeVar

import jinja2
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..errors import (
    ArgumentError,
    FastcamError,
    ImageError,
    LayerError,
    NonFiniteError,
    TargetError,
    TimeLimitError,
)
from ..explaining.methods import METHODS
from . import inference, pictures, protocol
from .metrics import Metrics
from .models import ModelStore, ServedModel, UnknownModelError
from .openapi import describe_api
from .scheduling import BusyError, LateError, Scheduler
from .settings import ServerSettings

_LOG = logging.getLogger("fastcam.serving")
_Result = TypeVar("_Result")
_Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

# The first row that fits: the more special errors come first.
_STATUSES: list[tuple[type[Exception], int]] = [
    (UnknownModelError, 404),
    (pictures.TooLargeError, 413),
    (BusyError, 503),
    (LateError, 504),
    (TimeLimitError, 504),
    (NonFiniteError, 422),
    (ImageError, 400),
    (TargetError, 400),
    (LayerError, 400),
    (ArgumentError, 400),
]
_RETRY_SECONDS = "1"
# Client closed the request: nginx's number, seen in logs and metrics only.
_GONE = 499
_OPEN_TO_ALL = ("/v2/health/live", "/v2/health/ready")
_POLL_SECONDS = 0.05


class _Server:
    def __init__(self, models: ModelStore, settings: ServerSettings) -> None:
        self.models = models
        self.settings = settings
        self.metrics = Metrics()
        self.scheduler = Scheduler(settings, self.metrics)
        self.is_ready = False

    # People and programs with photos

    async def page(self, request: Request) -> Response:
        environment = jinja2.Environment(loader=jinja2.PackageLoader("fastcam.serving"), autoescape=True)
        models = {name: list(self.models.find(name).explainer.methods) for name in self.models.names}
        return HTMLResponse(environment.get_template("index.html").render(models=models))

    async def explain(self, request: Request) -> Response:
        asked = pictures.read_request(dict(request.query_params), request.headers.get("accept", ""), _SETTING_NAMES)
        model = self._model(asked.model)
        body = await self._picture(request)
        explainer = model.explainer

        def run(values: Any, left: float) -> Any:
            decoded = [pictures.decode(value, self.settings.max_pixels) for value in values]
            return pictures.explain(explainer, asked, decoded, left)

        key = (id(explainer), asked._replace(media="", colormap="", map=False))
        found = await self._unless_gone(request, self.scheduler.submit(key, body, run, self.settings.timeout))
        begin = time.monotonic()
        answer = await asyncio.to_thread(pictures.ANSWERS[asked.media], found, asked)
        self.metrics.stages.labels("encoding").observe(time.monotonic() - begin)
        if asked.media == "application/json":
            return JSONResponse({"model": model.name, **answer})
        return Response(answer, media_type=asked.media, headers=_score_headers(found))

    async def _picture(self, request: Request) -> bytes:
        """Return the body, or the file of a form's field "image"."""
        body = await self._body(request)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return body
        # Starlette parses what the request hands over: the body, which has been read within its limit.
        request._body = body  # noqa: SLF001 - documented to be kept there after body()
        async with request.form(max_files=1, max_fields=8) as form:
            field = form.get("image")
            if not isinstance(field, UploadFile):
                raise ArgumentError('the form has no file "image"')
            return await field.read()

    # The Open Inference Protocol

    async def server_metadata(self, request: Request) -> Response:
        return JSONResponse({"name": "fastcam", "version": version("fastcam"), "extensions": ["binary_tensor_data"]})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": self.is_ready}, 200 if self.is_ready else 503)

    async def model_metadata(self, request: Request) -> Response:
        model = self._model(request.path_params["name"])
        return JSONResponse(inference.describe(model.explainer, model.name))

    async def model_ready(self, request: Request) -> Response:
        model = self._model(request.path_params["name"])
        return JSONResponse({"name": model.name, "ready": self.is_ready})

    async def infer(self, request: Request) -> Response:
        model = self._model(request.path_params["name"])
        body = await self._body(request)
        explainer = model.explainer
        message, inputs = protocol.read_message(body, request.headers.get(protocol.HEADER))

        def run(values: Any, left: float) -> Any:
            asked = inference.read_inference(message, inputs, self.settings.max_pixels)
            return [(asked, inference.infer(explainer, asked, left))]

        # A request is a batch already.
        asked, outputs = await self._unless_gone(
            request, self.scheduler.submit(object(), None, run, self.settings.timeout)
        )
        identifier = message.get("id")
        answer = {"model_name": model.name, "model_version": "1", **({} if identifier is None else {"id": identifier})}
        content, length = await asyncio.to_thread(protocol.write_message, answer, outputs, asked.binary)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(
            content,
            media_type="application/octet-stream",
            headers={"Inference-Header-Content-Length": str(length)},
        )

    # For machines that watch

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(describe_api(self.models.names))

    # Shared parts

    def _model(self, name: str | None) -> ServedModel:
        model = self.models.find(name)
        asyncio.get_running_loop().run_in_executor(None, model.refresh)
        return model

    async def _body(self, request: Request) -> bytes:
        """Return the body of a request; one that is too large is not read to its end."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.settings.max_bytes:
                raise HTTPException(413, f"the body is larger than {self.settings.max_bytes} bytes")
            parts.append(part)
        if not size:
            raise ArgumentError("the body is empty: send the bytes of a picture")
        return b"".join(parts)

    async def _unless_gone(self, request: Request, work: Awaitable[_Result]) -> _Result:
        """Return the result of ``work``, or cancel it when the client leaves."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([task], timeout=_POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()

    def guarded(self, route: str, endpoint: _Endpoint) -> _Endpoint:
        """Return an endpoint that checks the token, counts, logs, and turns errors into answers."""

        async def answer(request: Request) -> Response:
            begin = time.monotonic()
            response = await self._answered(endpoint, request)
            seconds = time.monotonic() - begin
            self.metrics.requests.labels(route, str(response.status_code)).inc()
            self.metrics.stages.labels("all").observe(seconds)
            _LOG.info(
                "request",
                extra={"route": route, "status": response.status_code, "milliseconds": round(seconds * 1e3, 1)},
            )
            return response

        return answer

    async def _answered(self, endpoint: _Endpoint, request: Request) -> Response:
        if not self._is_allowed(request):
            return _error(401, "send the server's token: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"})
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except HTTPException as error:
            return _error(error.status_code, str(error.detail))
        except FastcamError as error:
            status = next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)
            return _error(status, str(error), {"Retry-After": _RETRY_SECONDS} if status in (503, 504) else {})
        except Exception:  # noqa: BLE001 - the server outlives whatever one request does
            _LOG.exception("an unexpected error")
            return _error(500, "an unexpected error: see the server's log")

    def _is_allowed(self, request: Request) -> bool:
        token = self.settings.token
        if token is None or request.url.path in _OPEN_TO_ALL:
            return True
        given = request.headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


_SETTING_NAMES = sorted({name for row in METHODS.values() for name in row.settings})


def create_app(models: ModelStore, settings: ServerSettings) -> Starlette:
    """Return the ASGI application that explains with these models.

    Parameters
    ----------
    models : ModelStore
    settings : ServerSettings
    """
    server = _Server(models, settings.checked())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # The models were opened and warmed up before.
        server.is_ready = True
        yield
        server.is_ready = False
        await asyncio.to_thread(server.scheduler.close)

    model = "/v2/models/{name}"
    routes: list[tuple[str, str, _Endpoint]] = [
        ("/", "GET", server.page),
        ("/explain", "POST", server.explain),
        ("/openapi.json", "GET", server.openapi),
        ("/metrics", "GET", server.show_metrics),
        ("/v2", "GET", server.server_metadata),
        ("/v2/health/live", "GET", server.live),
        ("/v2/health/ready", "GET", server.ready),
        *((f"{model}{version}", "GET", server.model_metadata) for version in _VERSIONS),
        *((f"{model}{version}/ready", "GET", server.model_ready) for version in _VERSIONS),
        *((f"{model}{version}/infer", "POST", server.infer) for version in _VERSIONS),
    ]
    return Starlette(
        routes=[Route(path, server.guarded(path, endpoint), methods=[verb]) for path, verb, endpoint in routes],
        lifespan=lifespan,
        exception_handlers={HTTPException: _not_routed},
    )


_VERSIONS = ("", "/versions/1")


async def _not_routed(request: Request, error: Exception) -> Response:
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    texts = {404: "there is no such page", 405: "this page has another method"}
    return _error(status, texts.get(status, str(error)), headers)


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, dict(headers or {}))


def _score_headers(found: Any) -> dict[str, str]:
    """Return the first class and its score, for clients that ask for a picture."""
    if not found.labels:
        return {}
    row = {"label": found.labels[0], "score": float(found.logits[int(found.targets[0])])}
    return {"X-Explained": json.dumps(row)}
