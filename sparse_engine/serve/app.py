"""The routes: OpenAI's for images and models, KServe's names for health, Prometheus' metrics, a page and its manual."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from sparse_engine import __version__
from sparse_engine.images import encode_png

from . import refusals
from .asked import ImageRequest
from .batcher import Job
from .drawing import Served
from .guard import ClientGone, Guard
from .manual import manual
from .refusals import Refusal
from .service import Service

Encoder = Callable[[np.ndarray], bytes]
PAGE = Path(__file__).parent / "page"
FILES = ("page.css", "page.js")
GENERATIONS = "/v1/images/generations"
DEADLINE = "x-deadline-seconds"
PNG, NPY = "image/png", "application/x-npy"
ABOUT = "x-sparse-engine-"  # before seed, index and label, in the headers of an answer that is one picture's bytes


def create_app(service: Service, *, wait: bool = False) -> Guard:
    """The application, an ASGI callable. It starts the service, and stops it, by the lifespan protocol.

    Args:
        service: not started yet.
        wait: until the engines are loaded, before the first request is answered (503 meanwhile, otherwise).
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        if wait and service.loaded is not None:
            await service.loaded
        yield
        await service.stop()

    app = FastAPI(title="sparse-engine", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(Exception, _unforeseen)
    _add_images(app, service)
    _add_models(app, service)
    _add_health(app, service)
    _add_pages(app)
    return Guard(app, service.settings.max_body, service.settings.api_key)


def _add_images(app: FastAPI, service: Service) -> None:
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}}

    @app.post(GENERATIONS, openapi_extra=schema)
    async def generate(request: Request) -> Response:
        """Draw images: base64 in JSON, or with Accept image/png or application/x-npy the bytes of one."""
        started, status = time.perf_counter(), 500
        try:
            answer = await _generate(service, request)
            status = answer.status_code
            return answer
        except Refusal as refusal:
            status = refusal.status
            raise
        except ClientGone:
            status = refusals.CLIENT_GONE
            return Response(status_code=status)
        except asyncio.CancelledError:
            status = refusals.CLIENT_GONE
            raise
        finally:
            service.metrics.answered(status, time.perf_counter() - started)


async def _generate(service: Service, request: Request) -> Response:
    deadline = _deadline(request, service.settings.deadline)
    asked = ImageRequest.parse(await request.body())
    served, job = await service.job(asked)
    encode, kind = _form(request.headers.get("accept", ""), asked.count, served)
    batcher = service.batcher
    if batcher is None or service.draining:
        raise refusals.closed(service.draining)
    batcher.submit(job)
    try:
        images = await _wait(job, request, deadline)
    finally:
        batcher.abandon(job)
    bodies = await asyncio.get_running_loop().run_in_executor(
        service.encoder, lambda: [encode(each) for each in images]
    )
    facts = _facts(job)
    if kind is not None:
        headers = {ABOUT + name: str(value) for name, value in facts[0].items() if value is not None}
        return Response(bodies[0], media_type=kind, headers=headers)
    data = [{"b64_json": base64.b64encode(body).decode(), **fact} for body, fact in zip(bodies, facts, strict=True)]
    key = job.key
    chosen = {"model": key.model, "steps": key.steps, "sampler": key.sampler, "guidance": key.guidance}
    return JSONResponse({"created": int(time.time()), "data": data, "output_format": "png", **chosen})


async def _wait(job: Job, request: Request, deadline: float) -> list[np.ndarray]:
    """A job's images. Raises Refusal where it fails or the time is over, ClientGone where nobody waits."""
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnect(request))
    either: set[asyncio.Future[Any]] = {gone, job.done}
    try:
        await asyncio.wait(either, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if job.done.done():
            images = [image for image in job.done.result() if image is not None]
            if len(images) < len(job.seeds):
                raise refusals.diverged(len(job.seeds) - len(images), len(job.seeds))
            return images
        if gone.done():
            raise ClientGone
        raise refusals.late(deadline)
    finally:
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _deadline(request: Request, most: float) -> float:
    """Seconds: the service's, or fewer by the client's header. Raises Refusal."""
    text = request.headers.get(DEADLINE)
    try:
        asked = most if text is None else float(text)
    except ValueError:
        asked = math.nan
    if not asked > 0:
        raise Refusal(400, f"{DEADLINE}: expected seconds, above 0", "invalid_value", param=DEADLINE)
    return min(asked, most)


def _form(accept: str, n: int, served: Served) -> tuple[Encoder, str | None]:
    """(what makes a body of an image, its type where the answer is that body). Raises Refusal where there is none."""
    kind = next((kind for kind in (PNG, NPY) if kind in accept), None)
    if kind is not None and n != 1:
        what = f"n: {PNG} and {NPY} are of one image; leave Accept out for JSON"
        raise Refusal(400, what, "too_many_images", param="n")
    if kind == NPY:
        return _npy, kind
    if not served.draws_pixels:
        what = f"this model draws latents, or channels that no PNG holds; ask for one image with Accept: {NPY}"
        raise Refusal(406, what, "no_pixels")
    return encode_png, kind


def _npy(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, image)
    return stream.getvalue()


def _facts(job: Job) -> list[dict[str, Any]]:
    """Of each image what draws it again: ``engine.sample(1, seed=seed, first=index, labels=label)``."""
    labels = job.told.arrays["y"][0].tolist() if "y" in job.told.arrays else [None] * len(job.seeds)
    return [
        {"seed": seed, "index": index, "label": label}
        for seed, index, label in zip(job.seeds.tolist(), job.numbers.tolist(), labels, strict=True)
    ]


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The models, and what can be asked of each."""
        limits = {"max_images": service.settings.max_images, "max_steps": service.settings.max_steps}
        data = [{**served.describe(), **limits} for served in service.models.values()]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{model}")
    async def one(model: str) -> Response:
        """One of them."""
        return JSONResponse(service.model(model).describe())

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live")
    @app.get("/v2/health/live", include_in_schema=False)
    async def live() -> Response:
        """200 as long as the process answers."""
        return JSONResponse({"live": True})

    @app.get("/health/ready")
    @app.get("/v2/health/ready", include_in_schema=False)
    async def ready() -> Response:
        """200 while requests are taken; 503 while engines load, and once the service shuts down."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v2/models/{model}/ready", include_in_schema=False)
    async def model_ready(model: str) -> Response:
        return JSONResponse({"name": service.model(model).name, "ready": True})


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "page.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404)
        return FileResponse(PAGE / name)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(manual(app.openapi()))


def _schema() -> dict[str, Any]:
    return ImageRequest.model_json_schema()


async def _refused(request: Request, refusal: Exception) -> Response:
    found = refusal if isinstance(refusal, Refusal) else refusals.failed()
    return JSONResponse(found.body(), found.status, found.headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    words = {404: "no such route; see /docs", 405: "this route has other methods; see /docs"}
    found = Refusal(status, words.get(status, "the request cannot be answered"), "no_such_route")
    return JSONResponse(found.body(), status, getattr(error, "headers", None))


async def _unforeseen(request: Request, error: Exception) -> Response:
    return JSONResponse(refusals.failed().body(), 500)
