"""/v1/models, /health and /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blendserve.serve.batches import ACTIVE
from blendserve.serve.failures import ApiError
from blendserve.serve.http import service_of
from blendserve.serve.records import BatchRecord
from blendserve.serve.service import Service
from blendserve.serve.settings import ModelChoice


def _model_json(service: Service, model: ModelChoice) -> dict[str, object]:
    return {"id": model.name, "object": "model", "created": service.started_at, "owned_by": "blendserve"}


async def list_models(request: Request) -> Response:
    service = service_of(request)
    return JSONResponse({"object": "list", "data": [_model_json(service, model) for model in service.settings.models]})


async def get_model(request: Request) -> Response:
    service, id = service_of(request), request.path_params["id"]
    model = service.settings.model_named(id)
    if model is None:
        raise ApiError(404, f"The model {id[:80]!r} does not exist.", code="model_not_found", param="model")
    return JSONResponse(_model_json(service, model))


async def live(request: Request) -> Response:  # noqa: ARG001
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    scheduler = service_of(request).scheduler
    body = {"status": "ok" if scheduler.is_ready else "not ready", "reason": scheduler.trouble}
    return JSONResponse(body, 200 if scheduler.is_ready else 503)


async def metrics(request: Request) -> Response:
    registry = CollectorRegistry()
    registry.register(_Collector(service_of(request)))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collector(Collector):
    """Reads the service when it is asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service, scheduler = self._service, self._service.scheduler
        found = Counter({label: len(service.store.page(BatchRecord, label=label)) for label in ACTIVE})
        batches = GaugeMetricFamily("blendserve_batches", "Batches that have not ended, by state.", labels=["status"])
        for label in ACTIVE:
            batches.add_metric([label], found[label])
        yield batches
        tokens = CounterMetricFamily("blendserve_tokens", "Tokens of finished requests, by kind.", labels=["kind"])
        for kind in ("prompt", "cached", "output"):
            tokens.add_metric([kind], scheduler.tally.num_tokens[kind])
        yield tokens
        yield CounterMetricFamily(
            "blendserve_engine_restarts", "Engine processes that died in a round.", scheduler.num_restarts
        )
        yield CounterMetricFamily(
            "blendserve_engine_seconds",
            "Seconds in which requests of batches ran, of rounds that ended.",
            scheduler.tally.engine_s,
        )
        yield CounterMetricFamily("blendserve_batches_ended", "Batches that have ended.", service.num_ended)
        waiting = scheduler.waiting()
        for name, text, value in (
            ("engine_ready", "1 where the engine process has its model.", float(scheduler.is_ready)),
            ("queued_requests", "Requests of batches that have no answer yet.", sum(b.num_left for b in waiting)),
            ("tokens_per_second", "Tokens per second in this round.", scheduler.tally.token_rate),
            ("stored_bytes", "Bytes of all files.", service.store.stored_bytes()),
            ("free_bytes", "Free bytes of the disk.", service.blobs.free_bytes()),
        ):
            yield GaugeMetricFamily(f"blendserve_{name}", text, value)
        state = scheduler.engine_state
        if state is not None:
            yield GaugeMetricFamily("blendserve_running_requests", "Requests that run now.", state.num_running)
            if state.kv_use is not None:
                yield GaugeMetricFamily("blendserve_kv_use", "Share of the KV memory in use.", state.kv_use)
            if state.prefix_hit_rate is not None:
                yield GaugeMetricFamily(
                    "blendserve_prefix_hit_rate", "Share of prompt tokens not computed again.", state.prefix_hit_rate
                )


ROUTES = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{id:path}", get_model, methods=["GET"]),
    Route("/health", live, methods=["GET"]),
    Route("/health/live", live, methods=["GET"]),
    Route("/health/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
