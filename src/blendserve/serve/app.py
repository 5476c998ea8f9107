"""The ASGI application: routes, the guard before them, and a service that lives as long as they do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware

from blendserve.serve import dashboard, openapi, routes_batches, routes_files, routes_online, routes_state
from blendserve.serve.guard import Gate, Guard, Sessions
from blendserve.serve.http import HANDLERS
from blendserve.serve.service import Service


def make_app(service: Service) -> Starlette:
    """The application of a service, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    sessions = Sessions()
    gate = Gate(service, sessions)
    routes = [
        *routes_files.ROUTES,
        *routes_batches.ROUTES,
        *routes_online.ROUTES,
        *routes_state.ROUTES,
        *dashboard.ROUTES,
        *openapi.ROUTES,
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, gate=gate)],
        exception_handlers=dict(HANDLERS),
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.sessions = sessions
    app.state.gate = gate
    return app
